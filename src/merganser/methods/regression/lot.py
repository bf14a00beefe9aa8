"""LOT: RegMean on task vectors (Sun et al., NeurIPS 2025, arXiv 2505.23859).

T* = (ΣcᵢδᵢGᵢ)(ΣcᵢGᵢ)⁺ minimises how far each layer's outputs drift from those of the fine-tuned models. For every
direction that some contributor's inputs have it is what RegMean gives without shrinking off-diagonals. Where no inputs
lie, the pseudo-inverse leaves the base model as it is, while RegMean here averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field

from merganser.methods.base import Facts, Needs, Unit
from merganser.methods.regression.regmean import REGMEAN, RegMeanOptions


class LOTOptions(RegMeanOptions):
    """Options of :data:`LOT`."""

    alpha: float = Field(1.0, ge=0, le=1, description="multiplier of the Gram matrices' off-diagonals")
    toward: Literal["average", "base"] = Field("base", description="what is merged where no inputs lie")


def _treat(fact: Facts, options: LOTOptions) -> str:
    return REGMEAN.treat(fact, options) if fact.in_base else "not in the base model"


def _join(units: list[Unit], by_name: Mapping[str, Facts], options: LOTOptions) -> list[Unit]:
    return REGMEAN.join(units, {name: fact for name, fact in by_name.items() if fact.in_base}, options)


LOT = replace(
    REGMEAN,
    name="lot",
    title="LOT",
    summary="least squares of task vectors on each layer's inputs; needs statistics (Gram matrices) and the base model",
    formula="W₀ + (ΣcᵢδᵢGᵢ)(ΣcᵢGᵢ)⁺, Gᵢ = E[xxᵀ] of the layer's inputs",
    reference="Sun et al. 2025, arXiv 2505.23859",
    needs=Needs(base=True, statistics="gram"),
    options=LOTOptions.model_validate({}),
    treat=_treat,
    join=_join,
)
