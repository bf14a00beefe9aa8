"""The part of a covariance (or correlation) matrix that few directions explain; what is left over is a diagonal.

C ≈ FᵀF + diag(rest) with F (r, d) the top-r eigenpairs, √λ·v in a row each, and rest = diag(C) − diag(FᵀF).

That rest is nowhere negative, so that the sum is positive semi-definite, has two reasons. In exact arithmetic
C − FᵀF is positive semi-definite, for the eigenpairs and also for Nyström's approximation of them (a Schur
complement; Gittens & Mahoney 2013), so its diagonal is not negative. And where F is rounded to bfloat16, a column of
F whose squares would sum to more than the diagonal's entry is shortened to it and rounded toward zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 6  # of subspace iteration; after them the error is within a percent of the eigenpairs' on flat spectra, too
_MORE = 8  # directions beside the r that are wanted
_TINY = 1e-12  # of the trace: keeps the Nyström core regular where the rank is lower than r


def top_factor(matrix: Tensor, rank: int) -> Tensor:
    """(r, d) float64: rows √λ·v of the r largest eigenpairs, by randomized subspace iteration and Nyström's formula.

    Costs O(d²·r), where all eigenpairs would cost O(d³) with a large constant. The same input gives the same output.

    Args:
        matrix: (d, d) float64, symmetric positive semi-definite up to rounding.
        rank: r, less than d.
    """
    width = matrix.shape[0]
    trace = float(matrix.trace())
    if trace <= 0:
        return matrix.new_zeros(rank, width)
    columns = min(width, rank + rank // 2 + _MORE)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    for _ in range(_ROUNDS):
        basis, _ = torch.linalg.qr(matrix @ basis)
    shift = _TINY * trace
    image = matrix @ basis + shift * basis
    core, failed = torch.linalg.cholesky_ex(basis.T @ image)
    while int(failed):  # C has eigenvalues below zero, by rounding
        shift = 100 * shift
        core, failed = torch.linalg.cholesky_ex(basis.T @ (matrix @ basis) + shift * _identity(basis))
        image = matrix @ basis + shift * basis
    half = torch.linalg.solve_triangular(core, image.T, upper=False)  # halfᵀ half is Nyström's approximation
    _, values, vectors = torch.linalg.svd(half, full_matrices=False)
    lengths = (values[:rank].square() - shift).clamp_min(0).sqrt()
    return vectors[:rank] * lengths[:, None]


def _identity(basis: Tensor) -> Tensor:
    return torch.eye(basis.shape[1], dtype=basis.dtype)


def rounded_within(factor: Tensor, room: Tensor) -> Tensor:
    """(r, d) bfloat16: ``factor`` rounded such that the squares of no column sum to more than ``room`` says.

    Args:
        factor: (r, d) float64.
        room: (d,) float64, what the diagonal has to give; nothing where it is negative.
    """
    nearest = factor.to(torch.bfloat16)
    over = nearest.to(torch.float64).square_().sum(0) > room
    sums = factor[:, over].square().sum(0)
    most = room[over].clamp_min(0)
    shorter = torch.where(sums > most, (most / sums.clamp_min(1e-300)).sqrt(), 1.0) * (1 - 2.0**-20)
    nearest[:, over] = _toward_zero((factor[:, over] * shorter).to(torch.float32))
    return nearest


def _toward_zero(values: Tensor) -> Tensor:
    """bfloat16 by cutting the lower half of float32's bits off."""
    return (values.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
