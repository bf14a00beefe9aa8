"""RegMean++ (Nguyen et al. 2025, arXiv 2508.03121) in words and options; :mod:`merganser.sequential` carries it out.

It is RegMean with Gram matrices that do not exist before the merge: those of inputs that have passed through merged
lower layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from merganser.methods.base import Needs, Options
from merganser.methods.regression.regmean import REGMEAN


class RegMeanPPOptions(Options):
    """Options of :data:`REGMEAN_PP`."""

    examples: int = Field(256, ge=1, description="texts of each contributor, the first ones")
    alpha: float = Field(0.95, ge=0, le=1, description="multiplier of the Gram matrices' off-diagonals")
    ridge: float = Field(0.0, ge=0, description="pull toward the average, relative to tr(G)/d")
    augment_bias: bool = Field(False, description="solve a layer's bias with its weight; the paper averages biases")
    activations: Literal["memory", "disk"] = Field("memory", description="where a layer's outputs are kept meanwhile")
    task: str = Field("auto", description="how the data are read, as merganser collect has it")
    batch_size: int = Field(16, ge=1, description="texts in a batch; it changes no number beyond rounding")
    max_length: int | None = Field(None, ge=1, description="tokens at which a text is cut")


REGMEAN_PP = replace(
    REGMEAN,
    name="regmean_pp",
    title="RegMean++",
    summary="RegMean layer after layer, on inputs from the merged layers below; needs texts of every contributor",
    formula="(ΣcᵢWᵢGᵢ)(ΣcᵢGᵢ)⁻¹, Gᵢ = E[xxᵀ] of the layer's inputs after the merged layers below",
    reference="Nguyen et al. 2025, arXiv 2508.03121",
    needs=Needs(data=True),
    options=RegMeanPPOptions.model_validate({}),
)
