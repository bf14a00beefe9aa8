"""Fisher: each parameter weighted by its diagonal Fisher information (Matena & Raffel 2022, arXiv 2111.09832)."""

from __future__ import annotations

from pydantic import Field

from merganser.methods.base import Facts, Needs, Options, Share, Unit
from merganser.methods.least_squares import LeastSquares, Rule
from merganser.methods.metrics import Diagonal


class FisherOptions(Options):
    """Options of :data:`FISHER`."""

    ridge: float = Field(
        1e-6, ge=0, description="pull toward the average, relative to the mean Fisher information of the tensor"
    )


def _treat(fact: Facts, options: FisherOptions) -> str:
    return "fisher" if fact.fishers and all(fact.fishers) else "no Fisher information in the statistics"


def _metric(unit: Unit, share: Share, options: FisherOptions) -> Diagonal:
    return Diagonal(share.fisher(unit.names[0]))


FISHER = LeastSquares(
    name="fisher",
    title="Fisher",
    summary="weighted by diagonal Fisher information; needs statistics collected with --fisher",
    formula="Σcᵢfᵢθᵢ / Σcᵢfᵢ, fᵢ the diagonal Fisher information",
    reference="Matena & Raffel 2022, arXiv 2111.09832",
    needs=Needs(statistics="fisher"),
    options=FisherOptions.model_validate({}),
    treat=_treat,
    rules={"fisher": Rule(Diagonal, _metric)},
)
