"""The one solver: a merge is a weighted least-squares problem, θ* = argmin Σᵢ cᵢ‖θ − θᵢ‖²_Mᵢ + λ‖θ − θ̄‖².

Every solution is written as the weighted average θ̄ = Σcᵢθᵢ/Σcᵢ plus a correction computed from the differences
θᵢ − θ̄. So the ridge λ pulls toward the average and never toward zero, merging a model with itself returns it, and
what rounding does is in proportion to how much the contributors differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A pivot of the equilibrated matrix below this multiple of √d·eps(float32) is rounding noise: Grams are stored so.
_NOISE = 4.0


@dataclass(frozen=True)
class Solution:
    """A merged tensor and what had to be done to get it.

    Attributes:
        value: float64, shaped like the contributors' tensors.
        note: a stated ridge that a nearly singular system needed; None where none was.
    """

    value: Tensor
    note: str | None = None


def weighted_average(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """θ̄ = Σcᵢθᵢ / Σcᵢ in float64.

    Args:
        tensors: n tensors of one shape.
        coefficients: n numbers whose sum is not zero.
    """
    total = float(sum(coefficients))
    mean = tensors[0].to(torch.float64) * (coefficients[0] / total)
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        mean += tensor.to(torch.float64) * (coefficient / total)
    return mean


def solve_diagonal(
    tensors: Sequence[Tensor], coefficients: Sequence[float], metrics: Sequence[Tensor], ridge: float
) -> Solution:
    """Elementwise solution for diagonal metrics: θ̄ + Σcᵢmᵢ(θᵢ − θ̄) / (Σcᵢmᵢ + λ), λ = ridge · mean(Σcᵢmᵢ).

    Where all metrics are zero, the weighted average.

    Args:
        tensors: n tensors of one shape.
        coefficients: n non-negative numbers, not all zero.
        metrics: n non-negative tensors, broadcastable to that shape.
        ridge: pull toward the average, relative to the mean of the summed metric.
    """
    average = weighted_average(tensors, coefficients)
    weight = torch.zeros((), dtype=torch.float64)
    correction = torch.zeros_like(average)
    for tensor, coefficient, metric in zip(tensors, coefficients, metrics, strict=True):
        scaled = metric.to(torch.float64) * coefficient
        weight = weight + scaled
        correction += scaled * (tensor.to(torch.float64) - average)
    weight = weight + ridge * weight.mean()
    return Solution(average + torch.where(weight > 0, correction / weight.clamp_min(1e-300), 0.0))


def solve_gram(
    tensors: Sequence[Tensor], coefficients: Sequence[float], grams: Iterable[Tensor], ridge: float
) -> Solution:
    """RegMean's solution (Jin et al. 2023, eq. 2) with a ridge: W̄ + (Σcᵢ(Wᵢ − W̄)Gᵢ)(ΣcᵢGᵢ + λI)⁻¹.

    λ = ridge · tr(ΣcᵢGᵢ)/d. The system is equilibrated by its diagonal and factored by Cholesky in float64. Where a
    pivot is no larger than the rounding of Grams kept in float32, the directions below it carry no information; a
    ridge of that size on the equilibrated diagonal sends them to the average, and the note states it.

    Args:
        tensors: n weights, (out, in).
        coefficients: n non-negative numbers, not all zero.
        grams: n symmetric positive semi-definite matrices, (in, in); taken one at a time.
        ridge: pull toward the average, relative to the mean of the diagonal.

    Raises:
        ValueError: the summed Gram matrix is not positive semi-definite.
    """
    average = weighted_average(tensors, coefficients)
    width = average.shape[1]
    system = torch.zeros(width, width, dtype=torch.float64)
    right = torch.zeros_like(average)
    for tensor, coefficient, gram in zip(tensors, coefficients, grams, strict=True):
        if coefficient == 0:
            continue
        wide = gram.to(torch.float64)
        system.add_(wide, alpha=coefficient)
        right.addmm_(tensor.to(torch.float64) - average, wide, alpha=coefficient)
    diagonal = system.diagonal()
    if not bool((diagonal > 0).any()):
        return Solution(average, "every Gram matrix is zero: the average")
    diagonal.add_(ridge * diagonal.mean())
    # An input that is always zero constrains nothing: unit diagonal, zero right-hand side, hence the average.
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    system.mul_(scale[:, None]).mul_(scale[None, :])
    diagonal.masked_fill_(diagonal <= 0, 1.0)
    factor, note = _factor(system)
    correction = torch.cholesky_solve((right * scale).T, factor).T * scale
    return Solution(average + correction, note)


def _factor(system: Tensor) -> tuple[Tensor, str | None]:
    """Cholesky factor of an equilibrated matrix (unit diagonal), with a stated ridge where it is nearly singular."""
    width = system.shape[0]
    floor = _NOISE * width**0.5 * torch.finfo(torch.float32).eps
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed) == 0 and float(factor.diagonal().min()) ** 2 > floor:
        return factor, None
    for ridge in (floor, 100 * floor):
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed) == 0:
            return factor, f"nearly singular: ridge of {ridge:.1e} on the equilibrated diagonal"
    raise ValueError("the sum of the Gram matrices is not positive semi-definite")
