"""Shards of the examples: which they are, and collecting them one after the other in this process.

A shard's statistics are those of a collection of its examples alone, and shards are added in their order in float64
(:mod:`merganser.statistics.sharding`). What a shard is depends on data and settings only, so that it does not matter
where it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from merganser.statistics import Statistics
from merganser.statistics.collection import Collector
from merganser.statistics.sharding import ShardSums
from merganser.statistics.stopping import check_points, estimated_error
from merganser.tasks.collecting.examples import Examples

SHARD_EXAMPLES = 2048

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Shard:
    """Some examples that are collected together.

    Attributes:
        number: its place among the shards.
        indices: of its examples.
        fisher: how many of its first examples give Fisher information; None: all.
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
        return Tally(
            self.examples + other.examples,
            self.cut + other.cut,
            self.real + other.real,
            self.wide + other.wide,
        )

    def notes(self, max_length: int) -> tuple[str, ...]:
        """The tally in words, for the header."""
        cut = f"; {self.cut} of {self.examples} texts were longer and cut" if self.cut else ""
        padding = 1 - self.real / self.wide if self.wide else 0.0
        return (
            f"texts cut at {max_length} tokens{cut}",
            f"{padding:.1%} of the positions were padding, and were left out",
        )


def fixed_shards(examples: int, size: int, fisher_examples: int | None, *, grams: bool) -> list[Shard]:
    """All examples in their order, ``size`` in a shard; without ``grams`` only the shards with Fisher information."""
    shards = []
    for number, start in enumerate(range(0, examples, size)):
        left = None if fisher_examples is None else max(0, fisher_examples - start)
        if grams or left != 0:
            shards.append(Shard(number, range(start, min(start + size, examples)), left))
    return shards


def collect_shard(
    collector: Collector, examples: Examples, batch_size: int, advance: Advance, shard: Shard
) -> tuple[Statistics, Tally]:
    """The statistics of one shard, in memory."""
    leading = 0 if shard.fisher is None else shard.fisher
    batches = examples.batches(shard.indices, batch_size, leading)
    header, tensors = collector.collect(
        (batch.inputs for batch in batches),
        shard=shard.number,
        fisher_examples=shard.fisher,
        advance=advance,
    )
    tally = Tally(
        examples=len(shard.indices),
        cut=sum(index in examples.encoded.cut for index in shard.indices),
        real=sum(len(feature.input_ids) for feature in batches.features),
        wide=sum(
            len(group) * max(len(batches.features[i].input_ids) for i in group) for group in batches.plan
        ),
    )
    return Statistics.in_memory(header, tensors), tally


def added(parts: Iterable[tuple[Statistics, Tally]]) -> tuple[ShardSums, Tally]:
    """The sums and the tally of shards, which are used up one after the other."""
    sums, tally = ShardSums(), Tally()
    for statistics, counted in parts:
        sums.add(statistics)
        tally += counted
    return sums, tally


@dataclass(frozen=True)
class Stop:
    """When to stop before all examples have been seen.

    Attributes:
        tolerance: of the Gram matrices' relative error, see :mod:`merganser.statistics.stopping`.
        seed: of the order of the examples.
        shard_examples: the most in a shard.
        fisher_examples: Fisher information from so many first examples of that order; None: from all that are seen.
    """

    tolerance: float
    seed: int
    shard_examples: int
    fisher_examples: int | None

    def run(
        self, examples: int, collect: Callable[[Shard], tuple[Statistics, Tally]]
    ) -> tuple[ShardSums, Tally, str]:
        """Collect shards of a random order, each second one for the other half, until the halves agree.

        Args:
            examples: how many there are.
            collect: collects a shard.

        Returns:
            The sums and the tally of all shards, and what was done, for the header.
        """
        order = np.random.default_rng(self.seed).permutation(examples)
        halves, tally = (ShardSums(), ShardSums()), Tally()
        number = at = 0
        error = float("inf")
        for point in check_points(examples):
            for half, part in self._parts(order[at:point].tolist()):
                left = None if self.fisher_examples is None else max(0, self.fisher_examples - tally.examples)
                statistics, counted = collect(Shard(number, part, left))
                halves[half].add(statistics)
                tally, number = tally + counted, number + 1
            at = point
            error = estimated_error(*halves)
            if error <= self.tolerance:
                break
        halves[0].absorb(halves[1])
        return halves[0], tally, self._note(tally.examples, examples, error)

    def _parts(self, segment: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        """Which half gets which examples: every other one, in shards of the usual size."""
        for half in (0, 1):
            own = segment[half::2]
            for start in range(0, len(own), self.shard_examples):
                yield half, own[start : start + self.shard_examples]

    def _note(self, used: int, examples: int, error: float) -> str:
        if error > self.tolerance:
            return (
                f"not converged after all {examples} examples: the estimated relative error of the Gram matrices is "
                f"{error:.2%}, the tolerance {self.tolerance:.2%}"
            )
        return (
            f"converged after {used} of {examples} examples, in random order (seed {self.seed}): the estimated "
            f"relative error of the Gram matrices is {error:.2%}, the tolerance {self.tolerance:.2%}"
        )
