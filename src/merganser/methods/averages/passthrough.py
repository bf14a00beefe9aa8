"""Passthrough: one model as it is, or times a number; of use where layers of several are put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, PerContributor, of_contributor
from merganser.methods.elementwise import Elementwise, Position


class PassthroughOptions(Options):
    """Options of :data:`PASSTHROUGH`."""

    scale: PerContributor[float] = Field(1.0, description="multiplier of the model's tensors")


def _passed(
    base: None,
    tensors: Iterator[Tensor],
    coefficients: Sequence[float],
    options: PassthroughOptions,
    position: Position,
) -> Tensor:
    scale = of_contributor(options.scale, position.contributors[0])
    tensor = next(tensors)
    return tensor if scale == 1 else tensor.mul_(scale)


PASSTHROUGH = Elementwise(
    name="passthrough",
    title="Passthrough",
    summary="one model as it is, or scaled",
    formula="s·θ₁",
    reference="mergekit's passthrough",
    needs=Needs(models=1, weighted=False),
    options=PassthroughOptions.model_validate({}),
    function=_passed,
)
