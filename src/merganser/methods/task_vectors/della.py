"""DELLA (Deep et al. 2024, arXiv 2406.11617): task vectors lose numbers at random, small ones more often than large.

A number of δᵢ stays with a probability that grows with the rank of its magnitude in its row, evenly from
density − epsilon for the smallest to density + epsilon for the largest, and is divided by that probability. Equal
magnitudes rank in the order of their columns. A tensor of one dimension is one row. What is left is elected as by TIES,
or summed as by task arithmetic.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from merganser.methods import devices
from merganser.methods.base import PerContributor, of_contributor
from merganser.methods.elementwise import Position, fits_kernels
from merganser.methods.task_vectors.dare import DropOptions
from merganser.methods.task_vectors.sparsified import ELECTED, ElectionOptions, TaskVectorOptions, sparsified


class MagnitudeDropOptions(DropOptions):
    """Options of methods that drop at random by rank."""

    density: PerContributor[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.7, description="mean probability with which a number is kept; 1 keeps and 0 drops all, whatever epsilon"
    )
    epsilon: PerContributor[Annotated[float, Field(ge=0, lt=0.5)]] = Field(
        0.07, description="by how much that of the largest number of a row is above the mean, and of the smallest below"
    )

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        tuples = [option for option in (self.density, self.epsilon) if isinstance(option, tuple)]
        if len({len(option) for option in tuples}) > 1:
            raise ValueError("density and epsilon are given for different numbers of contributors")
        for number in range(max(map(len, tuples), default=1)):
            density, epsilon = of_contributor(self.density, number), of_contributor(self.epsilon, number)
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise ValueError(
                    f"density {density:g} ± epsilon {epsilon:g} reaches out of 0…1: take an epsilon below "
                    f"{min(density, 1 - density):g}"
                )
        return self


class DELLAOptions(MagnitudeDropOptions, ElectionOptions):
    """Options of :data:`DELLA`."""

    scale: float = Field(1.1, description="multiplier of the merged task vector")


class DELLALinearOptions(MagnitudeDropOptions, TaskVectorOptions):
    """Options of :data:`DELLA_LINEAR`."""

    scale: float = Field(0.4, description="multiplier of the summed task vectors")


def _dropped(delta: Tensor, index: int, options: MagnitudeDropOptions, position: Position) -> Tensor:
    number = position.contributors[index]
    density, epsilon = of_contributor(options.density, number), of_contributor(options.epsilon, number)
    if density in (0, 1):
        return delta if density else delta.zero_()
    width = prod(delta.shape[1:]) if delta.dim() > 1 else delta.numel()
    ranked = torch.linspace(density - epsilon, density + epsilon, width) if width > 1 else torch.tensor([density])
    kept = _by_rank(delta.reshape(-1, width), ranked).reshape(delta.shape)
    if fits_kernels(delta, kept):
        from merganser.methods import kernels

        words, divide = position.words(delta, index, options.seed), options.rescale == "expected"
        kernels.keep_drawn_by_chances(kernels.flat(delta), words, kernels.flat(kept), divide)
        return delta
    delta.mul_(position.uniform(delta, index, options.seed).lt_(kept))
    return delta.div_(kept) if options.rescale == "expected" else delta


def _by_rank(rows: Tensor, ranked: Tensor) -> Tensor:
    """For each number of each row, what is given for the rank of its magnitude, from the smallest."""
    if devices.elsewhere(rows):
        return devices.give_by_rank(rows, ranked)
    from merganser.methods import kernels

    found = torch.empty(rows.shape, dtype=torch.float32)
    kernels.give_by_rank(rows.to(torch.float32).contiguous().numpy(), ranked.numpy(), found.numpy())
    return found


_DROPPED = "δᵢ/pᵢ with probability pᵢ, else 0; pᵢ: from d − ε to d + ε by the rank of |δᵢ| in its row"
_REFERENCE = "Deep et al. 2024, arXiv 2406.11617"

DELLA = sparsified(
    name="della",
    title="DELLA",
    summary="base model plus the mean of the differences that agree in sign, thinned at random, small ones more",
    formula=f"{ELECTED}; tᵢ = {_DROPPED}",
    reference=_REFERENCE,
    options=DELLAOptions.model_validate({}),
    sparsify=_dropped,
    election=True,
    by_rows=True,
)

DELLA_LINEAR = sparsified(
    name="della_linear",
    title="DELLA, summed",
    summary="base model plus the sum of the differences, thinned at random, small ones more",
    formula=f"θ₀ + s·Σcᵢtᵢ; tᵢ = {_DROPPED}",
    reference=_REFERENCE,
    options=DELLALinearOptions.model_validate({}),
    sparsify=_dropped,
    election=False,
    by_rows=True,
)
