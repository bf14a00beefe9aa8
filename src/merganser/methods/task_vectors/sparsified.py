"""Task vectors δᵢ = θᵢ − θ₀ that lose numbers before they are added: what a whole family of methods has in common.

Such a method is two choices: how each δᵢ is made sparse, and how what is left is put together, as a weighted sum or by
the sign election of TIES (Yadav et al. 2023). Each is a function here, and :func:`sparsified` makes the method of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, sums_to_zero
from merganser.methods.elementwise import Elementwise, Position, Whole, added, fits_kernels, stacked

#: Of δ, its index among the contributors, the options and the position: what is left of δ, which may be changed.
Sparsify = Callable[[Tensor, int, Any, Position], Tensor]
Reduce = Callable[[Whole, Sequence[float], Any], Any]
#: What an election makes of sparse task vectors tᵢ, as a formula.
ELECTED = "θ₀ + s·Σcᵢtᵢ / Σcᵢ over the i whose tᵢ has the sign of Σcᵢtᵢ"


class TaskVectorOptions(Options):
    """Options that every method of this family has."""

    scale: float = Field(1.0, description="multiplier of the merged task vector")
    normalize: bool = Field(False, description="divide by the coefficients' sum, instead of adding the task vectors")


class ElectionOptions(TaskVectorOptions):
    """The same for a method with an election, which is a mean by default."""

    normalize: bool = Field(True, description="the mean of those that agree in sign, instead of their sum")


class RescalingOptions(Options):
    """The option of methods that choose what they keep by magnitude: nothing is scaled up unless asked for."""

    rescale: Literal["none", "l1"] = Field(
        "none", description="l1: what is kept of a tensor is scaled up to the sum of magnitudes before"
    )


def weighted_sum(kept: Iterator[Tensor], base: Tensor, coefficients: Sequence[float], normalize: bool) -> Tensor:
    """Σcᵢδᵢ, or that divided by Σcᵢ where it is not zero; shaped like ``base``."""
    total = torch.zeros_like(base)
    for delta, coefficient in zip(kept, coefficients, strict=True):
        total = added(total, delta, coefficient)
    return total.div_(sum(coefficients)) if normalize and not sums_to_zero(coefficients) else total


def elect(
    kept: Iterator[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    normalize: bool,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The weighted mean (or sum) of the δᵢ whose sign is that of Σcᵢδᵢ, number by number; where it is 0, positive.

    A negative coefficient stands for the negated δᵢ with the coefficient's magnitude.

    Args:
        kept: the δᵢ.
        base: what they are shaped like.
        coefficients: the cᵢ.
        normalize: the mean of those that agree, instead of their sum.
        weights: of the mean or the sum; by default the coefficients' magnitudes.
    """
    deltas, weights = list(kept), weights or [abs(coefficient) for coefficient in coefficients]
    if fits_kernels(*deltas):
        from merganser.methods import kernels

        numbers = [np.array(values, dtype=np.float32) for values in (coefficients, weights)]
        found = kernels.elect(stacked(deltas), *numbers, normalize)
        return torch.from_numpy(found).reshape(base.shape)
    elected = torch.zeros_like(base)
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        elected = added(elected, delta, coefficient)
    agreed, counted = torch.zeros_like(elected), torch.zeros_like(elected)
    sign = elected.ge_(0).mul_(2).sub_(1)
    for delta, coefficient, weight in zip(deltas, coefficients, weights, strict=True):
        along = sign * delta  # in place, comparisons give 0 and 1 as numbers
        counts = (along.lt_(0) if coefficient < 0 else along.gt_(0)).mul_(weight)
        counted += counts
        agreed.addcmul_(counts, delta.to(sign.dtype), value=-1 if coefficient < 0 else 1)
    return agreed.div_(counted.clamp_min_(torch.finfo(counted.dtype).tiny)) if normalize else agreed


@dataclass(frozen=True)
class _Found:
    """What is known of the whole tensor.

    Attributes:
        whole: what the method's own ``reduce`` found.
        factors: of each δᵢ, what is left of it is multiplied by this.
    """

    whole: Any = None
    factors: Sequence[float] | None = None


def sparsified(
    *,
    sparsify: Sparsify,
    election: bool,
    options: TaskVectorOptions,
    reduce: Reduce | None = None,
    by_rows: bool = False,
    weighted: Callable[[Sequence[float], Any], list[float]] | None = None,
    thresholds: int = 0,
    **words: Any,
) -> Elementwise:
    """A method of this family.

    Args:
        sparsify: what is left of a task vector.
        election: put together by :func:`elect`, instead of :func:`weighted_sum`.
        options: of the method; where there is an option ``rescale`` and it is ``"l1"``, what is left of a tensor's
            task vector is multiplied so that its magnitudes sum to what they were before.
        reduce, by_rows, weighted, thresholds: see :class:`~merganser.methods.elementwise.Elementwise`.
        words: name, title, summary, formula and reference.
    """
    together = elect if election else weighted_sum

    def known(whole: Whole, coefficients: Sequence[float], options: Any) -> _Found:
        found = reduce(whole, coefficients, options) if reduce else None
        if getattr(options, "rescale", None) != "l1":
            return _Found(found)
        return _Found(found, _l1_factors(whole, sparsify, options, found))

    def function(
        base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: Any, position: Position
    ) -> Tensor:
        found = position.whole or _Found()
        here = replace(position, whole=found.whole)
        kept = (sparsify(delta, index, options, here) for index, delta in enumerate(deltas))
        if found.factors is not None:
            kept = (delta.mul_(factor) for delta, factor in zip(kept, found.factors, strict=True))
        return together(kept, base, coefficients, options.normalize)

    needs = Needs(base=True, signed=True, normalised=False)
    rescales = "rescale" in type(options).model_fields
    looks = known if reduce or rescales else None
    return Elementwise(
        **words,
        needs=needs,
        options=options,
        function=function,
        reduce=looks,
        by_rows=by_rows,
        weighted=weighted,
        thresholds=thresholds,
    )


def _l1_factors(whole: Whole, sparsify: Sparsify, options: Any, found: Any) -> list[float]:
    """Of each δᵢ, Σ|δᵢ| over the sum of what is left of it; 1 where nothing is left."""
    before, after = ([0.0] * len(whole.shares) for _ in range(2))
    for start, stop, deltas in whole.blocks():
        position = replace(whole.position(start, stop), whole=found)
        for index, delta in enumerate(deltas):
            before[index] += _l1(delta)
            after[index] += _l1(sparsify(delta, index, options, position))
    return [first / last if last > 0 else 1.0 for first, last in zip(before, after, strict=True)]


def _l1(tensor: Tensor) -> float:
    return float(tensor.abs().sum(dtype=torch.float64))
