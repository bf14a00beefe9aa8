"""Task matrices cᵢδᵢ, δᵢ = Wᵢ − W₀, of one linear layer: what the methods of this family have in common.

Such a method is a function of these matrices that gives the change of the base model's weight; :func:`spectral` makes
the method of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import added
from merganser.methods.matrix import Matrix, lengthening_of
from merganser.methods.spectral.singular import flattened, in_enough_precision


class SpectralOptions(Options):
    """Options that every method of this family has."""

    scale: float = Field(1.0, description="multiplier of the merged task matrix")
    spectrum: float = Field(
        0.0, ge=0, description="its singular values to the power k^-spectrum, k = Σ‖cᵢδᵢ‖ / ‖Σcᵢδᵢ‖, at its old length"
    )
    rest: float = Field(1.0, description="multiplier of the averaged task vectors of everything but linear layers")


@dataclass(frozen=True)
class TaskMatrices:
    """cᵢδᵢ of the contributors whose coefficient is not zero, read anew each time.

    Attributes:
        base: W₀ (m, n).
        weights: Wᵢ.
        coefficients: cᵢ.
        dtype: to compute in.
    """

    base: Tensor
    weights: Sequence[Tensor]
    coefficients: Sequence[float]
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Tensor]:
        for number, coefficient in enumerate(self.coefficients):
            if coefficient:
                matrix = self.weights[number].to(self.dtype).sub_(self.base)
                yield matrix if coefficient == 1 else matrix.mul_(coefficient)

    def __len__(self) -> int:
        return sum(coefficient != 0 for coefficient in self.coefficients)

    @property
    def rank(self) -> int:
        """The most that a matrix of this shape can have."""
        return min(self.base.shape)

    def total(self) -> Tensor:
        """Σ cᵢδᵢ; needs a coefficient that is not zero."""
        return reduce(Tensor.add_, self)


def spectral(
    merged: Callable[[TaskMatrices, Any], Tensor],
    *,
    options: SpectralOptions,
    room: Callable[[int, int, int], int],
    **words: str,
) -> Matrix:
    """A method of this family.

    Args:
        merged: of the task matrices, in float32 or float64, and the options: the change of the base model's weight.
            It may raise :class:`~merganser.methods.spectral.singular.Imprecise` in float32.
        options: of the method.
        room: see :class:`~merganser.methods.matrix.Matrix`.
        words: name, title, summary, formula and reference.
    """

    def function(base: Tensor, weights: Sequence[Tensor], coefficients: Sequence[float], settings: Any) -> Tensor:
        if not any(coefficients):
            return base

        def compute(dtype: torch.dtype) -> Tensor:
            tasks = TaskMatrices(base, weights, coefficients, dtype)
            change = merged(tasks, settings)
            return flattened(change, lengthening_of(iter(tasks)) ** -settings.spectrum) if settings.spectrum else change

        change = in_enough_precision(compute, base.shape, weights[0].dtype)
        return added(base, change, settings.scale)

    needs = Needs(base=True, layers=True, signed=True, normalised=False)
    return Matrix(**words, needs=needs, options=options, function=function, room=room)
