"""Task vectors δᵢ = θᵢ − θ₀, transformed before they are added to the base model.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): θ₀ + s Σ cᵢδᵢ.
TIES (Yadav et al. 2023, arXiv 2306.01708): each δᵢ keeps the share of its numbers that are largest in magnitude,
tensor by tensor and at least one number; a number's sign is that of the weighted sum; θ₀ + s · the weighted mean of the
δᵢ that have this sign. A negative coefficient stands for the negated task vector with the coefficient's magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor, prod

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, Position, Reader, added
from merganser.methods.selection import kth_largest


class TaskArithmeticOptions(Options):
    """Options of :data:`TASK_ARITHMETIC`."""

    scale: float = Field(0.4, description="multiplier of the summed task vectors")


def _sum(
    base: Tensor,
    deltas: Iterator[Tensor],
    coefficients: Sequence[float],
    options: TaskArithmeticOptions,
    position: Position,
) -> Tensor:
    total = torch.zeros_like(base)
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        total = added(total, delta, coefficient)
    return total


TASK_ARITHMETIC = Elementwise(
    name="task_arithmetic",
    title="Task arithmetic",
    summary="base model plus a multiple of the summed differences from it",
    needs=Needs(base=True, signed=True, normalised=False),
    options=TaskArithmeticOptions.model_validate({}),
    function=_sum,
)


class TIESOptions(Options):
    """Options of :data:`TIES`."""

    density: float = Field(0.2, gt=0, le=1, description="share of each task vector that is kept")
    scale: float = Field(1.0, description="multiplier of the merged task vector")


def _thresholds(
    read: Reader, shape: tuple[int, ...], coefficients: Sequence[float], options: TIESOptions
) -> list[float]:
    """Each contributor's threshold: the smallest magnitude that is kept."""
    height, keep = shape[0] if shape else 1, min(prod(shape), max(1, floor(options.density * prod(shape))))

    def magnitudes(start: int, stop: int) -> list[Tensor]:
        return [delta.abs_().to(torch.float32) for delta in read(start, stop)]

    return kth_largest(magnitudes, height, prod(shape) // max(height, 1), keep, len(coefficients))


def _elect(
    base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: TIESOptions, position: Position
) -> Tensor:
    """Trim, elect signs, and average what agrees."""
    trimmed = []
    elected = torch.zeros_like(base)
    for delta, coefficient, threshold in zip(deltas, coefficients, position.whole, strict=True):
        # What is above the number before the threshold is at least the threshold.
        kept = torch.hardshrink(delta, _before(threshold, delta.dtype))
        elected = added(elected, kept, coefficient)
        trimmed.append(kept.neg_() if coefficient < 0 else kept)
    sign = torch.copysign(torch.ones_like(elected), elected)  # positive where they cancel out
    agreed, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for coefficient, delta in zip(map(abs, coefficients), trimmed, strict=True):
        delta = delta.mul(sign) if delta.dtype != sign.dtype else delta.mul_(sign)
        agreed.add_(delta.clamp_min_(0), alpha=coefficient)
        weight.add_(delta.sign_(), alpha=coefficient)
    return agreed.div_(weight.clamp_min_(torch.finfo(weight.dtype).tiny)).mul_(sign)


TIES = Elementwise(
    name="ties",
    title="TIES",
    summary="base model plus the mean of the large differences that agree in sign",
    needs=Needs(base=True, signed=True, normalised=False),
    options=TIESOptions.model_validate({}),
    function=_elect,
    reduce=_thresholds,
)


def _before(threshold: float, dtype: torch.dtype) -> float:
    """The largest float32 number below a threshold; negative below 0, so that everything is above it."""
    if threshold == 0:
        return -1.0
    return torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()
