"""Sums that forget nothing: two float64 numbers an entry, so that what was added can be taken away again.

A sum is ``high + low`` with ``high`` the sum rounded to float64 and ``low`` the rest: 106 bits. Error-free
transformations (Knuth's two-sum, Dekker's fast two-sum) keep the rounding error of every addition. Adding a term and
subtracting it leaves an error near 2⁻¹⁰⁶ of the larger, where plain float64 would leave 2⁻⁵³: too much for a system
whose inverse amplifies it, and not the zero that an input needs which only a removed contributor had seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 15  # entries at a time: temporaries stay in the cache


def accumulate(high: Tensor, low: Tensor, term: Tensor, rest: Tensor | None = None) -> None:
    """Add ``term + rest`` to ``high + low`` in place.

    Args:
        high: contiguous float64, any shape.
        low: like it; at most half a unit in the last place of ``high``.
        term: float64 of that shape.
        rest: the low part of ``term``, where it is a sum itself; zero by default.
    """
    rows = [tensor.reshape(-1).split(_BLOCK) for tensor in (high, low, term)]
    rests = [None] * len(rows[0]) if rest is None else rest.reshape(-1).split(_BLOCK)
    for a, a_low, b, b_low in zip(*rows, rests, strict=True):
        total, error = _two_sum(a, b)
        if b_low is None:
            error += a_low
        else:
            small, smaller = _two_sum(a_low, b_low)
            total, error = _fast_two_sum(total, error.add_(small))
            error += smaller
        total, error = _fast_two_sum(total, error)
        a.copy_(total)
        a_low.copy_(error)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and exactly what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)).add_(b - part)


def _fast_two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same where |a| ≥ |b|."""
    total = a + b
    return total, torch.sub(b, total - a)
