"""Iso-C and Iso-CTS: task matrices with one singular value for all (Marczak et al., ICML 2025, arXiv 2502.04959).

Iso-C replaces the singular values of the summed task matrices, of which few are large, by their mean. Iso-CTS first
replaces the least of its directions by those that each task has beside the common ones.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.spectral.singular import Imprecise, polar_factor, singular_triples
from merganser.methods.spectral.task_matrices import SpectralOptions, TaskMatrices, spectral


class IsoCTSOptions(SpectralOptions):
    """Options of :data:`ISO_CTS`."""

    common: float = Field(0.8, ge=0, le=1, description="share of the directions that is the sum's, about")


def _common(tasks: TaskMatrices, options: SpectralOptions) -> Tensor:
    total = tasks.total()
    factor = polar_factor(total)
    return factor.mul_(total.mul_(factor).sum() / tasks.rank)  # the mean of all singular values


def shares(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """How many directions are the sum's, and how many each task's: together all of the rank, as in the paper's code."""
    own = round((rank - int(rank * common)) / tasks)
    while own * tasks > rank:  # more tasks than directions
        own -= 1
    return rank - own * tasks, own


def _common_and_own(tasks: TaskMatrices, options: IsoCTSOptions) -> Tensor:
    together, own = shares(tasks.rank, len(tasks), options.common)
    if not own:
        return _common(tasks, options)
    if tasks.dtype == torch.float32:
        raise Imprecise  # what a task has beside the common directions is a small difference of large numbers
    found = [singular_triples(tasks.total(), together)]
    common = found[0].left
    for matrix in tasks:
        whole = float(matrix.norm())
        found.append(singular_triples(matrix.sub_(common @ (common.T @ matrix)), own, whole))
    left = polar_factor(torch.cat([one.left for one in found], dim=1), of_vectors=True)
    right = polar_factor(torch.cat([one.right for one in found], dim=1), of_vectors=True)
    values = torch.cat([one.values for one in found])
    return left @ right.T * (values.sum() / tasks.rank)


def _room(height: int, width: int, contributors: int) -> int:
    """The sum, the same in its basis, the factor, and an eigenvalue problem, in float64."""
    return 8 * (7 * height * width // 2 + 5 * min(height, width) ** 2)


def _room_of_both(height: int, width: int, contributors: int) -> int:
    """Beside these, the triples."""
    return _room(height, width, contributors) + 8 * 2 * min(height, width) * (height + width)


ISO_C = spectral(
    _common,
    name="iso_c",
    title="Iso-C",
    summary="base model plus the summed differences with all singular values equal",
    formula="W₀ + s·σ̄·U Vᵀ, U S Vᵀ = Σcᵢδᵢ, σ̄ = mean(S)",
    reference="Marczak et al. 2025, arXiv 2502.04959",
    options=SpectralOptions.model_validate({}),
    room=_room,
)

ISO_CTS = spectral(
    _common_and_own,
    name="iso_cts",
    title="Iso-CTS",
    summary="the same, with the least of its directions replaced by those that single tasks have beside them",
    formula="W₀ + s·σ̄·U Vᵀ, U and V the polar factors of the top vectors of Σcᵢδᵢ and of each cᵢδᵢ beside them",
    reference="Marczak et al. 2025, arXiv 2502.04959",
    options=IsoCTSOptions.model_validate({}),
    room=_room_of_both,
)
