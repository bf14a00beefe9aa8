"""Fisher: each parameter weighted by its diagonal Fisher information (Matena & Raffel 2022, arXiv 2111.09832)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements
from merganser.methods.least_squares import solve_diagonal


class FisherOptions(Options):
    """Options of :class:`Fisher`."""

    ridge: float = Field(
        1e-6,
        ge=0,
        description="pull toward the average, relative to the mean Fisher information of the tensor",
    )


class Fisher(Method):
    """θ = Σcᵢfᵢθᵢ / Σcᵢfᵢ elementwise; the average where no contributor has information."""

    name = "fisher"
    summary = "weighted by diagonal Fisher information; needs statistics collected with --fisher"
    Options = FisherOptions
    needs_statistics = True

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Every tensor whose Fisher information all contributors publish."""
        units, reasons = [], {}
        for fact in facts:
            if fact.fishers and all(fact.fishers):
                units.append(Unit((fact.name,), "fisher", (fact,)))
            else:
                reasons[fact.name] = "no Fisher information in the statistics"
        return units, reasons

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """The elementwise solution."""
        (name,) = unit.names
        solution = solve_diagonal(
            [share.tensor(name) for share in shares],
            [share.coefficient for share in shares],
            [share.fisher(name) for share in shares],
            self.options.ridge,
        )
        return Merged({name: solution.value}, solution.note)

    def memory(self, unit: Unit, contributors: int) -> int:
        """Weights and information of every contributor, and the solver's three sums."""
        return elements(unit) * (8 * contributors + 3 * 8 + 8)
