"""Metrics of two Kronecker factors, what an error costs on a layer's inputs and what on its outputs, and their sums.

A sum of such metrics is no metric of two factors, so that conjugate gradients have to solve it; and its eigenvalues are
products of those of both factors, so that plain ones take hundreds of steps. In the eigenvectors of the summed inputs'
and of the summed outputs' factors (George et al. 2018, arXiv 1806.03884) the sum is nearly diagonal. Its diagonal there
is known exactly, and with it as a preconditioner a few steps are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.blas import add_product_, eigh_
from merganser.methods.metrics import Operator
from merganser.methods.sums import NOISE
from merganser.tensors import roomy_empty

_NARROW = 512  # inputs and outputs up to which float64 costs nothing that matters
_SMALLEST = 1e-12  # of the largest number of the preconditioner, so that it can be divided by


@dataclass(frozen=True)
class Kronecker(Operator):
    """The metric Δ ↦ size · BΔA, both factors with a mean of 1 on their diagonals.

    Attributes:
        outputs: B (out, out), symmetric positive semi-definite.
        inputs: A (in, in), likewise.
        size: the product of what the factors' diagonals had as means; zero where one of them is zero.
    """

    outputs: Tensor
    inputs: Tensor
    size: float = 1.0
    mean_diagonal: float | None = 1.0

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the factors."""
        return self.outputs.dtype

    def apply(self, difference: Tensor) -> Tensor:
        """BΔA."""
        height, width = difference.shape
        half, whole = (roomy_empty(height, width, difference).zero_() for _ in range(2))
        add_product_(half, self.outputs, difference)
        return add_product_(whole, half, self.inputs)


def kronecker(outputs: Tensor, inputs: Tensor, size: float) -> Kronecker:
    """The metric of two factors with a mean diagonal of 1, in float32 where one of them is wide."""
    dtype = torch.float32 if max(len(outputs), len(inputs)) > _NARROW else torch.float64
    return Kronecker(outputs.to(dtype), inputs.to(dtype), size)


def normalised(matrix: Tensor, alpha: float, damping: float = 0.0) -> tuple[Tensor, float]:
    """A factor, its off-diagonals shrunk and its diagonal raised, with a mean of 1 on the diagonal; and what it was.

    What is read in float32 has eigenvalues below zero by rounding. Each number of the diagonal is raised by that much,
    as where RegMean's systems are nearly singular.
    """
    diagonal = matrix.diagonal().to(torch.float64)
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.zeros_like(matrix, dtype=torch.float64), 0.0
    raised = 1.0 + (NOISE * len(matrix) ** 0.5 * torch.finfo(torch.float32).eps if matrix.dtype == torch.float32 else 0)
    whole = mean * (raised + damping)
    scaled = matrix.to(torch.float64) * (alpha / whole)
    scaled.diagonal().copy_((diagonal * raised + damping * mean) / whole)
    return scaled, whole


def joint_eigenbases(terms: Sequence[tuple[float, Kronecker]], pull: float) -> Callable[[Tensor], Tensor]:
    """What comes near the inverse of Σ weight · B ⊗ A + pull: its diagonal in the eigenvectors of ΣB and ΣA.

    Exact for one contributor, for factors that commute, and where all contributors have the same A or the same B.

    Args:
        terms: weights of at least 0 and metrics, at least one.
        pull: λ.
    """
    left, right = (
        _eigenvectors([(weight, factor(metric)) for weight, metric in terms]) for factor in (_outputs, _inputs)
    )
    diagonal = roomy_empty(len(left), len(right), left).fill_(pull)
    for weight, metric in terms:
        diagonal.addr_(_diagonal(left, metric.outputs), _diagonal(right, metric.inputs), alpha=weight)
    diagonal.clamp_(min=float(diagonal.max()) * _SMALLEST)
    left_back, right_back = left.T.contiguous(), right.T.contiguous()

    def near(residual: Tensor) -> Tensor:
        turned = _product(_product(left, residual), right_back).div_(diagonal)
        return _product(_product(left_back, turned), right)

    return near


def _outputs(metric: Kronecker) -> Tensor:
    return metric.outputs


def _inputs(metric: Kronecker) -> Tensor:
    return metric.inputs


def _eigenvectors(factors: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Those of a weighted sum, as rows."""
    width = len(factors[0][1])
    total = roomy_empty(width, width, factors[0][1]).zero_()
    for weight, factor in factors:
        total.add_(factor, alpha=weight)
    eigh_(total)
    return total


def _diagonal(vectors: Tensor, factor: Tensor) -> Tensor:
    """vᵀFv of each row v; rounding leaves none below zero."""
    return _product(vectors, factor).mul_(vectors).sum(1).clamp_(min=0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return add_product_(roomy_empty(len(left), right.shape[1], left).zero_(), left, right)
