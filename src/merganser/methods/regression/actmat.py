"""ACTMat: Gram matrices estimated from how far fine-tuning moved the weights (arXiv 2604.01329).

The rows of Δᵢ = Wᵢ − W₀ are sums of layer inputs weighted by error signals, so ΔᵢᵀΔᵢ stands in for the Gram matrix.
Only the base model is needed: no data, no statistics. Beyond the paper, the same estimate of an input that is always 1
is ‖Δbᵢ‖² for a bias, and that of one-hot inputs is the diagonal of ‖Δ row‖² for an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import (
    UNKNOWN,
    Facts,
    Needs,
    Options,
    PerContributor,
    Share,
    Unit,
    input_width,
    of_contributor,
    transposed,
)
from merganser.methods.least_squares import LeastSquares, Rule
from merganser.methods.metrics import Diagonal, Gram
from merganser.methods.selection import kth_largest
from merganser.methods.sums import BLOCK


class ACTMatOptions(Options):
    """Options of :data:`ACTMAT`."""

    ridge: float = Field(0.01, ge=0, description="pull toward the average, relative to tr(G)/d")
    toward: Literal["average", "base"] = Field("average", description="what the ridge pulls to")
    density: PerContributor[Annotated[float, Field(gt=0, le=1)]] = Field(
        1.0, description="share of each task vector, by magnitude, that inputs are estimated from"
    )
    biases: bool = Field(True, description="weigh biases by how far they moved, instead of averaging them")
    embeddings: bool = Field(True, description="weigh rows of embeddings by how far they moved, instead of averaging")


def _treat(fact: Facts, options: ACTMatOptions) -> str:
    layer = fact.layer or fact.bias_of
    if layer is None:
        return "not a linear map"
    if layer.kind == "unknown":
        return UNKNOWN
    if not fact.in_base:
        return "not in the base model"
    if fact.layer is None:
        return "bias change" if options.biases else "biases are switched off"
    if layer.kind == "embedding":
        return "row changes" if options.embeddings else "embeddings are switched off"
    return "estimated gram"


def _gram(unit: Unit, share: Share, options: ACTMatOptions) -> Gram:
    width, turned = input_width(unit.facts[0]), transposed(unit.facts[0])
    gram = torch.zeros(width, width, dtype=torch.float64, device=share.rows(unit.names[0], 0, 1).device)
    density = of_contributor(options.density, share.number)
    threshold = _threshold(unit, share, density) if density < 1 else 0.0
    for part in _changes(unit, share):
        if threshold:
            part[part.abs().to(torch.float32) < threshold] = 0
        part = part.T if turned else part
        gram.addmm_(part.T, part)
    return Gram(gram)


def _threshold(unit: Unit, share: Share, density: float) -> float:
    """The smallest magnitude that a Gram matrix is estimated from."""
    (name,), (fact,) = unit.names, unit.facts
    height, width = fact.shape[0], prod(fact.shape[1:])

    def read(start: int, stop: int) -> list[Tensor]:
        return [_change(name, share, start, min(stop, height)).to(torch.float32)]

    (found,) = kth_largest(read, height, width, [max(1, int(density * height * width))])
    return found


def _changes(unit: Unit, share: Share) -> Iterator[Tensor]:
    """Δ in float64, in blocks of rows; as a whole where inputs lie along the rows."""
    (name,), (fact,) = unit.names, unit.facts
    step = fact.shape[0] if transposed(fact) else BLOCK
    for start in range(0, fact.shape[0], step):
        change = _change(name, share, start, min(start + step, fact.shape[0]))
        yield change.flatten(1) if change.dim() > 2 else change


def _change(name: str, share: Share, start: int, stop: int) -> Tensor:
    return share.rows(name, start, stop).to(torch.float64) - share.base_rows(name, start, stop)


def _rows(unit: Unit, share: Share, options: ACTMatOptions) -> Diagonal:
    return Diagonal(torch.cat([part.square().sum(1, keepdim=True) for part in _changes(unit, share)]))


def _bias(unit: Unit, share: Share, options: ACTMatOptions) -> Diagonal:
    return Diagonal(torch.cat([part.square() for part in _changes(unit, share)]).sum(0, keepdim=True))


ACTMAT = LeastSquares(
    name="actmat",
    title="ACTMat",
    summary="least squares on estimated inputs; needs the base model",
    formula="(ΣcᵢWᵢGᵢ)(ΣcᵢGᵢ)⁻¹, Gᵢ = δᵢᵀδᵢ",
    reference="arXiv 2604.01329",
    needs=Needs(base=True, layers=True),
    options=ACTMatOptions.model_validate({}),
    treat=_treat,
    rules={
        "estimated gram": Rule(Gram, _gram, local=False),
        "row changes": Rule(Diagonal, _rows),
        "bias change": Rule(Diagonal, _bias, local=False),
    },
)
