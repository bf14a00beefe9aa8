"""ACE: inputs estimated from task vectors, scaled to each other where these differ (Xu et al., CVPR 2026, 2603.02945).

As in ACTMat, the rows of δᵢ stand in for a layer's inputs; here their covariance Cᵢ does, of rows without their mean.
Where the energies ‖δᵢ‖² of a layer are heterogeneous, each Cᵢ is divided by its trace, and the merged task matrix gets
more of its strongest directions, all with the same weight. The system is regularised by εI and by a prior that all
tasks share: the mean row of ΣcᵢCᵢ in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from statistics import fmean, variance

import torch
from pydantic import Field
from torch import Tensor

from merganser.blas import add_gram_, cholesky_, solve_cholesky_
from merganser.methods.base import Needs, Options
from merganser.methods.matrix import Matrix
from merganser.methods.spectral.singular import singular_triples
from merganser.tensors import mirror_upper

_LEAST = 1e-12  # of a logarithm's square, and of an energy


class ACEOptions(Options):
    """Options of :data:`ACE`."""

    epsilon: float = Field(1e-5, gt=0, description="of the regularisation εI; the paper has 4e-2 for GPT-2")
    threshold: float = Field(0.3, ge=0, description="heterogeneity of a layer's energies above which it is refined")
    refined: float = Field(0.3, ge=0, le=1, description="share of the directions that the refinement strengthens")
    centred: bool = Field(False, description="merge task vectors without their mean row, as the authors' code does")
    scale: float = Field(1.0, description="multiplier of the merged task matrix")
    rest: float = Field(1.0, description="multiplier of the averaged task vectors of everything but linear layers")


def _merged(base: Tensor, weights: Sequence[Tensor], coefficients: Sequence[float], options: ACEOptions) -> Tensor:
    votes = {number: c * len(coefficients) / sum(coefficients) for number, c in enumerate(coefficients) if c}
    deltas = [(weights[number].to(torch.float64).sub_(base), vote) for number, vote in votes.items()]
    mixed = heterogeneity([float(delta.square().sum()) for delta, _ in deltas]) > options.threshold
    width = base.shape[1]
    right = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    total, products, ridge = right.new_zeros(width, width), [], 0.0
    for delta, vote in deltas:
        centred = delta - delta.mean(0)
        covariance = mirror_upper(add_gram_(right.new_zeros(width, width), centred.T).T)
        trace = float(covariance.diagonal().sum())
        share = 1 / trace if mixed and trace > 0 else 1.0
        task, epsilon = centred if options.centred else delta, options.epsilon * share
        product = delta @ covariance.mul_(share * vote)
        right += (product if task is delta else task @ covariance).add(task, alpha=epsilon * vote)
        total += covariance
        ridge += epsilon * vote
        products.append(product)
    merged = _solved(total, ridge, right)
    if mixed:
        average = total / len(deltas)
        residual = sum(products, start=torch.zeros_like(right))
        residual -= sum((delta * vote for delta, vote in deltas), start=torch.zeros_like(right)) @ average
        top = singular_triples(merged + residual, int(min(base.shape) * options.refined))
        if len(top.values):
            merged += top.left @ top.right.T * top.values.mean()
    return base + merged.mul_(options.scale)


def heterogeneity(energies: Sequence[float]) -> float:
    """var(log e) / mean(log e)² over the contributors that differ from the base model at all; 0 of fewer than two."""
    logs = [log(energy + _LEAST) for energy in energies if energy > 0]
    return variance(logs) / (fmean(logs) ** 2 + _LEAST) if len(logs) > 1 else 0.0


def _solved(total: Tensor, ridge: float, right: Tensor) -> Tensor:
    """X with X (C + λI + 1mᵀ) = ``right``, m the mean row of C: the one rank more by Sherman & Morrison (1950)."""
    mean, factor = total.mean(0), total.clone()
    factor.diagonal().add_(ridge)
    if not cholesky_(factor):
        # Rounding is larger than ε beside it.
        factor = total.clone()
        factor.diagonal().add_(ridge + float(total.diagonal().max()) * len(total) * torch.finfo(total.dtype).eps)
        if not cholesky_(factor):
            raise ValueError("the summed covariances are not positive definite; give a larger epsilon")
    solved = solve_cholesky_(torch.cat([right, mean[None]]), factor)
    merged, prior = solved[:-1], solved[-1]
    return merged - merged.sum(1, keepdim=True) * (prior / (1 + prior.sum()))


def _room(height: int, width: int, contributors: int) -> int:
    """Two matrices of each contributor, the right-hand side and its solution, the systems; those of the refinement."""
    side = min(height, width)
    return 8 * (height * width * (2 * contributors + 5) + 4 * width**2 + 6 * side**2)


ACE = Matrix(
    name="ace",
    title="ACE",
    summary="least squares on covariances estimated from the differences; needs the base model",
    formula="W₀ + (Σcᵢδᵢ(Cᵢ + εᵢI))(Σcᵢ(Cᵢ + εᵢI) + 1mᵀ)⁻¹, Cᵢ that of the rows of δᵢ, m the mean row of ΣcᵢCᵢ",
    reference="Xu et al. 2026, arXiv 2603.02945",
    needs=Needs(base=True, layers=True),
    options=ACEOptions.model_validate({}),
    function=_merged,
    room=_room,
)
