"""Task vectors δᵢ = θᵢ − θ₀ that lose numbers before they are added: what a whole family of methods has in common.

Such a method is two choices: how each δᵢ is made sparse, and how what is left is put together, as a weighted sum or by
the sign election of TIES (Yadav et al. 2023). Each is a function here, and :func:`sparsified` makes the method of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, sums_to_zero
from merganser.methods.elementwise import Elementwise, Position, Whole, added

#: Of δ, its index among the contributors, the options and the position: what is left of δ, which may be changed.
Sparsify = Callable[[Tensor, int, Any, Position], Tensor]


class TaskVectorOptions(Options):
    """Options that every method of this family has."""

    scale: float = Field(1.0, description="multiplier of the merged task vector")
    normalize: bool = Field(False, description="divide by the coefficients' sum, instead of adding the task vectors")


class ElectionOptions(TaskVectorOptions):
    """The same for a method with an election, which is a mean by default."""

    normalize: bool = Field(True, description="the mean of those that agree in sign, instead of their sum")


def weighted_sum(kept: Iterator[Tensor], base: Tensor, coefficients: Sequence[float], normalize: bool) -> Tensor:
    """Σcᵢδᵢ, or that divided by Σcᵢ where it is not zero; shaped like ``base``."""
    total = torch.zeros_like(base)
    for delta, coefficient in zip(kept, coefficients, strict=True):
        total = added(total, delta, coefficient)
    return total.div_(sum(coefficients)) if normalize and not sums_to_zero(coefficients) else total


def elect(kept: Iterator[Tensor], base: Tensor, coefficients: Sequence[float], normalize: bool) -> Tensor:
    """The weighted mean (or sum) of the δᵢ whose sign is that of Σcᵢδᵢ, number by number; where it is 0, positive.

    A negative coefficient stands for the negated δᵢ with the coefficient's magnitude.
    """
    deltas = []
    elected = torch.zeros_like(base)
    for delta, coefficient in zip(kept, coefficients, strict=True):
        elected = added(elected, delta, coefficient)
        deltas.append(delta.neg_() if coefficient < 0 else delta)
    sign = torch.copysign(torch.ones_like(elected), elected)
    agreed, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for coefficient, delta in zip(map(abs, coefficients), deltas, strict=True):
        delta = delta.mul(sign) if delta.dtype != sign.dtype else delta.mul_(sign)
        agreed.add_(delta.clamp_min_(0), alpha=coefficient)
        if normalize:
            weight.add_(delta.sign_(), alpha=coefficient)
    if normalize:
        agreed.div_(weight.clamp_min_(torch.finfo(weight.dtype).tiny))
    return agreed.mul_(sign)


def sparsified(
    *,
    sparsify: Sparsify,
    election: bool,
    options: TaskVectorOptions,
    reduce: Callable[[Whole, Sequence[float], Any], Any] | None = None,
    by_rows: bool = False,
    **words: Any,
) -> Elementwise:
    """A method of this family.

    Args:
        sparsify: what is left of a task vector.
        election: put together by :func:`elect`, instead of :func:`weighted_sum`.
        options: of the method.
        reduce, by_rows: see :class:`~merganser.methods.elementwise.Elementwise`.
        words: name, title, summary, formula and reference.
    """
    together = elect if election else weighted_sum

    def function(
        base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: Any, position: Position
    ) -> Tensor:
        kept = (sparsify(delta, index, options, position) for index, delta in enumerate(deltas))
        return together(kept, base, coefficients, options.normalize)

    needs = Needs(base=True, signed=True, normalised=False)
    return Elementwise(**words, needs=needs, options=options, function=function, reduce=reduce, by_rows=by_rows)
