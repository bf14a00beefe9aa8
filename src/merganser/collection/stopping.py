"""When to stop collecting: the error of Gram matrices, estimated from two independent halves of the examples.

The examples come in a seeded random order, so that A and B, the means of x xᵀ over every other one of them, are
independent estimates of the same G. Their average Ḡ (weighted by rows) is what a collection yields. A − B has four
times the variance of Ḡ − G where both halves are as large, and generally Ḡ − G has the expected square of

    E‖Ḡ − G‖² = w (1 − w) E‖A − B‖²        w: A's share of the rows

So the error of one input's Gram matrix is √(w(1−w)) ‖A − B‖ / ‖Ḡ‖ (Frobenius norms), half the relative distance of
the halves, and the error of a collection the root of the mean square over all inputs. It falls like one over the root
of the number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merganser.collection.shards import Shard, ShardSums, Tally
from merganser.errors import UserError
from merganser.statistics import Statistics
from merganser.tensors import one_thread, packed_width

DEFAULT_TOLERANCE = 0.05
FIRST_CHECK = 128  # examples; fewer would say too much about each of them, too
GROWTH = 1.5  # examples at a check over those at the one before


def check_points(examples: int) -> list[int]:
    """After how many examples to look whether they are enough: growing geometrically, at last all of them."""
    points = []
    at = float(FIRST_CHECK)
    while at < examples:
        points.append(math.floor(at) // 2 * 2)  # halves of one size
        at *= GROWTH
    return [*points, examples]


def estimated_error(one: ShardSums, two: ShardSums) -> float:
    """The relative error of the Gram matrices of two independent halves together; infinite where one is empty."""
    if not one.shards or not two.shards:
        return math.inf
    with one_thread():
        squares = [_squared_error(*one.gram(input), *two.gram(input)) for input in one.inputs()]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _squared_error(a: Tensor, a_rows: int, b: Tensor, b_rows: int) -> float:
    """Of one input, from packed sums and their rows."""
    total = _squared_norm(a + b) / (a_rows + b_rows) ** 2
    distance = _squared_norm(a / a_rows - b / b_rows)
    share = a_rows / (a_rows + b_rows)
    return share * (1 - share) * distance / total if total else 0.0


def _squared_norm(packed: Tensor) -> float:
    """Of the symmetric matrix with this packed upper triangle: what is off the diagonal counts twice."""
    width = packed_width(packed.numel())
    row = torch.arange(width)
    diagonal = packed[row * width - row * (row - 1) // 2]
    return float(2 * packed.dot(packed) - diagonal.dot(diagonal))


@dataclass(frozen=True)
class StoppingRule:
    """When to stop before all examples have been seen.

    Attributes:
        tolerance: of the Gram matrices' relative error.
        seed: of the order of the examples.
        shard_examples: the most in a shard.
        fisher_examples: Fisher information from so many first examples of that order; None: from all that are seen.

    Raises:
        UserError: a tolerance that is not above 0 and below 1.
    """

    tolerance: float
    seed: int
    shard_examples: int
    fisher_examples: int | None

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            what = f"a tolerance of {self.tolerance:g} stops never, or at once"
            mend = f"give a relative error above 0 and below 1, such as {DEFAULT_TOLERANCE}"
            raise UserError(what, where="--until-converged", mend=mend)

    def run(self, examples: int, collect: Callable[[Shard], tuple[Statistics, Tally]]) -> tuple[ShardSums, Tally, str]:
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
