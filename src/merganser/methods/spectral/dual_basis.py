"""Dual bases that are shared: the largest singular triples of every task, without cross-talk where tasks differ.

TSV-M makes the singular vectors of all tasks orthonormal, so that each task's own directions are turned. Here they
stay, and it is prescribed how the merged matrix W acts between them. With u, s, v a triple, a and b two of all:

- uₐᵀ W vₐ = sₐ, and within one task no triple acts on another: each task does to its own directions what it did;
- between tasks i and k, uₐᵀ W v_b = w ½(uₐᵀδᵢv_b + uₐᵀδₖv_b): where tasks differ, w = 0 and none answers what another
  asks; where they are alike, w = 1 and the answer is the mean of both. Tasks that share directions would take them from
  each other with w = 0: for the same direction one asks for s, the other for nothing.

w grows with the cosine of the two task vectors in this layer, which is about 0.01 for different tasks and about 0.1
for like ones; docs/method-log.md has figures. With U and V all vectors side by side and T the matrix of what is
prescribed, W is U (UᵀU)⁻¹ T (VᵀV)⁻¹ Vᵀ: the dual bases of U and V around T. A ridge on UᵀU and VᵀV keeps directions
that nearly coincide from being told apart by noise.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from merganser.blas import cholesky_, solve_cholesky_
from merganser.methods.spectral.singular import singular_triples
from merganser.methods.spectral.task_matrices import SpectralOptions, TaskMatrices, spectral


class DualBasisOptions(SpectralOptions):
    """Options of :data:`DUAL_BASIS`."""

    keep: float = Field(0.25, gt=0, le=1, description="share of each task's r/T triples that is kept, the largest")
    sharing: float = Field(
        10.0, ge=0, description="how fast tasks share as their cosine grows; from its inverse on, fully"
    )
    ridge: float = Field(0.1, gt=0, description="added to the squared lengths of singular vectors, which are 1")


def _merged(tasks: TaskMatrices, options: DualBasisOptions) -> Tensor:
    count = max(1, int(options.keep * (tasks.rank // len(tasks))))
    found = [singular_triples(matrix, count) for matrix in tasks]
    left = torch.cat([one.left for one in found], dim=1)
    right = torch.cat([one.right for one in found], dim=1)
    values = torch.cat([one.values for one in found]).double()
    if not len(values):
        return next(iter(tasks)).zero_()
    owner = torch.repeat_interleave(torch.tensor([len(one.values) for one in found])).to(left.device)
    gram, other = (left.T @ left).double(), (right.T @ right).double()
    apart = owner[:, None] != owner
    shared = (_cosines(tasks) * options.sharing).clamp(0, 1).to(left.device)[owner][:, owner]
    wanted = (values[:, None] * other + gram * values).mul_(shared).mul_(apart).div_(2)
    wanted.diagonal().add_(values)
    core = _divided(_divided(wanted, other, options.ridge).T.contiguous(), gram, options.ridge).T
    return left @ core.to(left.dtype) @ right.T


def _cosines(tasks: TaskMatrices) -> Tensor:
    """Of every two task matrices; those of a matrix of zeros are 0."""
    products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for row, one in enumerate(tasks):
        for column, two in enumerate(tasks):
            if column >= row:
                products[row, column] = products[column, row] = (one.double() * two.double()).sum()
    lengths = products.diagonal().sqrt()
    return products / torch.outer(lengths, lengths).clamp_min(torch.finfo(torch.float64).tiny)


def _divided(wanted: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """(1 + λ) T (G + λI)⁻¹, in place of T: where all vectors are orthogonal, it is T."""
    system = gram.clone()
    system.diagonal().add_(ridge)
    cholesky_(system)
    return solve_cholesky_(wanted.mul_(1 + ridge), system)


def _room(height: int, width: int, contributors: int) -> int:
    """The triples, two task matrices and their product, or an eigenvalue problem, in float64; the systems."""
    side, kept = min(height, width), max(min(height, width), contributors)
    return 8 * (3 * kept * (height + width) // 2 + 4 * height * width + 6 * side**2 + 6 * kept**2)


DUAL_BASIS = spectral(
    _merged,
    name="dual_basis",
    title="Shared dual bases",
    summary="base model plus the largest singular triples of every task, without cross-talk where tasks differ",
    formula="W₀ + s·U(UᵀU + λI)⁻¹T(VᵀV + λI)⁻¹Vᵀ(1 + λ)², T = S, between tasks w∘½(S VᵀV + UᵀU S), w from cosines",
    reference="here; docs/method-log.md",
    options=DualBasisOptions.model_validate({}),
    room=_room,
)
