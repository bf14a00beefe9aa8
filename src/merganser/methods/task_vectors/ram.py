"""RAM and RAM+ (Yuan et al. 2026, arXiv 2601.13572): for models that reinforcement learning has changed here and there.

A number that several contributors have changed gets the mean of their changes; one that a single contributor has
changed, its change. RAM+ enlarges the latter by 1 + r·min(ρᵢ, α), where ρᵢ is how many of contributor i's changed
numbers others have changed, too, over how many none has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, Position, Whole, added


class RAMOptions(Options):
    """Options of :data:`RAM`."""

    epsilon: float = Field(1e-5, ge=0, description="a number has changed where it differs from the base's by more")
    scale: float = Field(1.0, description="multiplier of the merged task vector")


class RAMPlusOptions(RAMOptions):
    """Options of :data:`RAM_PLUS`."""

    r: float = Field(0.1, ge=0, description="how much of the ratio of shared to single changes is added to the latter")
    alpha: float = Field(0.2, ge=0, description="the largest ratio that counts")


def _factors(whole: Whole, coefficients: Sequence[float], options: RAMPlusOptions) -> list[float]:
    """By how much each contributor's single changes are enlarged."""
    shared, single = ([0] * len(coefficients) for _ in range(2))
    for _, _, deltas in whole.blocks():
        changed = [delta.abs_() > options.epsilon for delta in deltas]
        several = torch.stack(changed).sum(0) > 1
        for index, mask in enumerate(changed):
            both = int(torch.count_nonzero(mask & several))
            shared[index] += both
            single[index] += int(torch.count_nonzero(mask)) - both
    return [1 + options.r * min(s / max(u, 1), options.alpha) for s, u in zip(shared, single, strict=True)]


def _merge(
    base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: RAMOptions, position: Position
) -> Tensor:
    """The weighted mean of the changes there are; a negative coefficient stands for the negated change."""
    factors = position.whole or [1.0] * len(coefficients)
    total, single = torch.zeros_like(base), torch.zeros_like(base)
    weight, count = torch.zeros_like(base), torch.zeros_like(base)
    for delta, coefficient, factor in zip(deltas, coefficients, factors, strict=True):
        changed = delta.abs().gt_(options.epsilon)
        delta = delta.mul_(changed)
        total, single = added(total, delta, coefficient), added(single, delta, coefficient * factor)
        weight, count = added(weight, changed, abs(coefficient)), added(count, changed, 1.0)
    merged = torch.where(count == 1, single, total)
    return merged.div_(weight.clamp_min_(torch.finfo(weight.dtype).tiny))


_NEEDS = Needs(base=True, signed=True, normalised=False)
_REFERENCE = "Yuan et al. 2026, arXiv 2601.13572"

RAM = Elementwise(
    name="ram",
    title="RAM",
    summary="base model plus, number by number, the mean of the changes of those who have changed it",
    formula="θ₀ + s·Σcᵢδᵢ / Σcᵢ over the i with |δᵢ| > ε",
    reference=_REFERENCE,
    needs=_NEEDS,
    options=RAMOptions.model_validate({}),
    function=_merge,
)

RAM_PLUS = Elementwise(
    name="ram_plus",
    title="RAM+",
    summary="as RAM, with changes that only one contributor has made enlarged",
    formula="θ₀ + s·Σcᵢδᵢ / Σcᵢ over the i with |δᵢ| > ε, times 1 + r·min(ρᵢ, α) where it is one",
    reference=_REFERENCE,
    needs=_NEEDS,
    options=RAMPlusOptions.model_validate({}),
    function=_merge,
    reduce=_factors,
    thresholds=0,
)
