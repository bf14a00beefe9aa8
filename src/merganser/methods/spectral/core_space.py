"""Core space (Panariello et al. 2025, arXiv 2509.17786): low-rank task vectors merged as small cores in shared bases.

With δᵢ = BᵢAᵢ, U an orthonormal basis of all Bᵢ side by side (their left singular vectors) and V one of all Aᵢ on top
of each other (their right ones), δᵢ = U Mᵢ Vᵀ with the core Mᵢ = (UᵀBᵢ)(AᵢV), of as many rows and columns as the ranks
sum to. Nothing is lost. The cores are merged elementwise; θ = θ₀ + U M* Vᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merganser.methods.base import Needs
from merganser.methods.products import Product, column_basis
from merganser.methods.spectral.low_rank import LowRankMatrix, LowRankOptions


class CoreSpaceOptions(LowRankOptions):
    """Options of :data:`CORE_SPACE`."""


def _merge(
    products: Sequence[Product], merge: Callable[[Sequence[Tensor]], Tensor], options: CoreSpaceOptions
) -> Product:
    left = column_basis(torch.cat([one.left for one in products], dim=1))
    right = column_basis(torch.cat([one.right for one in products]).T)
    core = merge([(left.T @ one.left) @ (one.right @ right) for one in products])
    return Product(left, core @ right.T)


CORE_SPACE = LowRankMatrix(
    name="core_space",
    title="Core space",
    summary="base model plus the differences merged as small matrices in shared bases; for adapters",
    formula="θ₀ + s·U M* Vᵀ with δᵢ = U Mᵢ Vᵀ, U and V bases of all Bᵢ and Aᵢ, and M* the merge of the Mᵢ, by TIES",
    reference="Panariello et al. 2025, arXiv 2509.17786",
    needs=Needs(base=True, layers=True, signed=True, normalised=False),
    options=CoreSpaceOptions.model_validate({}),
    products=_merge,
)
