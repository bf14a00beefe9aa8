"""TSV-M: the largest singular triples of every task, whitened (Gargiulo et al., CVPR 2025, arXiv 2412.00081).

Of each of T tasks it keeps the r/T largest singular triples, r the smaller side of the matrix, so that all of them
together fill it. The left vectors of all tasks side by side, and so the right ones, are replaced by the nearest
orthonormal ones, which decorrelates the tasks.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.spectral.singular import polar_factor, singular_triples
from merganser.methods.spectral.task_matrices import SpectralOptions, TaskMatrices, spectral


class TSVOptions(SpectralOptions):
    """Options of :data:`TSV_M`."""

    keep: float = Field(1.0, gt=0, le=1, description="share of each task's r/T triples that is kept, the largest")


def _merged(tasks: TaskMatrices, options: TSVOptions) -> Tensor:
    # Of a matrix with fewer rows or columns than there are tasks, each task keeps one triple.
    count = max(1, int(options.keep * (tasks.rank // len(tasks))))
    found = [singular_triples(matrix, count) for matrix in tasks]
    left = polar_factor(torch.cat([one.left for one in found], dim=1), of_vectors=True)
    right = polar_factor(torch.cat([one.right for one in found], dim=1), of_vectors=True)
    return (left * torch.cat([one.values for one in found])) @ right.T


def _room(height: int, width: int, contributors: int) -> int:
    """The triples, a task matrix in its basis or a polar factor, and an eigenvalue problem, in float64."""
    side, kept = min(height, width), max(min(height, width), contributors)
    return 8 * (3 * kept * (height + width) // 2 + 2 * height * width + 6 * side**2)


TSV_M = spectral(
    _merged,
    name="tsv_m",
    title="TSV-M",
    summary="base model plus the largest singular triples of every task, decorrelated",
    formula="W₀ + s·U diag(S) Vᵀ, U and V the polar factors of the top r/T singular vectors of all cᵢδᵢ side by side",
    reference="Gargiulo et al. 2025, arXiv 2412.00081",
    options=TSVOptions.model_validate({}),
    room=_room,
)
