"""Is a method better than another, on the same units: a paired sign-flip test, and Holm's correction.

Under the null hypothesis that the two methods are interchangeable, each unit's difference is as likely with the
other sign. The p-value is the share of all 2ⁿ sign assignments whose mean is at least as far from zero as the one
that was seen (two-sided); past ``EXACT`` units a fixed number of seeded assignments stands for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merganser.lab.report.ties import PairCounts, sign, tally

#: Up to this many differences other than zero all assignments are counted.
EXACT = 18
SAMPLES = 100_000
SEED = 20230501
#: Marker → the adjusted p-value that it needs, the strongest first.
MARKERS = (("**", 0.01), ("*", 0.05))


@dataclass(frozen=True)
class Paired:
    """A comparison over ``n`` units: their mean difference, how many are above, below and tied, and p."""

    n: int
    difference: float
    counts: PairCounts
    p: float
    adjusted: float = 1.0

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
    # Sums of another order differ in the last bits.
    floor = abs(nonzero.sum()) - 1e-12 * max(1.0, np.abs(nonzero).sum())
    if len(nonzero) <= EXACT:
        sums = np.zeros(1)
        for value in nonzero:
            sums = np.concatenate([sums + value, sums - value])
        p = float((np.abs(sums) >= floor).mean())
    else:
        generator = np.random.default_rng(SEED)
        hits = 0
        for _ in range(SAMPLES // 10_000):
            signs = generator.integers(0, 2, (10_000, len(nonzero)), np.int8) * 2.0 - 1.0
            hits += int((np.abs(signs @ nonzero) >= floor).sum())
        p = (hits + 1) / (SAMPLES + 1)
    return Paired(len(values), float(values.mean()), tally(differences), p)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(np.arange(len(ps), 0, -1) * np.asarray(ps)[order])
    return [min(1.0, p) for p in adjusted.tolist()]
