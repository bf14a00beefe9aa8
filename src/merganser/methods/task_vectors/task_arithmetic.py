"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): θ₀ + s Σ cᵢδᵢ."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from merganser.methods.base import sums_to_zero
from merganser.methods.elementwise import Position
from merganser.methods.task_vectors.sparsified import TaskVectorOptions, sparsified


class TaskArithmeticOptions(TaskVectorOptions):
    """Options of :data:`TASK_ARITHMETIC`."""

    scale: float = Field(0.4, description="multiplier of the summed task vectors")


def _all(delta: Tensor, index: int, options: TaskArithmeticOptions, position: Position) -> Tensor:
    return delta


def _weights(coefficients: Sequence[float], options: TaskArithmeticOptions) -> list[float]:
    divides = options.normalize and not sums_to_zero(coefficients)
    factor = options.scale / (sum(coefficients) if divides else 1.0)
    return [factor * coefficient for coefficient in coefficients]


TASK_ARITHMETIC = sparsified(
    name="task_arithmetic",
    title="Task arithmetic",
    summary="base model plus a multiple of the summed differences from it",
    formula="θ₀ + s·Σcᵢδᵢ",
    reference="Ilharco et al. 2023, arXiv 2212.04089",
    options=TaskArithmeticOptions.model_validate({}),
    sparsify=_all,
    election=False,
    weighted=_weights,
)
