"""Matrices of low rank as products of two factors, as adapters have them, which need not be multiplied out.

A change ΔW = s·BA of rank r costs r·(out + in) numbers instead of out·in. Sums of such changes are put together by
concatenation, and their singular values are those of a small matrix between two orthonormal bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

#: Part of the largest singular value below which one counts as rounding, as ``numpy.linalg.matrix_rank`` has it, of
#: squares: they are found from products of a matrix with itself.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Product:
    """A matrix (out, in) of rank r at most, as left · right.

    Attributes:
        left: (out, r).
        right: (r, in).
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """How many columns the left factor has; the matrix's own rank is at most that."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """The matrix, multiplied out."""
        return self.left @ self.right


@runtime_checkable
class BringsProducts(Protocol):
    """A share (:class:`~merganser.methods.Share`) that may have its difference from the base model as a product."""

    def product(self, name: str) -> Product | None:
        """δ of a weight, as (out, in) whatever its orientation on disk; None where it is not known as a product."""


def combined(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """Σ wᵢ·Pᵢ, exactly, by concatenation; products of weight zero are left out. The weights go to the left factors.

    Args:
        products: Pᵢ, at least one, of one shape.
        weights: wᵢ.
    """
    used = [(product, weight) for product, weight in zip(products, weights, strict=True) if weight and product.rank]
    if not used:
        first = products[0]
        return Product(first.left[:, :0], first.right[:0])
    left = torch.cat([product.left * weight for product, weight in used], dim=1)
    return Product(left, torch.cat([product.right for product, _ in used]))


def factored(matrix: Tensor, rank: int | None = None) -> Product:
    """A matrix as the product of an orthonormal basis of its columns (or rows) and what it is in that basis.

    The basis are the eigenvectors of the Gram matrix of the smaller side, in float64, those of eigenvalues that are no
    rounding, so that nothing of the matrix is lost and its numerical rank is found at a fraction of a full singular
    value decomposition's cost.

    Args:
        matrix: (out, in).
        rank: how many of the largest singular values are kept; all by default.
    """
    matrix = matrix.to(torch.float64)
    if matrix.shape[0] > matrix.shape[1]:
        turned = factored(matrix.T, rank)
        return Product(turned.right.T, turned.left.T)
    basis = column_basis(matrix)[:, :rank]
    return Product(basis, basis.T @ matrix)


def column_basis(matrix: Tensor) -> Tensor:
    """The left singular vectors (out, r) of a matrix (out, in), largest values first, without those that are rounding.

    Args:
        matrix: in float64; r is its numerical rank, 0 of a matrix of zeros.
    """
    out, width = matrix.shape
    if out > width:
        basis, small = torch.linalg.qr(matrix)
        return basis @ column_basis(small)
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > _ROUNDING * values[:1].clamp_min(torch.finfo(values.dtype).tiny)).sum()) if out else 0
    return vectors[:, :kept]
