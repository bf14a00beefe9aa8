"""What errors cost: the metrics of least squares, and the solution for those that are known by what they do alone.

The solutions for diagonal metrics and for Gram matrices are in :mod:`merganser.methods.least_squares` and
:mod:`merganser.methods.sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merganser.methods.sums import Solution

STEPS = 2000  # of conjugate gradients, at most
_TOLERANCE = 1e-10  # of them, relative to the first residual
_SINGLE_TOLERANCE = 1e-5  # the same in float32
_INDEFINITE = 1e-3  # of the largest curvature that was met: one as negative is not of rounding


class Metric:
    """What a contributor's errors in one parameter cost: ‖Δ‖²_M = ⟨Δ, M(Δ)⟩, M linear, symmetric, not negative.

    The solver has a way of its own for each of the three forms below, and conjugate gradients for any other one.
    """


class Identity(Metric):
    """Every number costs the same: the weighted average."""


@dataclass(frozen=True)
class Diagonal(Metric):
    """Each number has its own cost.

    Attributes:
        values: non-negative, broadcastable to the parameter.
    """

    values: Tensor


@dataclass(frozen=True)
class Gram(Metric):
    """Each output costs what its error does on the layer's inputs.

    Attributes:
        matrix: (in, in), symmetric positive semi-definite.
    """

    matrix: Tensor


class Operator(Metric):
    """Any other metric, by what it does, such as one of Kronecker factors.

    Attributes:
        dtype: that it is applied in.
        size: a number that M is a multiple of, so that what is applied overflows nothing and vanishes nowhere.
        mean_diagonal: of M/size, where it is known; None: it is estimated where it is asked for.
    """

    dtype: torch.dtype = torch.float64
    size: float = 1.0
    mean_diagonal: float | None = None

    def apply(self, difference: Tensor) -> Tensor:
        """M(Δ)/size, for Δ shaped like the parameter; a weight is (out, in), with the bias as one more column."""
        raise NotImplementedError


#: Of metrics with their weights, and λ: a function that comes near the inverse of Σ weight · M + λ.
Preconditioner = Callable[[Sequence[tuple[float, Any]], float], Callable[[Tensor], Tensor]]


def solve_iteratively(
    tensors: Iterable[Tensor],
    coefficients: Sequence[float],
    metrics: Sequence[Operator],
    ridge: float,
    *,
    start: Tensor | None = None,
    steps: int = STEPS,
    precondition: Preconditioner | None = None,
) -> Solution:
    """Solution for metrics of any form, by conjugate gradients (Hestenes & Stiefel 1952) in the metrics' dtype.

    R + X with Σcᵢ Mᵢ(X) + λ(X − X̄) = Σcᵢ Mᵢ(θᵢ − R), R the first tensor, X̄ = Σcᵢ(θᵢ − R)/Σcᵢ. λ is ridge times the
    mean of the summed metric's diagonal. Where that is not known, it is estimated by one random vector of signs
    (Hutchinson 1990), always the same.

    Args:
        tensors: n tensors of one shape, which are asked for one after the other.
        coefficients: n non-negative numbers, not all zero.
        metrics: n of them.
        ridge: pull toward the average.
        start: of that shape, where to start; None: at the average.
        steps: the most.
        precondition: see :attr:`LeastSquares.precondition`.

    Raises:
        ValueError: the metrics are not positive semi-definite.
    """
    dtype = torch.float64 if any(metric.dtype == torch.float64 for metric in metrics) else torch.float32
    largest = max(coefficients)  # steps that end early amplify rounding: the same ratios are to give the same numbers
    coefficients = [coefficient / largest for coefficient in coefficients]
    sizes = [coefficient * metric.size for coefficient, metric in zip(coefficients, metrics, strict=True)]
    whole, total = float(sum(sizes)), float(sum(coefficients))
    terms = [(size / whole, metric) for size, metric in zip(sizes, metrics, strict=True) if size > 0]

    def summed(direction: Tensor) -> Tensor:
        image = torch.zeros_like(direction)
        for weight, metric in terms:
            image.add_(metric.apply(direction), alpha=weight)
        return image

    reference: Tensor | None = None
    for tensor, coefficient, size, metric in zip(tensors, coefficients, sizes, metrics, strict=True):
        if reference is None:
            reference = tensor
            average, residual = (torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for _ in range(2))
            continue
        difference = (tensor.to(torch.float64) - reference).to(dtype)
        average.add_(difference, alpha=coefficient / total)
        if size > 0:
            residual.add_(metric.apply(difference), alpha=size / whole)
    if reference is None:
        raise ValueError("there is no contributor to solve for")
    if not terms:
        return Solution(reference + average, "every metric is zero: the average")
    solution = average.clone() if start is None else (start.to(torch.float64) - reference).to(dtype)
    pull = ridge * _mean_diagonal(terms, summed, average) if ridge else 0.0
    residual.sub_(summed(solution)).add_(average - solution, alpha=pull)
    near = None if precondition is None else precondition(terms, pull)
    note = _conjugate_gradients(lambda d: summed(d).add_(d, alpha=pull), solution, residual, steps, near)
    return Solution(reference + solution, note)


def _mean_diagonal(terms: Sequence[tuple[float, Operator]], summed: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The mean of the summed metric's diagonal."""
    known = [weight * metric.mean_diagonal for weight, metric in terms if metric.mean_diagonal is not None]
    if len(known) == len(terms):
        return sum(known)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.float64).to(like) * 2 - 1
    return float((signs * summed(signs)).mean())


def _conjugate_gradients(
    system: Callable[[Tensor], Tensor],
    solution: Tensor,
    residual: Tensor,
    steps: int,
    near: Callable[[Tensor], Tensor] | None,
) -> str | None:
    """Solve system(X) = b in place, from ``solution`` and what it leaves of b, and say where it stopped before.

    ``near`` comes near the inverse of the system, where there is such a function.
    """
    wide = residual.dtype == torch.float64
    tolerance, rounding = (_TOLERANCE, 0.0) if wide else (_SINGLE_TOLERANCE, torch.finfo(torch.float32).eps)
    reduced = residual if near is None else near(residual)
    direction = reduced.clone()
    first = left = _dot(residual, residual)
    drop = left if near is None else _dot(residual, reduced)
    done, largest = 0, 0.0
    while left > tolerance**2 * first and done < steps:
        image = system(direction)
        curvature, length = _dot(direction, image), _dot(direction, direction)
        largest = max(largest, curvature / length)
        if curvature < -_INDEFINITE * largest * length or not largest:
            raise ValueError("the sum of the metrics is not positive semi-definite")
        if curvature <= (rounding * largest * length if near is None else 0):
            break  # what is left is of directions that no metric knows, beyond rounding
        solution.add_(direction, alpha=drop / curvature)
        residual.sub_(image, alpha=drop / curvature)
        reduced = residual if near is None else near(residual)
        left = _dot(residual, residual)
        before, drop = drop, left if near is None else _dot(residual, reduced)
        direction.mul_(drop / before).add_(reduced)
        done += 1
    converged = left <= tolerance**2 * first
    return None if converged else f"stopped after {done} steps with a residual of {(left / first) ** 0.5:.0e}"


def _dot(one: Tensor, two: Tensor) -> float:
    """The sum of products, in float64."""
    return float((one * two).sum(-1, dtype=torch.float64).sum())
