"""Matrix methods: the third shape, W = f(W₀, W₁, …, Wₙ) for each linear layer; everything else is averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merganser.methods.base import (
    UNKNOWN,
    Facts,
    Merged,
    Method,
    Share,
    Unit,
    as_matrix,
    as_stored,
    elements,
    input_width,
    separately,
)


@dataclass(frozen=True, kw_only=True)
class Matrix(Method):
    """A method that computes each weight of a linear layer as a whole; it has ``Needs(layers=True)``.

    Attributes:
        function: of the base model's weight (None for a method that needs no base model), the contributors' weights,
            all (out, in) in float32 or wider, the coefficients and the options: the merged weight.
    """

    function: Callable[[Any, Sequence[Tensor], Sequence[float], Any], Tensor]

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """The weight of every linear layer; of those that the base model holds, where it is needed."""

        def treat(fact: Facts) -> str:
            if fact.layer is None or fact.layer.kind == "embedding":
                return "not the weight of a linear layer"
            if fact.layer.kind == "unknown":
                return UNKNOWN
            return self.name if fact.in_base or not self.needs.base else "not in the base model"

        return separately(facts, treat, (self.name,))

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """One call."""
        (name,), (fact,) = unit.names, unit.facts
        base = as_matrix(shares[0].base(name), fact) if self.needs.base else None
        weights = [as_matrix(share.tensor(name), fact) for share in shares]
        coefficients = [share.coefficient for share in shares]
        return Merged({name: as_stored(self.function(base, weights, coefficients, self.options), fact)})

    def memory(self, unit: Unit, contributors: int) -> int:
        """A few matrices of each contributor in float64, and factors that are square on the wider side."""
        width = input_width(unit.facts[0])
        side = max(width, elements(unit) // max(width, 1))
        return elements(unit) * 8 * (2 * contributors + 4) + side**2 * 8 * 2
