"""MaTS: least squares in the Kronecker-factored Fisher information of each layer (Tam, Bansal & Raffel 2023).

K-FAC says what an error Δ of a layer's weight costs: ⟨Δ, BΔA⟩ with A = E[x xᵀ] of the layer's inputs and B = E[g gᵀ] of
the gradients of its outputs. RegMean is the same with B = I. For several contributors ΣcᵢBᵢWAᵢ = ΣcᵢBᵢWᵢAᵢ has no
closed form, and is solved by conjugate gradients, two products a contributor and step.

The paper stops after a number of steps, which acts as a regularisation, and starts at a simpler merge; what has no
factors is averaged there. Here layers without B, such as the head of a vocabulary, are merged as RegMean does, biases
with their weights as an input that is always 1, and embeddings by token counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from merganser.methods.base import UNSEEN, Facts, Needs, Options, Share, Unit
from merganser.methods.kronecker import Kronecker, kronecker, normalised
from merganser.methods.least_squares import LeastSquares, Rule, layers_of, stacked
from merganser.methods.regression.regmean import REGMEAN
from merganser.methods.sums import GramSums, augment


class MaTSOptions(Options):
    """Options of :data:`MATS`."""

    steps: int = Field(100, ge=1, le=100_000, description="of conjugate gradients, at most; few regularise")
    start: Literal["average", "regmean"] = Field("average", description="the simpler merge to start from")
    ridge: float = Field(0.0, ge=0, description="pull toward the average, relative to the metric's mean diagonal")
    damping: float = Field(
        0.0, ge=0, description="added to the diagonal of each output factor B, relative to the mean of its diagonal"
    )
    alpha: float = Field(1.0, ge=0, le=1, description="multiplier of the off-diagonals of both factors")
    augment_bias: bool = Field(True, description="solve a layer's bias with its weight, as an input that is always 1")
    embeddings: bool = Field(True, description="merge embeddings row by row, by token counts")


def _treat(fact: Facts, options: MaTSOptions) -> str:
    factored = fact.layer is not None and fact.layer.kind in ("linear", "conv1d") and len(fact.shape) == 2
    published = bool(fact.outputs) and all(fact.outputs) and None not in fact.grams and UNSEEN not in fact.grams
    if factored and published and fact.stack is None:
        return "kronecker"
    return REGMEAN.treat(fact, options)


def _join(units: Sequence[Unit], by_name: Mapping[str, Facts], options: MaTSOptions) -> list[Unit]:
    """A layer with both factors is a unit of its own, with its bias; the others as RegMean joins them."""
    joined = REGMEAN.join([unit for unit in units if unit.kind != "kronecker"], by_name, options)
    for fact in (unit.facts[0] for unit in units if unit.kind == "kronecker"):
        bias = by_name.get(fact.layer.bias or "") if fact.layer and options.augment_bias else None
        facts = (fact,) if bias is None else (fact, bias)
        joined.append(Unit(tuple(one.name for one in facts), "kronecker", facts))
    return joined


def _metric(unit: Unit, share: Share, options: MaTSOptions) -> Kronecker:
    outputs, outer = normalised(share.gradients(unit.facts[0].name), options.alpha, options.damping)
    inputs, inner = normalised(inputs_of(unit, share), options.alpha)
    return kronecker(outputs, inputs, outer * inner)


def inputs_of(unit: Unit, share: Share) -> Tensor:
    """A, with a row and column for the bias where it is in the unit."""
    name, (_, with_bias) = unit.facts[0].name, layers_of(unit)
    return augment(share.gram(name), share.mean(name)) if with_bias else share.gram(name)


def _start(unit: Unit, shares: Sequence[Share], options: MaTSOptions) -> Tensor | None:
    """RegMean's solution, one factorisation, where it is asked for."""
    if options.start == "average":
        return None
    sums = GramSums()
    for share in shares:
        sums.add(stacked(unit, share), inputs_of(unit, share), share.coefficient, options.alpha)
    return sums.solve(options.ridge).value


MATS = LeastSquares(
    name="mats",
    title="MaTS",
    summary="least squares on inputs and output gradients (K-FAC); needs statistics collected with --kfac",
    formula="the W with ΣcᵢBᵢ(W − Wᵢ)Aᵢ = 0, Aᵢ = E[xxᵀ] of the layer's inputs, Bᵢ = E[ggᵀ] of its outputs' gradients",
    reference="Tam et al. 2023, arXiv 2312.04339",
    needs=Needs(statistics="kfac"),
    options=MaTSOptions.model_validate({}),
    treat=_treat,
    join=_join,
    rules={"kronecker": Rule(Kronecker, _metric, local=False), **REGMEAN.rules},
    alpha=lambda options: float(options.alpha),
    start=_start,
)
