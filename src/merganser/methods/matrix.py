"""Matrix methods: the third shape, W = f(W₀, W₁, …, Wₙ) for each linear layer; everything else is averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Self, overload

import torch
from torch import Tensor

from merganser.methods.base import (
    UNKNOWN,
    Facts,
    Merged,
    Method,
    Options,
    Share,
    Unit,
    as_matrix,
    as_stored,
    average,
    elements,
    input_width,
    output_height,
    separately,
)  # fmt: skip

#: The kind of a unit that is no linear layer, of which the option ``rest`` says how it is merged.
REST = "the base model plus a multiple of the averaged task vectors"


class Weights(Sequence[Tensor]):
    """The contributors' weights of one layer, (out, in) in float32 or wider: read when asked for, anew each time.

    Args:
        shares: of the contributors.
        fact: of the layer's weight.
    """

    def __init__(self, shares: Sequence[Share], fact: Facts) -> None:
        self._shares, self._fact = shares, fact

    def __len__(self) -> int:
        return len(self._shares)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Weights: ...

    def __getitem__(self, index: int | slice) -> Tensor | Weights:
        if isinstance(index, slice):
            return Weights(self._shares[index], self._fact)
        return as_matrix(self._shares[index].tensor(self._fact.name), self._fact)


def lengthening(lengths: Sequence[float], whole: float) -> float:
    """k = Σ‖cᵢδᵢ‖ / ‖Σcᵢδᵢ‖: how much shorter task matrices become by their sum, from 1 where they agree.

    It is at most √n, which no n task matrices without a negative cosine go beyond. So contributors that contradict each
    other are not made louder.

    Args:
        lengths: ‖cᵢδᵢ‖ of each.
        whole: ‖Σcᵢδᵢ‖.
    """
    return min(max(1.0, sum(lengths) / whole), sqrt(len(lengths))) if whole > 0 else 1.0


def lengthening_of(matrices: Iterator[Tensor]) -> float:
    """The same of at least one task matrix cᵢδᵢ, each read once; the first is added to."""
    whole = next(matrices)
    lengths = [norm(whole)]
    for matrix in matrices:
        lengths.append(norm(matrix))
        whole.add_(matrix)
    return lengthening(lengths, norm(whole))


def norm(matrix: Tensor) -> float:
    """The Frobenius norm, in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class Matrix(Method):
    """A method that computes each weight of a linear layer as a whole; it has ``Needs(layers=True)``.

    Everything else is averaged. Where the method has an option ``rest``, it is the base model plus so many times the
    averaged task vectors: 1 is the average, 0 the base model.

    Attributes:
        function: of the base model's weight (None for a method that needs no base model), the contributors' weights
            (see :class:`Weights`), the coefficients and the options: the merged weight. All are (out, in) in float32 or
            wider, and the function's own.
        room: of the outputs, the inputs and the number of contributors: the bytes that the function holds at its worst
            moment; by default it is taken to hold a few float64 matrices of each contributor.
    """

    function: Callable[[Any, Sequence[Tensor], Sequence[float], Any], Tensor]
    room: Callable[[int, int, int], int] | None = None

    @property
    def rest(self) -> float:
        """What the averaged task vectors of everything else are multiplied by."""
        return float(getattr(self.options, "rest", 1.0))

    def configured(self, options: Options) -> Self:
        """Where the rest is part of the way between base model and average, coefficients have to have a sum."""
        method = super().configured(options)
        if method.rest in (0, 1):
            return method
        return replace(method, needs=replace(method.needs, normalised=True))

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """The weight of every linear layer; of those that the base model holds, where it is needed."""

        def treat(fact: Facts) -> str:
            if fact.layer is None or fact.layer.kind == "embedding":
                return REST if self.rest != 1 and fact.in_base else "not the weight of a linear layer"
            if fact.layer.kind == "unknown":
                return UNKNOWN
            return self.name if fact.in_base or not self.needs.base else "not in the base model"

        return separately(facts, treat, (self.name, REST))

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """One call."""
        (name,), (fact,) = unit.names, unit.facts
        if unit.kind == REST:
            return Merged({name: self._of_rest(name, shares)})
        base = as_matrix(shares[0].base(name), fact) if self.needs.base else None
        coefficients = [share.coefficient for share in shares]
        return Merged({name: as_stored(self.function(base, Weights(shares, fact), coefficients, self.options), fact)})

    def _of_rest(self, name: str, shares: Sequence[Share]) -> Tensor:
        base = shares[0].base(name)
        return base if self.rest == 0 else base + self.rest * (average(name, shares) - base)

    def min_slice_rows(self, unit: Unit) -> int | None:
        """The rest is merged number by number."""
        return 1 if unit.kind == REST else None

    def memory(self, unit: Unit, contributors: int) -> int:
        """What the function holds, the base model's weight, and one contributor's as it is read."""
        if unit.kind == REST:
            return elements(unit) * 4 * 6
        height, width = output_height(unit.facts[0]), input_width(unit.facts[0])
        if self.room is not None:
            return self.room(height, width, contributors) + elements(unit) * 4 * 3
        return elements(unit) * 8 * (2 * contributors + 4) + max(height, width) ** 2 * 8 * 2
