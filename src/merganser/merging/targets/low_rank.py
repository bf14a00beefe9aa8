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

#: Part of the mean of G's diagonal that is added to it: directions that no input has still count for something.
RIDGE = 1e-6


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


def best_low_rank(delta: Tensor, gram: Tensor | None, rank: int) -> LowRank:
    """The matrix of at most ``rank`` that is nearest to ``delta`` in the norm of ``gram``.

    Args:
        delta: (out, in).
        gram: G (in, in), symmetric positive semi-definite; its diagonal (in,) where it is diagonal; None: identity.
        rank: r, at least 1; at most min(out, in) is used, and the rest are zeros.
    """
    delta = delta.to(torch.float64)
    out, width = delta.shape
    basis = None  # where there are more rows than columns, the rows are turned into as many as there are columns
    rows = delta
    if out > width:
        basis, rows = torch.linalg.qr(delta)
    exact = _quadratic(rows, gram)
    system = exact
    if gram is not None:
        gram = gram.to(torch.float64)
        mean = float((gram if gram.dim() == 1 else gram.diagonal()).mean())
        system = exact + RIDGE * (mean if mean > 0 else 1.0) * (rows @ rows.T)
    kept = min(rank, out, width)
    _, vectors = torch.linalg.eigh(system)
    chosen = vectors.flip(1)[:, :kept]
    b = delta.new_zeros(out, rank)
    b[:, :kept] = chosen if basis is None else basis @ chosen
    a = delta.new_zeros(rank, width)
    a[:kept] = chosen.T @ rows
    left = _quadratic(rows - chosen @ a[:kept], gram).diagonal().sum()
    whole = float(exact.diagonal().sum())
    error = (max(float(left), 0.0) / whole) ** 0.5 if whole > 0 else 0.0
    return LowRank(a, b, error)


def _quadratic(rows: Tensor, gram: Tensor | None) -> Tensor:
    """rows · G · rowsᵀ, symmetric."""
    if gram is None:
        return rows @ rows.T
    gram = gram.to(torch.float64)
    product = (rows * gram) @ rows.T if gram.dim() == 1 else rows @ gram @ rows.T
    return (product + product.T) / 2
