"""KnOTS (Stoica et al. 2025, arXiv 2410.19735): task vectors of adapters merged in the basis that they share.

The task vectors of a layer side by side have one singular value decomposition, [δ₁ … δ_T] = U Σ [V₁ … V_T]ᵀ. What
differs between the contributors is Vᵢ, which is merged elementwise; θ = θ₀ + U Σ V*ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs
from merganser.methods.products import Product, column_basis
from merganser.methods.spectral.low_rank import LowRankMatrix, LowRankOptions


class KnOTSOptions(LowRankOptions):
    """Options of :data:`KNOTS`."""

    weighted: bool = Field(False, description="merge ΣVᵢᵀ instead of Vᵢᵀ, as the authors' code does")


def _merge(products: Sequence[Product], merge: Callable[[Sequence[Tensor]], Tensor], options: KnOTSOptions) -> Product:
    """All of it happens in a basis of the left factors, which has as many dimensions as there are ranks."""
    basis, small = torch.linalg.qr(torch.cat([one.left for one in products], dim=1))
    parts = small.split([one.rank for one in products], dim=1)
    inside = [part @ one.right for part, one in zip(parts, products, strict=True)]
    rotation = column_basis(torch.cat(inside, dim=1))
    weighted = [rotation.T @ one for one in inside]  # ΣVᵢᵀ
    left = basis @ rotation
    if options.weighted:
        return Product(left, merge(weighted))
    values = torch.cat(weighted, dim=1).norm(dim=1)
    return Product(left * values, merge([one / values[:, None] for one in weighted]))


KNOTS = LowRankMatrix(
    name="knots",
    title="KnOTS",
    summary="base model plus the differences merged in their shared singular vectors; for adapters",
    formula="θ₀ + s·U Σ V*ᵀ with [δ₁ … δ_T] = U Σ [V₁ … V_T]ᵀ and V* the merge of the Vᵢ, by TIES",
    reference="Stoica et al. 2025, arXiv 2410.19735",
    needs=Needs(base=True, layers=True, signed=True, normalised=False),
    options=KnOTSOptions.model_validate({}),
    products=_merge,
)
