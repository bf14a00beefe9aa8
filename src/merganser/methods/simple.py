"""Simple: the weighted average of the parameters (Wortsman et al. 2022, arXiv 2203.05482; McMahan et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from merganser.methods.base import Facts, Merged, Method, Share, Unit, average_unit


class Simple(Method):
    """θ = Σcᵢθᵢ / Σcᵢ for every tensor."""

    name = "simple"
    summary = "weighted average; needs nothing"
    signed = True

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Every tensor by itself."""
        return [Unit((fact.name,), "average", (fact,)) for fact in facts], {}

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """The weighted average."""
        return average_unit(unit, shares)

    def grain(self, unit: Unit) -> int | None:
        """Elementwise."""
        return 1
