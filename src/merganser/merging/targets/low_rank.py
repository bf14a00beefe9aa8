"""The matrix of a given rank that is nearest to another in the norm that a layer's inputs make.

For a linear weight's change ΔW and G the Gram matrix of its inputs, the error that matters is ‖(ΔW − BA)G^½‖_F: how far
outputs are off on those inputs. Its least value over rank r is reached by B = U, A = UᵀΔW with U the first r left
singular vectors of ΔW G^½, that is the eigenvectors of ΔW G ΔWᵀ: no root or inverse of G is needed, and what G does not
see is kept as far as it lies in U. An embedding is a linear map of one-hot inputs, whose Gram matrix is the diagonal of
token frequencies. With no G it is the identity, which is the plain singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.methods.products import Product

#: Part of the mean of G's diagonal that is added to it: directions that no input has still count for something.
RIDGE = 1e-6
_ROUNDING = 1e-12  # of energies: all of it is reached by the numerical rank


@dataclass(frozen=True)
class LowRank:
    """The best approximation BA of a matrix ΔW (out, in).

    Attributes:
        a: (r, in), float64.
        b: (out, r), float64, orthonormal columns.
        error: ‖(ΔW − BA)G^½‖ / ‖ΔW G^½‖.
    """

    a: Tensor
    b: Tensor
    error: float


def best_low_rank(delta: Tensor | Product, gram: Tensor | None, rank: int, energy: float | None = None) -> LowRank:
    """The matrix of at most ``rank`` that is nearest to ``delta`` in the norm of ``gram``.

    Args:
        delta: (out, in); a product of at most this rank is taken as it is, and no other is multiplied out.
        gram: G (in, in), symmetric positive semi-definite; its diagonal (in,) where it is diagonal; None: identity.
        rank: r, at least 1; at most min(out, in) is used, and the rest are zeros.
        energy: the least rank is taken that keeps this share of ‖ΔW G^½‖², which is ``rank`` at most; no rest.
    """
    if isinstance(delta, Product):
        if delta.rank <= rank and energy is None:
            return LowRank(delta.right.to(torch.float64), delta.left.to(torch.float64), 0.0)
        basis, small = torch.linalg.qr(delta.left.to(torch.float64))
        rows = small @ delta.right.to(torch.float64)
    else:
        rows = delta.to(torch.float64)
        # Where there are more rows than columns, the rows are turned into as many as there are columns.
        basis, rows = torch.linalg.qr(rows) if rows.shape[0] > rows.shape[1] else (None, rows)
    exact = _quadratic(rows, gram)
    system = exact
    if gram is not None:
        gram = gram.to(torch.float64)
        mean = float((gram if gram.dim() == 1 else gram.diagonal()).mean())
        system = exact + RIDGE * (mean if mean > 0 else 1.0) * (rows @ rows.T)
    _, vectors = torch.linalg.eigh(system)
    vectors = vectors.flip(1)[:, : min(rank, rows.shape[1])]
    whole = float(exact.diagonal().sum())
    kept = vectors.shape[1]
    if energy is not None:
        reached = (vectors * (exact @ vectors)).sum(0).cumsum(0)
        kept = rank = min(kept, 1 + int((reached < energy * whole * (1 - _ROUNDING)).sum()))
    chosen = vectors[:, :kept]
    out, width = delta.shape
    b = rows.new_zeros(out, rank)
    b[:, :kept] = chosen if basis is None else basis @ chosen
    a = rows.new_zeros(rank, width)
    a[:kept] = chosen.T @ rows
    left = _quadratic(rows - chosen @ a[:kept], gram).diagonal().sum()
    error = (max(float(left), 0.0) / whole) ** 0.5 if whole > 0 else 0.0
    return LowRank(a, b, error)


def _quadratic(rows: Tensor, gram: Tensor | None) -> Tensor:
    """rows · G · rowsᵀ, symmetric."""
    if gram is None:
        return rows @ rows.T
    gram = gram.to(torch.float64)
    product = (rows * gram) @ rows.T if gram.dim() == 1 else rows @ gram @ rows.T
    return (product + product.T) / 2
