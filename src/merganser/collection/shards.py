"""Shards of the examples: which they are, collecting one, and the sums of several in float64.

A shard's statistics are what a collection of its examples alone gives. What a shard is depends on data and settings
only. Adding the shards in their order, wherever each was computed, gives one result to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.collection.collector import Advance, Collector
from merganser.collection.examples import Examples
from merganser.collection.placement import Placement, placed_model
from merganser.errors import StatisticsError
from merganser.statistics import Statistics, StatisticsHeader
from merganser.statistics.algebra import same_layers, sum_headers, weights_of
from merganser.tasks.models import prepare_padding

SHARD_EXAMPLES = 2048


@dataclass(frozen=True)
class Shard:
    """Some examples that are collected together.

    Attributes:
        number: its place among the shards.
        indices: of its examples.
        fisher: how many of its first examples give Fisher information and K-FAC; None: all.
    """

    number: int
    indices: Sequence[int]
    fisher: int | None = None


@dataclass(frozen=True)
class Tally:
    """What the notes say of batches.

    Attributes:
        examples: how many.
        cut: how many of them were longer than the length limit.
        real, wide: positions without and with padding.
    """

    examples: int = 0
    cut: int = 0
    real: int = 0
    wide: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def notes(self, max_length: int) -> tuple[str, ...]:
        """The tally in words, for the header; nothing was cut at a length of 0."""
        cut = f"; {self.cut} of {self.examples} texts were longer and cut" if self.cut else ""
        padding = 1 - self.real / self.wide if self.wide else 0.0
        return (
            *([f"texts cut at {max_length} tokens{cut}"] if max_length else []),
            f"{padding:.1%} of the positions were padding, and were left out",
        )


def fixed_shards(examples: int, size: int, fisher_examples: int | None, *, grams: bool) -> list[Shard]:
    """All examples in their order, ``size`` in a shard; without ``grams`` only the shards with Fisher information."""
    shards = []
    for number, start in enumerate(range(0, examples, size)):
        left = None if fisher_examples is None else max(0, fisher_examples - start)
        shards.append(Shard(number, range(examples)[start : start + size], left))
    return [shard for shard in shards if grams or shard.fisher != 0]


@contextmanager
def shard_collector(
    examples: Examples,
    placement: Placement,
    batch_size: int,
    advance: Advance = lambda _: None,
    *,
    allow_pickle: bool,
    **wanted: Any,
) -> Iterator[Callable[[Shard], tuple[Statistics, Tally]]]:
    """The function that collects a shard, with the model loaded while the context lasts.

    Args:
        examples: of which the shards are, and their model.
        placement: of the model.
        batch_size: examples in a batch.
        advance: told of each batch how many examples it had.
        allow_pickle: accept pickled weights.
        wanted: what to collect, see :class:`~merganser.collection.collector.Collector`.
    """
    opened, task = examples.opened, examples.task
    with (
        placed_model(opened, task, placement, allow_pickle=allow_pickle) as model,
        Collector(model, opened.checkpoint, problem=task.problem, **wanted) as collector,
    ):
        prepare_padding(model, examples.tokenizer)
        yield partial(_collect_shard, collector, examples, batch_size, advance)


def _collect_shard(
    collector: Collector, examples: Examples, batch_size: int, advance: Advance, shard: Shard
) -> tuple[Statistics, Tally]:
    leading = 0 if shard.fisher is None else shard.fisher
    batches = examples.batches(shard.indices, batch_size, leading)
    header, tensors = collector.collect(
        (tensors for _, tensors in batches), shard=shard.number, fisher_examples=shard.fisher, advance=advance
    )
    cut = sum(index in examples.encoded.cut for index in shard.indices)
    return Statistics.in_memory(header, tensors), Tally(len(shard.indices), cut, *batches.positions)


def sum_shards(parts: Iterable[tuple[Statistics, Tally]]) -> tuple[ShardSums, Tally]:
    """The sums and the tally of shards, which are used up one after the other."""
    sums, tally = ShardSums(), Tally()
    for statistics, counted in parts:
        sums.add(statistics)
        tally += counted
    return sums, tally


class ShardSums:
    """The sum of some shards: 8 bytes for each number of a shard's float32 statistics.

    Means are weighted by the rows they stand for, Fisher information by its examples.

    Attributes:
        shards: how many were added.
    """

    def __init__(self) -> None:
        self.shards = 0
        self._header: StatisticsHeader | None = None
        self._totals: dict[str, Tensor] = {}

    def add(self, shard: Statistics) -> None:
        """Add a shard, in memory or in a file of which one tensor at a time is read.

        Raises:
            StatisticsError: it is of other weights or layers than those before it.
        """
        weights = weights_of(shard.header)

        def weighted(name: str) -> Tensor:
            values = shard.packed(name)
            return values.to(torch.float64).mul_(weights[name]) if name in weights else values.clone()

        self._include(shard.header, shard.tensors, weighted, shard.path)
        self.shards += 1

    def absorb(self, other: ShardSums) -> None:
        """Add the sums of other shards, which are used up."""
        if other._header is not None:
            self._include(other._header, list(other._totals), other._totals.pop)
            self.shards += other.shards

    def inputs(self) -> Iterator[str]:
        """The inputs with a Gram matrix."""
        found = {layer.input: None for layer in self._some_header().layers if layer.input is not None}
        return (input for input in found if f"gram.{input}" in self._totals)

    def gram(self, input: str) -> tuple[Tensor, int]:
        """Packed upper triangle (d·(d+1)/2,) float64 of the sum of x xᵀ, and how many rows it stands for."""
        name = f"gram.{input}"
        return self._totals[name], weights_of(self._some_header())[name]

    def result(self) -> tuple[StatisticsHeader, dict[str, Tensor]]:
        """Header and tensors of the whole, float32. The sums are used up.

        Raises:
            StatisticsError: no shard was added.
        """
        header = self._some_header()
        weights = weights_of(header)
        for name in weights.keys() & self._totals.keys():
            self._totals[name] = self._totals[name].div_(weights[name]).to(torch.float32)
        return header, {name: self._totals.pop(name) for name in sorted(self._totals)}

    def _some_header(self) -> StatisticsHeader:
        if self._header is None:
            raise StatisticsError("there are no shards to add", mend="give data with at least one example")
        return self._header

    def _include(
        self, header: StatisticsHeader, names: Iterable[str], read: Callable[[str], Tensor], where: Path | None = None
    ) -> None:
        self._header = header if self._header is None else _together(self._header, header, where)
        for name in names:
            if name in self._totals:
                self._totals[name] += read(name)
            else:
                self._totals[name] = read(name)


def _together(one: StatisticsHeader, two: StatisticsHeader, where: Path | None) -> StatisticsHeader:
    if _fixed(one) != _fixed(two) or not same_layers(one, two):
        what = "the shards are of different weights, layers or versions of libraries"
        mend = "let every machine see the same model, and run the same versions of merganser, torch, transformers"
        raise StatisticsError(what, where=where, mend=mend)
    notes = tuple(dict.fromkeys((*one.notes, *two.notes)))
    kinds = {"fisher": one.fisher or two.fisher, "kfac": one.kfac or two.kfac}
    protocol = max(one.protocol, two.protocol)
    return sum_headers([one, two]).model_copy(update={**kinds, "notes": notes, "protocol": protocol})


def _fixed(header: StatisticsHeader) -> tuple[Any, ...]:
    """What no two shards of one collection differ in."""
    return header.manifest_hash, header.versions, header.masking
