"""NearSwap (alchemonaut 2024): the first model, with the second swapped in where it is near.

Where the second differs by no more than t from the first, it is taken as it is; elsewhere the first moves by t towards
it: a weight of t / |difference| on the second is no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, Position


class NearSwapOptions(Options):
    """Options of :data:`NEARSWAP`."""

    t: float = Field(1e-4, ge=0, description="how far, at most, each number moves from the first model's")


def _swapped(
    base: None, tensors: Iterator[Tensor], coefficients: Sequence[float], options: NearSwapOptions, position: Position
) -> Tensor:
    first, *others = tensors
    for second in others:
        difference = second - first
        moved = first + difference.clamp(-options.t, options.t)
        return torch.where(difference.abs_() <= options.t, second, moved)
    return first


NEARSWAP = Elementwise(
    name="nearswap",
    title="NearSwap",
    summary="the first model, with the second swapped in where it is near",
    formula="θ₁ + min(max(θ₂ − θ₁, −t), t)",
    reference="alchemonaut 2024, QuartetAnemoi-70B-t0.0001",
    needs=Needs(models=2, weighted=False),
    options=NearSwapOptions.model_validate({}),
    function=_swapped,
)
