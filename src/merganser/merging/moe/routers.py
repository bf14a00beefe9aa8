"""The routers of a mixture of experts: from what the base model makes of prompts, from their embeddings, or random.

A router weighs the experts of a layer by the products of its rows with what comes into the layer's feed-forward block,
so that a row that looks like the states of some prompts sends such prompts to its expert. mergekit-moe's way is kept:
the state of a layer is what comes into the layer (not what its norm makes of it before the router sees it), averaged
over prompts, less the average of the negative prompts, brought to length 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.sources import read_source
from merganser.errors import CheckpointError, ErrorCollector
from merganser.merging.inputs import Parent
from merganser.merging.memory import RunSettings
from merganser.merging.moe.config import RANDOM, MoeConfig
from merganser.methods.elementwise import Position
from merganser.progress import track
from merganser.tensors import one_thread

#: The condition number of a layer's rows from which on mergekit, too, calls them degenerate.
_DEGENERATE = 5.0
_SHORTEST = 1e-8  # a vector below this length is not lengthened
_MEND = "give a base model that opens and whose tokenizer belongs to it, or choose gate_mode: random"
EMBEDDING = "model.embed_tokens.weight"

Ids = tuple[int, ...]


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
    from merganser.tasks.models import blamed, load_tokenizer, open_model

    tokenizer, problems = load_tokenizer(open_model(config.base_model, allow_pickle=allow_pickle)), ErrorCollector()
    begin = tokenizer.bos_token or ""

    def ids(prompt: str) -> Ids:
        with blamed(f"the prompt {prompt!r} cannot be tokenised", config.base_model, _MEND):
            text = prompt if begin and prompt.startswith(begin) else begin + prompt
            found = tuple(int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"])
        if not found:
            problems.add(
                CheckpointError(f"the prompt {prompt!r} comes to no token", where=config.base_model, mend=_MEND)
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
        states, combine = _embeddings(base, texts), _direction
    else:
        states, combine = _hidden_states(config, texts, settings), _mean
    rows = []
    for one in prompts:
        row = combine([states[ids] for ids in one.positive])
        row = row - combine([states[ids] for ids in one.negative]) if one.negative else row
        rows.append(_normalised(row).to(torch.float32))
    return torch.stack(rows, dim=1)


def _mean(states: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(states)).mean(0)


def _direction(states: Sequence[Tensor]) -> Tensor:
    """The direction of a sum, as mergekit's cheap_embed has it."""
    return _normalised(torch.stack(list(states)).sum(0))


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)


def _embeddings(base: Parent, texts: Sequence[Ids]) -> dict[Ids, Tensor]:
    """The sum of each text's embeddings, (1, hidden size) in float64; only their rows are read."""
    source = base.sources[EMBEDDING]
    height = source.shape(base.checkpoint)[0]
    rows: dict[int, Tensor] = {}
    for number in sorted({number for ids in texts for number in ids}):
        if number >= height:
            what = f"its tokenizer gives the token {number}, and there are {height} embeddings"
            raise CheckpointError(what, where=base.title, mend=_MEND)
        rows[number] = read_source(base.checkpoint, source, number, number + 1).to(torch.float64)
    return {ids: torch.cat([rows[number] for number in ids]).sum(0, keepdim=True) for ids in texts}


def _hidden_states(config: MoeConfig, texts: Sequence[Ids], settings: RunSettings) -> dict[Ids, Tensor]:
    """What comes into each layer for each text, (layers, hidden size) in float64.

    Of the last token, or (``hidden_avg``) the mean over tokens. Texts go through the model one by one, so that there
    is no padding whose states could enter, and each on one thread, so that the numbers do not depend on how many
    there are.
    """
    from merganser.tasks.models import blamed, load_model, open_model

    model: Any = load_model(open_model(config.base_model, allow_pickle=settings.allow_pickle), "AutoModel",
                            allow_pickle=settings.allow_pickle)  # fmt: skip
    device = settings.torch_device or torch.device("cpu")
    model.to(device)

    def state(ids: Ids) -> Tensor:
        with torch.inference_mode():
            given = torch.tensor([ids], device=device)
            found = model(input_ids=given, attention_mask=torch.ones_like(given), output_hidden_states=True,
                          use_cache=False)  # fmt: skip
            layers = torch.stack(found.hidden_states[:-1])[:, 0].to("cpu", torch.float64)
            return layers.mean(1) if config.gate_mode == "hidden_avg" else layers[:, -1].clone()

    with (
        blamed("the base model cannot be run on the prompts", config.base_model, _MEND),
        one_thread(),
        ThreadPoolExecutor(settings.threads) as pool,
    ):
        return dict(zip(texts, track(pool.map(state, texts), "prompts", "prompts", len(texts)), strict=True))


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
