"""TACT: ACTMat with inputs estimated from the larger half of each task vector (arXiv 2604.01329, the authors' code).

What is merged is all of every task vector; only the estimate of the Gram matrices leaves its small numbers out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from merganser.methods.base import PerContributor
from merganser.methods.regression.actmat import ACTMAT, ACTMatOptions


class TACTOptions(ACTMatOptions):
    """Options of :data:`TACT`."""

    density: PerContributor[Annotated[float, Field(gt=0, le=1)]] = Field(
        0.5, description="share of each task vector, by magnitude, that inputs are estimated from"
    )


TACT = replace(
    ACTMAT,
    name="tact",
    title="TACT",
    summary="least squares on inputs estimated from the large differences; needs the base model",
    formula="(ΣcᵢWᵢGᵢ)(ΣcᵢGᵢ)⁻¹, Gᵢ = tᵢᵀtᵢ, tᵢ: the largest numbers of δᵢ",
    options=TACTOptions.model_validate({}),
)
