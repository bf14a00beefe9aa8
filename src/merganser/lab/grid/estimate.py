"""How long a grid will take here, from one short pass of its architecture forwards and backwards.

The weights are not read: a network of the same shape with arbitrary numbers costs the same. Times grow with the tokens
that go through it, which are counted on a sample of the texts; merges and reading are left out, since they are short
beside training. It is a guess within a factor of about two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import load_config
from merganser.collection.scores import SAMPLES
from merganser.lab.grid.cells import Cell, ModelSpec
from merganser.lab.grid.compute import candidates, scored_on
from merganser.lab.grid.jobs import STATISTICS_TITLES, Need
from merganser.lab.grid.models import Models
from merganser.lab.suites.base import DEV
from merganser.tasks.columns import Columns
from merganser.tasks.data import selected
from merganser.tasks.models import choose_length, load_tokenizer, open_model
from merganser.training.settings import TrainingSettings

_EXAMPLES, _TOKENS = 2, 64  # of the batch that is timed
_TEXTS = 64  # of a data set, to see how long they are
_PASSES, _SECONDS = 4, 1.5  # how many are timed at most, and when no more are begun
_MOST_PARAMETERS = 2_000_000_000  # a larger model is not built to be timed


@dataclass(frozen=True)
class Estimate:
    """What is left to do, in seconds of one process on this machine.

    Attributes:
        seconds: None where it cannot be said.
        reason: why not, or what the number is made of.
    """

    seconds: float | None
    reason: str


@dataclass(frozen=True)
class _Rates:
    """Seconds a token of a pass forwards, and of one backwards."""

    forwards: float
    backwards: float


def estimate(models: Models, needs: Sequence[Need], cells: Sequence[Cell]) -> Estimate:
    """Time one batch, and count the tokens of everything that is to be made.

    Args:
        models: of the experiment, its inputs checked.
        needs: what the zoo lacks.
        cells: that have no row.
    """
    if not needs and not cells:
        return Estimate(0.0, "everything is there")
    tokens = _Tokens(models)
    try:
        rates = _calibrate(models, tokens.limit(_TOKENS))
    except Exception as error:  # whatever an architecture does that its configuration alone does not build
        return Estimate(None, f"the model could not be timed ({type(error).__name__}: {error})")
    parts = {"training": 0.0, "statistics": 0.0, "scoring": 0.0}
    for need in needs:
        if need.what in STATISTICS_TITLES:
            parts["statistics"] += _statistics(models, need.spec, need.what, tokens, rates)
        elif need.what == "multitask" or models.args(need.spec).checkpoint is None:
            settings = models.settings(None if need.what == "multitask" else models.args(need.spec))
            parts["training"] += _training(models, need.cell.contributors, settings, tokens, rates)
    for cell in cells:
        method = models.config.method(cell.method) if cell.kind == "merge" else None
        search = len(candidates(method.search, len(cell.contributors), 0)) if method and method.search else 0
        passes = sum(tokens.of(name, split) for name, split, _ in scored_on(models.config, cell))
        passes += search * sum(tokens.of(spec.set, DEV) for spec in cell.contributors)
        parts["scoring"] += passes * rates.forwards * (cell.kind != "ensemble")
    told = ", ".join(f"{seconds / 3600:.1f} h {name}" for name, seconds in parts.items())
    return Estimate(sum(parts.values()), told)


def _calibrate(models: Models, length: int) -> _Rates:
    """Seconds a token, the least of a few passes of a small batch: other programs only make them slower."""
    network = _network(models)
    device = torch.device(models.device)
    ids = torch.full((_EXAMPLES, length), 5, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = network.config
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]

    def timed(gradients: bool) -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(gradients):
            logits = network(**inputs).logits
        if gradients:
            logits.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    passes: list[tuple[float, float]] = []
    while len(passes) < _PASSES and sum(map(sum, passes)) < _SECONDS:
        passes.append((timed(False), timed(True)))
    forwards, both = map(min, zip(*passes, strict=True))
    return _Rates(forwards / ids.numel(), max(both - forwards, forwards) / ids.numel())


def _network(models: Models) -> nn.Module:
    """The architecture with the task's head; all weights lie in one small piece of memory."""
    opened = open_checkpoint(models.config.pretrained.model, allow_pickle=models.allow_pickle)
    if sum(math.prod(info.shape) for info in opened.tensors.values()) > _MOST_PARAMETERS:
        raise ValueError(f"it has more than {_MOST_PARAMETERS:.0e} parameters")
    config = load_config(opened)
    task = models.data.suite.task(models.config.set_of(next(iter(models.config.contributors))))
    with no_init_weights():
        network: nn.Module = getattr(transformers, task.model_class(opened.config)).from_config(config)
    parameters = list(network.parameters())
    most = max(parameter.numel() for parameter in parameters)
    # Of equal numbers, or of zeros, others are denormal.
    memory = 0.05 * torch.randn(most, device=models.device)
    for parameter in parameters:
        parameter.data = memory[: parameter.numel()].view(parameter.shape)
    return network.to(models.device).eval()


def _training(
    models: Models, specs: Sequence[ModelSpec], settings: TrainingSettings, tokens: _Tokens, rates: _Rates
) -> float:
    rows = sum(len(models.rows(spec)) for spec in specs)
    length = sum(tokens.length(spec.set) * len(models.rows(spec)) for spec in specs) / rows
    steps = settings.max_steps or math.ceil(rows / settings.batch_size) * settings.epochs
    seen = steps * settings.batch_size * length
    epochs = math.ceil(seen / (rows * length))
    dev = sum(tokens.of(spec.set, DEV) for spec in specs)
    return seen * (rates.forwards + rates.backwards) + epochs * dev * rates.forwards


def _statistics(models: Models, spec: ModelSpec, kind: str, tokens: _Tokens, rates: _Rates) -> float:
    wanted = models.statistics_key(spec, kind)["examples"]
    seen = min(wanted or math.inf, len(models.rows(spec))) * tokens.length(spec.set)
    if kind == "gram":
        return seen * rates.forwards * 1.5  # products of a layer's inputs cost about half of a pass more
    if kind == "kfac":
        return seen * (rates.forwards * 2.5 + rates.backwards * 1.5)
    suite, passes = models.data.suite, SAMPLES
    if models.config.statistics.fisher != "expected":
        passes = 1
    elif suite.task(spec.set).problem in ("classification", "multi_label", "regression"):
        passes = max(1, len(suite.votes(spec.set) or suite.labels(spec.set)))
    return seen * (rates.forwards + passes * rates.backwards)


class _Tokens:
    """How many tokens data sets have, from a sample of their texts."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.opened = open_model(models.config.pretrained.model, allow_pickle=models.allow_pickle)
        self.tokenizer = load_tokenizer(self.opened)
        self._lengths: dict[str, float] = {}

    def limit(self, asked: int, pairs: bool = False) -> int:
        """A length that the model takes, at most the asked one."""
        return choose_length(asked, self.opened.config, self.tokenizer, pairs=pairs)

    def length(self, set_name: str) -> float:
        """The mean number of tokens of a data set's texts, cut as in training; padding aside."""
        if set_name not in self._lengths:
            suite = self.models.data.suite
            rows, task = self.models.data.rows(set_name, DEV), suite.task(set_name)
            columns = task.columns(rows, Columns())
            length = self.limit(self.models.settings().max_length, columns.text_pair is not None)
            few = selected(rows, range(min(_TEXTS, len(rows))))
            encoded = task.encode(few, self.tokenizer, self.opened.config, columns, length)
            self._lengths[set_name] = sum(len(one.input_ids) for one in encoded.features) / len(few)
        return self._lengths[set_name]

    def of(self, set_name: str, split: str) -> float:
        """The tokens of a split."""
        return len(self.models.data.rows(set_name, split)) * self.length(set_name)
