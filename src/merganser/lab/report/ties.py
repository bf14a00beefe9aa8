"""When two scores are tied: the one rule that every comparison of a report goes by.

Two scores are tied where their difference prints as 0.0. A smaller difference is either noise of floating-point
arithmetic, such as a correlation that differs in the seventh digit, or nothing that a reader of the tables can see.
All scores here are in points (× 100).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

#: Differences below this many points print as 0.0.
TIE = 0.05
#: The rule, as captions say it.
RULE = f"less than {TIE} points apart"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class PairCounts:
    """How many differences are above zero, below zero, and neither."""

    above: int
    below: int
    tied: int


def sign(difference: float) -> int:
    """1 above zero, −1 below, 0 for a tie."""
    if abs(_clean(difference)) < TIE:
        return 0
    return 1 if difference > 0 else -1


def signed(difference: float) -> str:
    """A difference with its sign and one decimal; that of a tie is 0.0, without a sign."""
    return f"{_clean(difference):+.1f}".replace("-", "−") if sign(difference) else "0.0"


def _clean(difference: float) -> float:
    """Sums of another order differ in the last bits, which must not decide what is a tie."""
    return round(difference, 9)


def tally(differences: Iterable[float]) -> PairCounts:
    """How many differences are on each side of zero."""
    signs = [sign(difference) for difference in differences]
    return PairCounts(signs.count(1), signs.count(-1), signs.count(0))


def leaders(scores: Mapping[Key, float]) -> list[Key]:
    """Whoever has the highest score, and everybody who is tied with it."""
    highest = max(scores.values(), default=0.0)
    return [key for key, score in scores.items() if not sign(highest - score)]


def and_tied(count: int) -> str:
    """``, 2 tied``, to stand behind other counts; nothing where nothing is tied."""
    return f", {count} tied" if count else ""
