"""SCE (Wan et al. 2024, arXiv 2408.07990): select, calculate, erase.

Select: the numbers of a tensor that vary most between contributors, a share of those that vary at all. Calculate: a
contributor's weight is the mean of its squared δᵢ over them. Erase: a number that has not the sign of Σcᵢδᵢ does not
count. The result is θ₀ + s · the weighted mean of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor, inf

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, Position, Whole, blocks_of_rows, fits_kernels, stacked
from merganser.methods.selection import kth_largest
from merganser.methods.task_vectors.sparsified import elect


class SCEOptions(Options):
    """Options of :data:`SCE`."""

    density: float = Field(
        0.1, ge=0, le=1, description="share of the numbers that vary, those that vary most, that give the weights"
    )
    masked: bool = Field(False, description="merge the selected numbers only, and leave the others as in the base")
    equal_below: float = Field(
        0.0, ge=0, description="take equal weights where the mean squares of all contributors sum to less than this"
    )
    scale: float = Field(1.0, description="multiplier of the merged task vector")


def _spread(deltas: Sequence[Tensor]) -> Tensor:
    """The variance over contributors, times their number, in float32; the same in whatever order they come."""
    if fits_kernels(*deltas):
        from merganser.methods import kernels

        return torch.from_numpy(kernels.spread(stacked(deltas))).reshape(deltas[0].shape)
    sums, squares = (torch.zeros_like(deltas[0], dtype=torch.float64) for _ in range(2))
    for delta in deltas:
        wide = delta.to(torch.float64)
        sums.add_(wide)
        squares.addcmul_(wide, wide)
    return squares.mul_(len(deltas)).sub_(sums.square_()).div_(len(deltas)).clamp_min_(0).to(torch.float32)


def _threshold(whole: Whole, density: float) -> float:
    """The smallest spread that is selected; infinite where none is."""

    def spread(start: int, stop: int) -> list[Tensor]:
        deltas = whole.deltas(start, stop)
        blocks = blocks_of_rows(deltas[0])
        return [
            torch.cat([_spread([delta[here] for delta in deltas]) for here in blocks]) if blocks else _spread(deltas)
        ]

    return kth_largest(spread, whole.height, whole.width, [lambda varying: floor(density * varying)])[0]


def _weighed(whole: Whole, coefficients: Sequence[float], options: SCEOptions) -> tuple[float, list[float]]:
    """The smallest spread that is selected, and the weights."""
    threshold = _threshold(whole, options.density) if options.density < 1 else -1.0
    squares = [0.0] * len(coefficients)
    for _, _, deltas in whole.blocks() if threshold < inf else ():
        selected = _spread(deltas).ge_(threshold)
        for index, delta in enumerate(deltas):
            squares[index] += float(delta.square_().mul_(selected).sum(dtype=torch.float64))
    total = sum(squares)
    if total <= options.equal_below * whole.height * whole.width:
        squares, total = [1.0] * len(squares), float(len(squares))
    return threshold, [abs(c) * square / total for c, square in zip(coefficients, squares, strict=True)]


def _merge(
    base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: SCEOptions, position: Position
) -> Tensor:
    threshold, weights = position.whole
    task_vectors = list(deltas)
    if options.masked:
        selected = _spread(task_vectors).ge_(threshold)
        task_vectors = [delta.mul_(selected) for delta in task_vectors]
    return elect(iter(task_vectors), base, coefficients, True, weights)


SCE = Elementwise(
    name="sce",
    title="SCE",
    summary="base model plus the mean of the differences that agree in sign, weighed by squares where they differ",
    formula="θ₀ + s·Σwᵢδᵢ / Σwᵢ over the i whose δᵢ has the sign of Σcᵢδᵢ; wᵢ = cᵢ·mean of δᵢ² where the δᵢ vary most",
    reference="Wan et al. 2024, arXiv 2408.07990",
    needs=Needs(base=True, signed=True, normalised=False),
    options=SCEOptions.model_validate({}),
    function=_merge,
    reduce=_weighed,
)
