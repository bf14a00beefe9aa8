"""Cholesky factors in blocks: nearly all of the work is in matrix products, the fastest thing that processors do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

#: Columns of a block: wide enough for products to be fast, small beside the matrix.
_BLOCK = 192


@dataclass(frozen=True)
class Cholesky:
    """L with L Lᵀ = A.

    Attributes:
        lower: (d, d), L in its lower triangle; what is above is of no meaning.
        inverses: of the diagonal blocks of L, from the first on.
    """

    lower: Tensor
    inverses: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the factor."""
        return self.lower.dtype

    @property
    def smallest_pivot(self) -> float:
        """The smallest square on L's diagonal."""
        return float(self.lower.diagonal().min()) ** 2

    def solve_(self, right: Tensor) -> Tensor:
        """X with X A = ``right`` (rows, d); in place, and returned."""
        blocks = list(zip(_ranges(len(self.lower)), self.inverses, strict=True))
        for (start, stop), inverse in blocks:
            column = right[:, start:stop]
            if start:
                column.addmm_(right[:, :start], self.lower[start:stop, :start].T, alpha=-1)
            column.copy_(column @ inverse.T)
        for (start, stop), inverse in reversed(blocks):
            column = right[:, start:stop]
            if stop < len(self.lower):
                column.addmm_(right[:, stop:], self.lower[stop:, start:stop], alpha=-1)
            column.copy_(column @ inverse)
        return right


def cholesky_(matrix: Tensor) -> Cholesky | None:
    """Factor a symmetric matrix (d, d) in its own place; None where it is not positive definite.

    Args:
        matrix: only the lower triangle is read.
    """
    inverses = []
    for start, stop in _ranges(len(matrix)):
        panel = matrix[start:, start:stop]
        if start:
            panel.addmm_(matrix[start:, :start], matrix[start:stop, :start].T, alpha=-1)
        corner, below = panel[: stop - start], panel[stop - start :]
        factor, failed = cholesky_ex(corner)
        if int(failed) or not bool(factor.diagonal().isfinite().all()):
            return None
        corner.copy_(factor)
        identity = torch.eye(stop - start, dtype=matrix.dtype, device=matrix.device)
        inverse = solve_triangular(factor, identity, upper=False)
        if len(below):
            below.copy_(below @ inverse.T)
        inverses.append(inverse)
    return Cholesky(matrix, tuple(inverses))


def _ranges(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]
