"""Alignment by what units do: permute hidden units and heads whose activations go together, then average.

The second way of Git Re-Basin (Ainsworth et al. 2023, 2209.04836, section 3.1), with correlations in place of inner
products as in Li et al. 2016 (1511.07543) and ZipIt! (Stoica et al. 2024, 2305.03053). All contributors read the same
texts. A unit's activation is what it gives to the block's last layer; a head's, the numbers of all its places. ZipIt!
may also merge units of one model with each other, which is not done here: units are paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from merganser.methods.alignment.blocks import UnitAxis, split, unit_count
from merganser.methods.alignment.rebasin import Rebasin, RebasinOptions
from merganser.methods.base import Needs, Share, Unit, input_width
from merganser.paths import path_as_text

_STILL = 1e-6  # of a unit's largest activation: one that varies by less says nothing


class ActivationOptions(RebasinOptions):
    """Options of :data:`ACTIVATIONS`."""

    data: Annotated[str, BeforeValidator(path_as_text)] = Field(
        "", description="texts that all models read: a file, or the name of a data set"
    )
    tokens: int = Field(4096, ge=2, le=2**24, description="how many tokens of the texts are looked at")
    seed: int = Field(0, ge=0, lt=2**63, description="of the choice of these")
    similarity: Literal["correlation", "product"] = Field(
        "correlation", description="of two units: their correlation, or the mean product of their activations"
    )


@dataclass(frozen=True, kw_only=True)
class ByActivations(Rebasin):
    """Average of units permuted by their activations; see the module."""

    @property
    def streaming(self) -> str:
        """Texts go through a model as a whole."""
        return f"one model while it reads the texts; then {super().streaming}"

    def features(self, unit: Unit, share: Share) -> Tensor:
        """Activations of each unit, (units, numbers), so that inner products are the similarities."""
        seen = share.activations(unit.names[-1]).to("cpu", torch.float64)
        if self.options.similarity == "correlation":
            seen = standardised(seen)
        rows = split(seen.T, UnitAxis(0, 1), unit_count(unit)).flatten(1)
        return rows / len(seen) ** 0.5

    def memory(self, unit: Unit, contributors: int) -> int:
        """Beside the weights the activations of one model and of all together, in float64."""
        seen = self.options.tokens * input_width(unit.facts[-1])
        return super().memory(unit, contributors) + seen * 8 * 6


def standardised(seen: Tensor) -> Tensor:
    """Columns of mean 0 and standard deviation 1 (zeros where nothing varies), from (tokens, width) in float64.

    Inner products of such columns, over the number of tokens, are their correlations.
    """
    largest = seen.abs().amax(0)
    centred = seen - seen.mean(0)
    deviation = centred.square().mean(0).sqrt()
    varies = deviation > _STILL * largest
    return torch.where(varies, centred / torch.where(varies, deviation, 1.0), 0.0)


ACTIVATIONS = ByActivations(
    name="activations",
    title="Activation matching",
    summary="average of hidden units and heads permuted to do the same on texts at hand; needs SciPy",
    formula="Σcᵢ PᵢθᵢQᵢ / Σcᵢ, with the permutations whose units' activations correlate most",
    reference="Ainsworth et al. 2023, arXiv 2209.04836; Stoica et al. 2024, arXiv 2305.03053",
    needs=Needs(layers=True, data=True, package=("scipy", "scipy")),
    options=ActivationOptions.model_validate({}),
)
