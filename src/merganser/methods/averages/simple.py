"""Simple: the weighted average of the parameters (Wortsman et al. 2022, arXiv 2203.05482; McMahan et al. 2017)."""

from __future__ import annotations

from merganser.methods.base import Facts, Needs, Options, Share, Unit
from merganser.methods.least_squares import LeastSquares, Rule
from merganser.methods.metrics import Identity


def _treat(fact: Facts, options: Options) -> str:
    return "average"


def _metric(unit: Unit, share: Share, options: Options) -> Identity:
    return Identity()


SIMPLE = LeastSquares(
    name="simple",
    title="Simple",
    summary="weighted average; needs nothing",
    formula="Σcᵢθᵢ / Σcᵢ",
    reference="Wortsman et al. 2022, arXiv 2203.05482; McMahan et al. 2017, arXiv 1602.05629",
    needs=Needs(signed=True),
    treat=_treat,
    rules={"average": Rule(Identity, _metric)},
)
