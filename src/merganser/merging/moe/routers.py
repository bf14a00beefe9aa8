"""The routers of a mixture of experts: from what the base model makes of prompts, from their embeddings, or random.

A router weighs the experts of a layer by the products of its rows with what comes into the layer's feed-forward block,
so that a row that looks like the states of some prompts sends such prompts to its expert. mergekit-moe's way is kept:
the state of a layer is what comes into the layer (not what its norm makes of it before the router sees it), averaged
over prompts, less the average of the negative prompts, brought to length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.errors import CheckpointError, ErrorCollector
from merganser.merging.inputs import Parent
from merganser.merging.memory import RunSettings
from merganser.merging.moe.config import RANDOM, MoeConfig
from merganser.merging.moe.states import MEND, Ids, embedded, layer_states
from merganser.methods.elementwise import Position

#: The condition number of a layer's rows from which on mergekit, too, calls them degenerate.
_DEGENERATE = 5.0
_SHORTEST = 1e-8  # a vector below this length is not lengthened


@dataclass(frozen=True)
class Prompts:
    """The prompts of one expert as token ids.

    Attributes:
        positive, negative: of each prompt.
    """

    positive: tuple[Ids, ...]
    negative: tuple[Ids, ...]


def encode(config: MoeConfig, allow_pickle: bool) -> list[Prompts]:
    """The prompts of every expert, the shared ones last; none where routers are random.

    The token that begins texts stands before each prompt, once; no other special token is added.

    Raises:
        CheckpointError: the base model has no tokenizer, or a prompt comes to no token.
    """
    if config.gate_mode in RANDOM:
        return []
    from merganser.tasks.models import blamed, load_tokenizer, open_model  # transformers, which other merges do without

    tokenizer, problems = load_tokenizer(open_model(config.base_model, allow_pickle=allow_pickle)), ErrorCollector()
    begin = tokenizer.bos_token or ""

    def ids(prompt: str) -> Ids:
        with blamed(f"the prompt {prompt!r} cannot be tokenised", config.base_model, MEND):
            text = prompt if begin and prompt.startswith(begin) else begin + prompt
            found = tuple(int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"])
        if not found:
            problems.add(
                CheckpointError(f"the prompt {prompt!r} comes to no token", where=config.base_model, mend=MEND)
            )
        return found

    encoded = [
        Prompts(tuple(map(ids, expert.positive_prompts)), tuple(map(ids, expert.negative_prompts)))
        for expert in config.everyone
    ]
    problems.raise_all()
    return encoded


def prompt_vectors(config: MoeConfig, prompts: Sequence[Prompts], base: Parent, settings: RunSettings) -> Tensor:
    """The row of each expert in each layer, by the prompts.

    Args:
        config: of the mixture.
        prompts: see :func:`encode`.
        base: the open base model.
        settings: threads and device.

    Returns:
        (layers, experts, hidden size), float32, shared experts last; for ``cheap_embed`` one layer, which stands for
        all.
    """
    texts = list(dict.fromkeys(ids for one in prompts for ids in (*one.positive, *one.negative)))
    if config.gate_mode == "cheap_embed":
        sums = {ids: rows.double().sum(0) for ids, rows in embedded(base, texts).items()}
        return torch.stack([_rows(prompts, sums, _direction)])
    last = config.gate_mode != "hidden_avg"
    found = []
    from merganser.tasks.models import blamed

    with blamed("the base model cannot be run on the prompts", config.base_model, MEND):
        for states in layer_states(base, texts, settings):
            means = {ids: rows[-1].double() if last else rows.double().mean(0) for ids, rows in states.items()}
            found.append(_rows(prompts, means, _mean))
    return torch.stack(found)


def _rows(
    prompts: Sequence[Prompts], states: Mapping[Ids, Tensor], combine: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor:
    """The row of each expert in one layer, (experts, hidden size) in float32."""
    rows = []
    for one in prompts:
        row = combine([states[ids] for ids in one.positive])
        row = row - combine([states[ids] for ids in one.negative]) if one.negative else row
        rows.append(_normalised(row).to(torch.float32))
    return torch.stack(rows)


def _mean(states: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(states)).mean(0)


def _direction(states: Sequence[Tensor]) -> Tensor:
    """The direction of a sum, as mergekit's cheap_embed has it."""
    return _normalised(torch.stack(list(states)).sum(0))


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)


def normal_numbers(name: str, rows: Sequence[int], width: int, seed: int) -> Tensor:
    """Numbers from the standard normal distribution for rows of a tensor, (rows, width) in float32.

    They depend on the seed, the tensor's name and the place in it alone (Box and Muller 1958, of counter-based uniform
    numbers).
    """
    position, like = Position(name, rows, (0, 1)), torch.empty(len(rows), width)
    radius = (-2 * torch.log1p(-position.uniform(like, 0, seed).double())).sqrt_()
    return (radius * (2 * math.pi * position.uniform(like, 1, seed).double()).cos_()).to(torch.float32)


def random_rows(mode: str, name: str, count: int, width: int, seed: int) -> Tensor:
    """A random router, (experts, hidden size) in float32.

    Args:
        mode: ``random`` for the standard normal distribution, ``uniform_random`` for how torch begins a linear layer.
        name: of the tensor.
        count, width: its shape.
        seed: of the mixture.
    """
    if mode == "random":
        return normal_numbers(name, range(count), width, seed)
    uniform = Position(name, range(count), (0,)).uniform(torch.empty(count, width), 0, seed)
    return (2 * uniform - 1) / math.sqrt(width)


def degenerate(routers: Mapping[int, Tensor]) -> list[int]:
    """The layers whose rows are so much alike that some expert will hardly be used."""
    found = []
    for number, rows in routers.items():
        values = torch.linalg.svdvals(rows.double())
        if len(rows) > 1 and float(values[0]) > _DEGENERATE * float(values[-1]):
            found.append(number)
    return found
