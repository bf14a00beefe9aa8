"""A merge is a weighted least-squares problem, θ* = argmin Σᵢ cᵢ‖θ − θᵢ‖²_Mᵢ + λ‖θ − θ̄‖²; here with diagonal metrics.

:mod:`merganser.methods.sums` solves it for Gram matrices. Every solution is written as the weighted average
θ̄ = Σcᵢθᵢ/Σcᵢ plus a correction computed from the differences θᵢ − θ̄. So the ridge λ pulls toward the average and never
toward zero, merging a model with itself returns it, and what rounding does is in proportion to how much the
contributors differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merganser.methods.sums import Solution


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
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    metrics: Sequence[Tensor],
    ridge: float,
    mean: float | None = None,
) -> Solution:
    """Elementwise solution for diagonal metrics: θ̄ + Σcᵢmᵢ(θᵢ − θ̄) / (Σcᵢmᵢ + λ), λ = ridge · mean(Σcᵢmᵢ).

    Where all metrics are zero, the weighted average.

    Args:
        tensors: n tensors of one shape.
        coefficients: n non-negative numbers, not all zero.
        metrics: n non-negative tensors, broadcastable to that shape.
        ridge: pull toward the average, relative to the mean of the summed metric.
        mean: that mean, where these are some rows only of a larger tensor.
    """
    average = weighted_average(tensors, coefficients)
    weight = torch.zeros((), dtype=torch.float64)
    correction = torch.zeros_like(average)
    for tensor, coefficient, metric in zip(tensors, coefficients, metrics, strict=True):
        scaled = metric.to(torch.float64) * coefficient
        weight = weight + scaled
        correction += scaled * (tensor.to(torch.float64) - average)
    weight = weight + ridge * (weight.mean() if mean is None else mean)
    return Solution(average + torch.where(weight > 0, correction / weight.clamp_min(1e-300), 0.0))
