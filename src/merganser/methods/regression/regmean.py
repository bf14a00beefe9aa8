"""RegMean: each linear layer as a regression on its own inputs (Jin et al., ICLR 2023, arXiv 2212.09849).

W* = (Σ cᵢWᵢG̃ᵢ)(Σ cᵢG̃ᵢ)⁻¹ with G̃ᵢ the Gram matrix of the layer's inputs, its off-diagonals times α. Two extensions
ride along: a bias is the weight of one more input that is always 1, and an embedding is a linear map of one-hot
inputs, whose Gram matrix is the diagonal of token frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from pydantic import Field

from merganser.methods.base import UNKNOWN, UNSEEN, Facts, Needs, Options, Share, Unit
from merganser.methods.least_squares import LeastSquares, Rule, layers_of
from merganser.methods.metrics import Diagonal, Gram
from merganser.methods.sums import augment

_MOST = 2**26  # numbers of weights that share a factorisation, unless a single one has more


class RegMeanOptions(Options):
    """Options of :data:`REGMEAN`."""

    alpha: float = Field(0.9, ge=0, le=1, description="multiplier of the Gram matrices' off-diagonals")
    diagonal: bool = Field(False, description="use the Gram matrices' diagonals alone (the same as alpha 0)")
    ridge: float = Field(0.0, ge=0, description="pull toward the average, relative to tr(G)/d")
    augment_bias: bool = Field(True, description="solve a layer's bias with its weight, as an input that is always 1")
    embeddings: bool = Field(True, description="merge embeddings row by row, by token counts")


def _treat(fact: Facts, options: RegMeanOptions) -> str:
    if fact.layer is None:
        return "bias" if fact.bias_of else "not a linear map"
    if fact.layer.kind == "unknown":
        return UNKNOWN
    if fact.layer.kind == "embedding":
        if not options.embeddings:
            return "embeddings are switched off"
        return "token counts" if fact.counts and all(fact.counts) else "no token counts in the statistics"
    if fact.grams and not any(fact.grams) and UNSEEN in fact.grams:
        return "an expert that no contributor's data reached"
    return "gram" if fact.grams and None not in fact.grams else "no Gram matrix in the statistics"


def _join(units: Sequence[Unit], by_name: Mapping[str, Facts], options: RegMeanOptions) -> list[Unit]:
    """Layers that share an input become one unit, because they share a factorisation; their biases go with them."""
    groups: dict[tuple[object, ...], list[tuple[Facts, Facts | None]]] = {}
    for fact in (unit.facts[0] for unit in units if unit.kind == "gram"):
        bias = by_name.get(fact.layer.bias or "") if fact.layer and options.augment_bias else None
        key = (fact.grams, bias is not None, fact.name if fact.alone or fact.stack else None)
        groups.setdefault(key, []).append((fact, bias))
    joined = [unit for unit in units if unit.kind != "gram"]
    for members in (part for group in groups.values() for part in _portions(group)):
        facts = [*(fact for fact, _ in members), *(bias for _, bias in members if bias)]
        joined.append(Unit(tuple(fact.name for fact in facts), "gram", tuple(facts)))
    return joined


def _portions(group: Sequence[tuple[Facts, Facts | None]]) -> list[list[tuple[Facts, Facts | None]]]:
    """A group in portions of about :data:`_MOST` numbers: all experts of a layer could be several gigabytes."""
    portions: list[list[tuple[Facts, Facts | None]]] = []
    room = 0
    for member in group:
        size = prod(member[0].shape)
        if size > room:
            portions.append([])
            room = _MOST
        portions[-1].append(member)
        room -= size
    return portions


def _gram(unit: Unit, share: Share, options: RegMeanOptions) -> Gram:
    layers, with_bias = layers_of(unit)
    gram = share.gram(layers[0].weight)
    return Gram(augment(gram, share.mean(layers[0].weight)) if with_bias else gram)


def _counts(unit: Unit, share: Share, options: RegMeanOptions) -> Diagonal:
    return Diagonal(share.count(unit.names[0])[:, None])


def _alpha(options: RegMeanOptions) -> float:
    return 0.0 if options.diagonal else float(options.alpha)


REGMEAN = LeastSquares(
    name="regmean",
    title="RegMean",
    summary="least squares on each layer's inputs; needs statistics (Gram matrices)",
    formula="(ΣcᵢWᵢGᵢ)(ΣcᵢGᵢ)⁻¹, Gᵢ = E[xxᵀ] of the layer's inputs, off-diagonals times α",
    reference="Jin et al. 2023, arXiv 2212.09849",
    needs=Needs(statistics="gram"),
    options=RegMeanOptions.model_validate({}),
    treat=_treat,
    join=_join,
    rules={"gram": Rule(Gram, _gram), "token counts": Rule(Diagonal, _counts)},
    alpha=_alpha,
)
