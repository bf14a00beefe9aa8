"""RegMean: each linear layer as a regression on its own inputs (Jin et al., ICLR 2023, arXiv 2212.09849).

W* = (Σ cᵢWᵢG̃ᵢ)(Σ cᵢG̃ᵢ)⁻¹ with G̃ᵢ the Gram matrix of the layer's inputs, its off-diagonals times α. Two extensions
ride along: a bias is the weight of one more input that is always 1, and an embedding is a linear map of one-hot
inputs, whose Gram matrix is the diagonal of token frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from merganser.checkpoints.layers import Layer
from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements, input_width, turned
from merganser.methods.least_squares import solve_diagonal
from merganser.methods.sums import BLOCK, GramSums
from merganser.statistics.algebra import augment

#: Off-diagonals times this or less leave a system with eigenvalues of at least 1 − alpha beside its diagonal.
_WELL = 0.95


class RegMeanOptions(Options):
    """Options of :class:`RegMean`."""

    alpha: float = Field(0.9, ge=0, le=1, description="multiplier of the Gram matrices' off-diagonals")
    diagonal: bool = Field(False, description="use the Gram matrices' diagonals alone (the same as alpha 0)")
    ridge: float = Field(0.0, ge=0, description="pull toward the average, relative to tr(G)/d")
    augment_bias: bool = Field(
        True, description="solve a layer's bias with its weight, as an input that is always 1"
    )
    embeddings: bool = Field(True, description="merge embeddings row by row, by token counts")


class RegMean(Method):
    """Closed-form regression mean of linear layers; see the module."""

    name = "regmean"
    summary = "least squares on each layer's inputs; needs statistics (Gram matrices)"
    Options = RegMeanOptions
    needs_statistics = True

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Linear layers with a Gram matrix everywhere, grouped by input; embeddings with counts everywhere."""
        by_name = {fact.name: fact for fact in facts}
        groups: dict[tuple[object, ...], list[Facts]] = {}
        units: list[Unit] = []
        reasons: dict[str, str] = {}
        for fact in facts:
            layer = fact.layer
            if layer is None:
                continue
            if layer.tied:
                reasons[fact.name] = "tied: one tensor serves several layers"
            elif layer.kind == "embedding":
                if not self.options.embeddings:
                    reasons[fact.name] = "embeddings are switched off"
                elif fact.counts and all(fact.counts):
                    units.append(Unit((fact.name,), "token counts", (fact,)))
                else:
                    reasons[fact.name] = "no token counts in the statistics"
            elif fact.grams and all(fact.grams):
                key = (fact.grams, self._bias(layer, by_name) is not None, fact.name if fact.alone else None)
                groups.setdefault(key, []).append(fact)
            else:
                reasons[fact.name] = "no Gram matrix in the statistics"
        for members in groups.values():
            biases = [self._bias(fact.layer, by_name) for fact in members if fact.layer]
            everyone = [*members, *(bias for bias in biases if bias)]
            units.append(Unit(tuple(fact.name for fact in everyone), "gram", tuple(everyone)))
        treated = {name for unit in units for name in unit.names}
        for fact in facts:
            if fact.name not in treated:
                reasons.setdefault(fact.name, "bias" if fact.bias_of else "not a linear map")
        return units, reasons

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """Token counts elementwise, Gram matrices by their sums."""
        if unit.kind == "token counts":
            return self._by_counts(unit, shares, None)
        sums = self.new_sums()
        for share in shares:
            self.add(unit, share, sums)
        return self.solve(unit, sums)

    def grain(self, unit: Unit) -> int | None:
        """Rows of embeddings, and output rows of linear layers: these at the price of reading Gram matrices again."""
        if unit.kind == "token counts":
            return 1
        return None if any(turned(fact) for fact in unit.facts) else BLOCK

    def prepare(self, unit: Unit, shares: Sequence[Share]) -> Callable[[Unit, Sequence[Share]], Merged]:
        """Factor the system once; then each slice is a right-hand side of its own."""
        if unit.kind == "token counts":
            (name,) = unit.names
            total = sum(share.count(name).mean() * share.coefficient for share in shares)
            return lambda part, restricted: self._by_counts(part, restricted, float(total))
        layers, with_bias = _layers(unit)
        whole = self.new_sums()
        for share in shares:
            gram = self._gram(share, layers[0].weight, with_bias)
            stored = share.rows(layers[0].weight, 0, 1).dtype
            whole.add(gram.new_empty(0, gram.shape[0], dtype=stored), gram, share.coefficient, self._alpha)
        factored = whole.factor(self.options.ridge)

        def solve(part: Unit, restricted: Sequence[Share]) -> Merged:
            sums = GramSums(dtype=whole.dtype)  # that of the system, whatever the slice
            members, _ = _layers(part)
            for share in restricted:
                gram = self._gram(share, members[0].weight, with_bias)
                weights = _stack(pieces(share, members, with_bias))
                sums.add_right(weights, gram, share.coefficient, self._alpha)
            return Merged(_unstack(factored.solve(sums), part, with_bias), factored.note)

        return solve

    def memory(self, unit: Unit, contributors: int) -> int:
        """Grams: as read, augmented (or else a packed triangle), the system; wide copies where alpha asks for float64.

        Weights: one contributor's, three sums, the merged ones.
        """
        if unit.kind == "token counts":
            return elements(unit) * (8 * contributors + 4 * 8)
        width, with_bias = input_width(unit.facts[0]) + 1, _layers(unit)[1]
        grams = 28 if self.options.alpha > _WELL else 12 if with_bias else 10
        return width**2 * grams + elements(unit) * 7 * 4

    def _by_counts(self, unit: Unit, shares: Sequence[Share], mean: float | None) -> Merged:
        (name,) = unit.names
        solution = solve_diagonal(
            [share.tensor(name) for share in shares],
            [share.coefficient for share in shares],
            [share.count(name)[:, None] for share in shares],
            self.options.ridge,
            mean,
        )
        return Merged({name: solution.value}, solution.note)

    def additive(self, unit: Unit) -> bool:
        """Linear layers are."""
        return unit.kind == "gram"

    def new_sums(self) -> GramSums:
        """In float32 where alpha keeps the system far from singular."""
        return GramSums(dtype=None if self.options.alpha <= _WELL or self.options.diagonal else torch.float64)

    def add(self, unit: Unit, share: Share, sums: GramSums) -> None:
        """Count a contributor: its weights stacked, its Gram matrix once."""
        layers, with_bias = _layers(unit)
        stacked = _stack(pieces(share, layers, with_bias))
        sums.add(stacked, self._gram(share, layers[0].weight, with_bias), share.coefficient, self._alpha)

    def solve(self, unit: Unit, sums: GramSums) -> Merged:
        """One factorisation for all layers that share the input."""
        solution = sums.solve(self.options.ridge)
        return Merged(_unstack(solution.value, unit, _layers(unit)[1]), solution.note)

    def _bias(self, layer: Layer | None, by_name: dict[str, Facts]) -> Facts | None:
        if layer is None or layer.bias is None or not self.options.augment_bias:
            return None
        return by_name.get(layer.bias)

    def _gram(self, share: Share, weight: str, with_bias: bool) -> Tensor:
        gram = share.gram(weight)
        return augment(gram, share.mean(weight)) if with_bias else gram

    @property
    def _alpha(self) -> float:
        return 0.0 if self.options.diagonal else float(self.options.alpha)


def _layers(unit: Unit) -> tuple[list[Layer], bool]:
    """The layers of a unit, and whether their biases are in it."""
    layers = [fact.layer for fact in unit.facts if fact.layer]
    return layers, len(unit.names) > len(layers)


def pieces(share: Share, layers: Sequence[Layer], with_bias: bool) -> list[Tensor]:
    """The weights (out, in) of layers that share an input; the bias as one more column."""
    found = []
    for layer in layers:
        weight = share.tensor(layer.weight)
        weight = weight.T if layer.kind == "conv1d" else weight
        if with_bias and layer.bias:
            weight = torch.cat([weight, share.tensor(layer.bias)[:, None]], dim=1)
        found.append(weight)
    return found


def _stack(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _unstack(stacked: Tensor, unit: Unit, with_bias: bool) -> dict[str, Tensor]:
    """The inverse of :func:`pieces`, by on-disk name and in on-disk orientation."""
    facts = [fact for fact in unit.facts if fact.layer]
    heights = [fact.shape[1 if turned(fact) else 0] for fact in facts]
    if len(facts) == 1:  # it may have been given some of its rows only
        heights = [stacked.shape[0]]
    tensors = {}
    for weight, fact in zip(stacked.split(heights), facts, strict=True):
        if with_bias and fact.layer and fact.layer.bias:
            tensors[fact.layer.bias] = weight[:, -1]
            weight = weight[:, :-1]
        tensors[fact.name] = weight.T if turned(fact) else weight
    return tensors
