"""DARE (Yu et al. 2024, arXiv 2311.03099): task vectors lose numbers at random, and the rest are scaled up."""

import torch
from pydantic import Field

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, added


class RandomDropOptions(Options):
    density: float = Field(0.5, gt=0, le=1, description="share of each task vector that is kept")
    scale: float = Field(1.0, description="multiplier of the summed task vectors")
    seed: int = Field(0, description="of the random choice")


def _sum(base, deltas, coefficients, options, position):  # type: ignore[no-untyped-def]
    total = torch.zeros_like(base)
    for index, (delta, coefficient) in enumerate(zip(deltas, coefficients, strict=True)):
        kept = position.uniform(delta, index, options.seed) < options.density
        total = added(total, delta.mul_(kept), coefficient / options.density)
    return total


RANDOM_DROP = Elementwise(
    name="random_drop",
    title="Random drop",
    summary="base model plus what is left of the differences after a random choice",
    needs=Needs(base=True, signed=True, normalised=False),
    options=RandomDropOptions.model_validate({}),
    function=_sum,
)
