"""Model Breadcrumbs (Davari & Belilovsky 2024, arXiv 2312.06795): no outliers, no small numbers.

Of n numbers of δᵢ the ⌊γn⌋ largest magnitudes are dropped, the next ⌊density·n⌋ are kept and the rest dropped, row by
row or over whole tensors. What would leave fewer than the density asks for drops fewer outliers. Of equal magnitudes at
a bound, all are kept. A tensor of one dimension is one row. What is left is summed as by task arithmetic, or elected as
by TIES.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf, prod
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from merganser.methods import devices
from merganser.methods.base import PerContributor, of_contributor
from merganser.methods.elementwise import Position, Whole, fits_kernels
from merganser.methods.selection import kth_largest
from merganser.methods.task_vectors.sparsified import (
    ELECTED,
    ElectionOptions,
    RescalingOptions,
    TaskVectorOptions,
    sparsified,
)


class MiddleOptions(RescalingOptions):
    """Options of methods that keep what is neither large nor small."""

    density: PerContributor[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.15, description="share of each task vector that is kept (β)"
    )
    gamma: PerContributor[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.006, description="share of each task vector, its largest numbers, that is dropped before (γ)"
    )
    whole: bool = Field(False, description="choose over whole tensors, instead of row by row")


class BreadcrumbsOptions(MiddleOptions, TaskVectorOptions):
    """Options of :data:`BREADCRUMBS`."""

    scale: float = Field(0.2, description="multiplier of the summed task vectors")


class BreadcrumbsTIESOptions(MiddleOptions, ElectionOptions):
    """Options of :data:`BREADCRUMBS_TIES`."""


def _counts(size: int, number: int, options: MiddleOptions) -> tuple[int, int]:
    """How many of so many numbers of a contributor are dropped as outliers, and how many are kept after them."""
    keep = floor(of_contributor(options.density, number) * size)
    return min(floor(of_contributor(options.gamma, number) * size), size - keep), keep


def _bounds(whole: Whole, coefficients: Sequence[float], options: MiddleOptions) -> list[tuple[float, float]] | None:
    """Of each contributor, the smallest and the largest magnitude that is kept; None where that is found by rows."""
    if not options.whole:
        return None
    size = prod(whole.shape)
    counts = [_counts(size, number, options) for number in whole.position(0, 0).contributors]

    def read(start: int, stop: int) -> list[Tensor]:
        deltas = [delta.to(torch.float32) for delta in whole.deltas(start, stop)]
        return [delta for delta in deltas for _ in range(2)]  # one after the other, while it is in the core's cache

    places = [place if keep else 0 for drop, keep in counts for place in (drop + keep, drop + 1)]
    found = kth_largest(read, whole.height, whole.width, places)
    return list(zip(found[::2], found[1::2], strict=True))


def _middle(delta: Tensor, index: int, options: MiddleOptions, position: Position) -> Tensor:
    if position.whole is not None and fits_kernels(delta):
        from merganser.methods import kernels

        kernels.keep_between(kernels.flat(delta), *map(np.float32, position.whole[index]))
        return delta
    magnitudes = delta.abs().to(torch.float32)
    if position.whole is not None:
        least, most = position.whole[index]
    else:
        least, most = _bounds_of_rows(magnitudes, position.contributors[index], options)
    not_above = magnitudes.clone().le_(most)  # in place, comparisons give 0 and 1 as numbers, which multiply faster
    return delta.mul_(magnitudes.ge_(least)).mul_(not_above)


def _bounds_of_rows(magnitudes: Tensor, number: int, options: MiddleOptions) -> tuple[Tensor, Tensor]:
    """The smallest and the largest magnitude that is kept of each row, in a shape that goes with all numbers'."""
    width = prod(magnitudes.shape[1:]) if magnitudes.dim() > 1 else magnitudes.numel()
    drop, keep = _counts(width, number, options)
    shape = (-1,) + (1,) * (magnitudes.dim() - 1) if magnitudes.dim() > 1 else magnitudes.shape[:0]
    if not keep:
        return torch.tensor(inf), torch.tensor(inf)
    rows, places = magnitudes.reshape(-1, width), (width - drop - keep, width - drop - 1)
    if devices.elsewhere(rows):
        least, most = (rows.kthvalue(place + 1).values for place in places)
    else:
        ascending = np.sort(rows.numpy(), axis=1)
        least, most = (torch.from_numpy(ascending[:, place].copy()) for place in places)
    return least.reshape(shape), most.reshape(shape)


_REFERENCE = "Davari & Belilovsky 2024, arXiv 2312.06795"

BREADCRUMBS = sparsified(
    name="breadcrumbs",
    title="Breadcrumbs",
    summary="base model plus a multiple of the summed differences, without the largest and the smallest of each row",
    formula="θ₀ + s·Σcᵢtᵢ; tᵢ: of each row of δᵢ the next largest share after the γ largest",
    reference=_REFERENCE,
    options=BreadcrumbsOptions.model_validate({}),
    sparsify=_middle,
    election=False,
    reduce=_bounds,
    thresholds=2,
    by_rows=True,
)

BREADCRUMBS_TIES = sparsified(
    name="breadcrumbs_ties",
    title="Breadcrumbs with TIES' election",
    summary="base model plus the mean of the middling differences of each row that agree in sign",
    formula=f"{ELECTED}; tᵢ: of each row of δᵢ the next largest share after the γ largest",
    reference=f"{_REFERENCE}; Yadav et al. 2023, arXiv 2306.01708",
    options=BreadcrumbsTIESOptions.model_validate({}),
    sparsify=_middle,
    election=True,
    reduce=_bounds,
    thresholds=2,
    by_rows=True,
)
