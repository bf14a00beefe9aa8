"""DARE (Yu et al. 2024, arXiv 2311.03099): task vectors lose numbers at random, and the rest are scaled up.

Each number of a δᵢ stays with the probability density and is divided by it, so that the expectation is δᵢ. What is left
is summed as by task arithmetic, or elected as by TIES.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from merganser.methods.base import Options, PerContributor, of_contributor
from merganser.methods.elementwise import Position
from merganser.methods.task_vectors.sparsified import ELECTED, ElectionOptions, TaskVectorOptions, sparsified


class DropOptions(Options):
    """Options of methods that drop at random."""

    density: PerContributor[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.8, description="probability with which each number of a task vector is kept"
    )
    rescale: Literal["expected", "l1", "none"] = Field(
        "expected",
        description="what is kept is divided by its probability (expected), or scaled up to the sum of magnitudes that "
        "the tensor's task vector had (l1)",
    )
    seed: int = Field(0, description="of the random choice")


class DARELinearOptions(DropOptions, TaskVectorOptions):
    """Options of :data:`DARE_LINEAR`."""

    scale: float = Field(0.4, description="multiplier of the summed task vectors")


class DARETIESOptions(DropOptions, ElectionOptions):
    """Options of :data:`DARE_TIES`."""


def _dropped(delta: Tensor, index: int, options: DropOptions, position: Position) -> Tensor:
    density = of_contributor(options.density, position.contributors[index])
    if density == 1:
        return delta
    divisor = density if options.rescale == "expected" and density else 1.0
    return position.drawn(delta, index, options.seed, density, divisor)


_REFERENCE = "Yu et al. 2024, arXiv 2311.03099"

DARE_LINEAR = sparsified(
    name="dare_linear",
    title="DARE, summed",
    summary="base model plus the sum of the differences, of which a random choice is dropped and the rest scaled up",
    formula="θ₀ + s·Σcᵢtᵢ; tᵢ = δᵢ/d with probability d, else 0",
    reference=_REFERENCE,
    options=DARELinearOptions.model_validate({}),
    sparsify=_dropped,
    election=False,
)

DARE_TIES = sparsified(
    name="dare_ties",
    title="DARE with TIES' election",
    summary="base model plus the mean of the randomly thinned differences that agree in sign",
    formula=f"{ELECTED}; tᵢ = δᵢ/d with probability d, else 0",
    reference=f"{_REFERENCE}; Yadav et al. 2023, arXiv 2306.01708",
    options=DARETIESOptions.model_validate({}),
    sparsify=_dropped,
    election=True,
)
