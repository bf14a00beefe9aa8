"""Balanced ACTMat: every contributor has the same say, and a strong ridge pulls to an average that has not shrunk.

ACTMat takes δᵢᵀδᵢ for the Gram matrix of a layer's inputs, so that a contributor that was trained for longer decides
more, and its ridge pulls to the average. Task vectors of different tasks are nearly orthogonal: the average of n of
them is √n times as short as each, and what was learnt is lost along all directions that the ridge decides. Here

- each estimated Gram matrix is divided by its mean diagonal, as WUDI's loss does (Cheng et al. 2025);
- the ridge pulls to W₀ + kδ̄, k = mean ‖δᵢ‖ / ‖δ̄‖: the average made as long as the task vectors are. Where contributors
  agree, k is 1 and it is the average; where they are orthogonal, it is task arithmetic scaled by 1/√n;
- where asked to, singular values of the merged change are raised to the power k^-spectrum: what contributors have in
  common adds up in few large ones, and what each has alone has shrunk to many small ones, the more the larger k is.

A ridge as large as the metric itself does well on like and on different tasks, where ACTMat's best ridges differ by
far; docs/method-log.md has figures, and what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import added
from merganser.methods.matrix import Matrix, lengthening, norm
from merganser.methods.regression.wudi import unit_gram
from merganser.methods.spectral.singular import flattened, in_enough_precision
from merganser.methods.sums import GramSums


class BalancedOptions(Options):
    """Options of :data:`BALANCED`."""

    ridge: float = Field(1.0, ge=0, description="pull toward the lengthened average, relative to the mean diagonal")
    lengthen: float = Field(
        1.0, ge=0, le=1, description="power of k; 1 gives the average the task vectors' length, 0 leaves it as it is"
    )
    spectrum: float = Field(
        0.0, ge=0, description="singular values of the merged change to the power k^-spectrum, at its old length"
    )


def _merged(base: Tensor, weights: Sequence[Tensor], coefficients: Sequence[float], options: BalancedOptions) -> Tensor:
    total = sum(coefficients)
    mean, lengths = torch.zeros(base.shape, dtype=torch.float64, device=base.device), list[float]()
    sums = GramSums(dtype=None)
    for number, coefficient in enumerate(coefficients):
        weight = weights[number]
        delta = weight.to(torch.float64) - base
        mean.add_(delta, alpha=coefficient / total)
        if coefficient:
            lengths.append(coefficient / total * norm(delta))
        sums.add(weight, unit_gram(delta.to(weight.dtype)).mul_(base.shape[1]), coefficient)
    factor = lengthening(lengths, norm(mean))
    target = mean.mul_(factor**options.lengthen).add_(base)
    if options.ridge:  # what is pulled to is one more contributor, whose inputs are all alike
        identity = torch.eye(base.shape[1], dtype=base.dtype, device=base.device)
        sums.add(target.to(weights[0].dtype), identity, options.ridge * total)
    merged = sums.solve(0.0).value
    power = factor**-options.spectrum
    if power == 1:
        return merged
    change = merged.sub_(base)
    flat = in_enough_precision(lambda dtype: flattened(change.to(dtype), power), base.shape, change.dtype)
    return added(base, flat, 1.0)


def _room(height: int, width: int, contributors: int) -> int:
    """The mean, a task vector, the sums of weights and the system in float64, one Gram matrix in float32."""
    return 8 * (6 * height * width + 4 * width**2)


BALANCED = Matrix(
    name="balanced",
    title="Balanced ACTMat",
    summary="least squares on estimated inputs, with equal say for every contributor; needs the base model",
    formula="W₀ + argmin Σcᵢ‖τ − δᵢ‖²_Gᵢ/tr(Gᵢ) + λ‖τ − kδ̄‖², Gᵢ = δᵢᵀδᵢ, k = mean ‖δᵢ‖ / ‖δ̄‖",
    reference="here; docs/method-log.md",
    needs=Needs(base=True, layers=True),
    options=BalancedOptions.model_validate({}),
    function=_merged,
    room=_room,
)
