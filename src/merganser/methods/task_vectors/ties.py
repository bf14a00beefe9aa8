"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, and average what agrees.

Each δᵢ keeps the share of its numbers that are largest in magnitude, tensor by tensor and at least one number; a
number's sign is that of the weighted sum; θ₀ + s · the weighted mean of the δᵢ that have this sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf, prod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import PerContributor, of_contributor
from merganser.methods.elementwise import Position, Whole
from merganser.methods.selection import kth_largest
from merganser.methods.task_vectors.sparsified import ELECTED, ElectionOptions, RescalingOptions, sparsified


class TIESOptions(RescalingOptions, ElectionOptions):
    """Options of :data:`TIES`."""

    density: PerContributor[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.2, description="share of each task vector that is kept"
    )


def thresholds(whole: Whole, coefficients: Sequence[float], options: TIESOptions) -> list[float]:
    """Each contributor's threshold: the smallest magnitude that is kept; infinite for a density of 0."""
    size = prod(whole.shape)
    contributors = whole.position(0, 0).contributors
    densities = [of_contributor(options.density, number) for number in contributors]
    keep = [min(size, max(1, floor(density * size))) if density else 0 for density in densities]

    def read(start: int, stop: int) -> list[Tensor]:
        return [delta.to(torch.float32) for delta in whole.deltas(start, stop)]

    return kth_largest(read, whole.height, whole.width, keep)


def trimmed(delta: Tensor, index: int, options: TIESOptions, position: Position) -> Tensor:
    """A task vector without what lies below its threshold."""
    # What is above the number before the threshold is at least the threshold.
    return torch.hardshrink(delta, before(position.whole[index]))


def before(threshold: float) -> float:
    """The largest float32 number below a threshold; negative below 0, so that everything is above it."""
    if threshold in (0, inf):
        return threshold or -1.0
    return torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()


TIES = sparsified(
    name="ties",
    title="TIES",
    summary="base model plus the mean of the large differences that agree in sign",
    formula=f"{ELECTED}; tᵢ: the largest numbers of δᵢ",
    reference="Yadav et al. 2023, arXiv 2306.01708",
    options=TIESOptions.model_validate({}),
    sparsify=trimmed,
    election=True,
    reduce=thresholds,
    thresholds=1,
)
