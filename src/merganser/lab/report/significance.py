"""Is a method better than another, on the same units: a paired sign-flip test, and Holm's correction.

Under the null hypothesis that the two methods are interchangeable, each unit's difference is as likely with the
other sign. The p-value is the share of all 2ⁿ sign assignments whose mean is at least as far from zero as the one
that was seen (two-sided); past ``EXACT`` units a fixed number of seeded assignments stands for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merganser.lab.report.ties import sign, tally

#: Up to this many differences other than zero all assignments are counted.
EXACT = 18
SAMPLES = 100_000
SEED = 20230501
#: Marker → the adjusted p-value that it needs, the strongest first.
MARKERS = (("**", 0.01), ("*", 0.05))


@dataclass(frozen=True)
class Paired:
    """A comparison over ``n`` units: their mean difference, how many are above and below zero (the others are tied),
    and p."""

    n: int
    difference: float
    above: int
    below: int
    p: float
    exact: bool
    adjusted: float = 1.0

    @property
    def tied(self) -> int:
        """How many units are neither above nor below."""
        return self.n - self.above - self.below

    @property
    def marker(self) -> str:
        """``**``, ``*`` or nothing, by the adjusted p-value; nothing where the mean is a tie, however regular."""
        if not sign(self.difference):
            return ""
        return next((marker for marker, level in MARKERS if self.adjusted < level), "")


def sign_flip(differences: Sequence[float]) -> Paired:
    """The two-sided paired sign-flip test of a mean of zero.

    The test takes the differences as they are: one that counts as a tie has next to no weight in their sum.

    Args:
        differences: one number of points a unit, at least one.
    """
    values = np.asarray(differences, np.float64)
    nonzero = values[values != 0]
    seen = abs(nonzero.sum())
    floor = seen - 1e-12 * max(1.0, np.abs(nonzero).sum())  # sums of another order differ in the last bits
    exact = len(nonzero) <= EXACT
    if not len(nonzero):
        p = 1.0
    elif exact:
        p = float((np.abs(_all_sums(nonzero)) >= floor).mean())
    else:
        generator = np.random.default_rng(SEED)
        hits = 0
        for _ in range(SAMPLES // 10_000):
            signs = generator.integers(0, 2, (10_000, len(nonzero)), np.int8) * 2.0 - 1.0
            hits += int((np.abs(signs @ nonzero) >= floor).sum())
        p = (hits + 1) / (SAMPLES + 1)
    counts = tally(differences)
    return Paired(
        n=len(values), difference=float(values.mean()), above=counts.above, below=counts.below, p=p, exact=exact
    )


def _all_sums(values: np.ndarray) -> np.ndarray:
    """The sums under every assignment of signs: float64 (2ⁿ,)."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted
