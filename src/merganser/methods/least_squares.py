"""Least squares: θ* = argmin Σᵢ cᵢ‖θ − θᵢ‖²_Mᵢ + λ‖θ − θ̄‖², the second shape of method: it *is* its metrics Mᵢ.

Every solution is written as the weighted average θ̄ = Σcᵢθᵢ/Σcᵢ plus a correction computed from differences of the θᵢ.
So the ridge λ pulls toward the average and never toward zero, merging a model with itself returns it, and what
rounding does is in proportion to how much the contributors differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from merganser.checkpoints.layers import Layer
from merganser.methods.base import (
    Facts,
    Merged,
    Method,
    Options,
    Share,
    Unit,
    as_matrix,
    as_stored,
    average_unit,
    elements,
    input_width,
    output_height,
    separately,
    transposed,
    wide,
)  # fmt: skip
from merganser.methods.matrix import lengthening_of
from merganser.methods.metrics import (
    STEPS,
    Diagonal,
    Gram,
    Identity,
    Metric,
    Operator,
    Preconditioner,
    solve_iteratively,
)
from merganser.methods.spectral.singular import flattened
from merganser.methods.sums import BLOCK, GramSums, Solution

#: Off-diagonals times this or less leave a system with eigenvalues of at least 1 − alpha beside its diagonal.
_WELL = 0.95
#: Rows of a slice where the whole metric has to be known first, so that slices cost something.
ROWS = 64

Form = TypeVar("Form", bound=Metric)


@dataclass(frozen=True)
class Rule:
    """How some tensors get their metric.

    Attributes:
        form: the class of the metric.
        metric: of a unit and one contributor's share of it, and the options.
        local: whether the metric of some rows is told by these rows alone, or by none.
    """

    form: type[Metric]
    metric: Callable[[Unit, Share, Any], Metric]
    local: bool = True


def _one_by_one(units: list[Unit], by_name: Mapping[str, Facts], options: Any) -> list[Unit]:
    return units


def _unshrunk(options: Any) -> float:
    return 1.0


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Method):
    """A method that is a choice of metrics.

    An option ``ridge`` is λ, relative to the mean of the summed metric, and an option ``steps`` the most steps of
    conjugate gradients where they are needed.

    With options ``scale`` and ``spectrum``, what is solved by conjugate gradients is W₀ + scale · τ, τ = W − W₀ with
    singular values at the power k^-spectrum (:func:`~merganser.methods.matrix.lengthening`) and its old length. Unless
    they are 1 and 0, a base model is needed.

    With an option ``toward`` of ``base``, λ and whatever the metrics say nothing of pull to the base model, as the
    pseudo-inverse of a sum over task vectors does, instead of to the average.

    Attributes:
        treat: the rule of a tensor, by its name in ``rules``, or the reason why there is none.
        rules: by the kind of unit.
        join: makes one unit of several whose tensors share a factorisation.
        alpha: the multiplier of the off-diagonals of Gram matrices.
        start: where conjugate gradients start; None, or what answers None: at the average.
        precondition: of the weighted metrics and λ, what comes near the inverse of their sum, symmetric and positive.
    """

    treat: Callable[[Facts, Any], str]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    join: Callable[[list[Unit], Mapping[str, Facts], Any], list[Unit]] = _one_by_one
    alpha: Callable[[Any], float] = _unshrunk
    start: Callable[[Unit, Sequence[Share], Any], Tensor | None] | None = None
    precondition: Preconditioner | None = None

    @property
    def streaming(self) -> str:
        """A system is factored as a whole; what it solves is cut into rows."""
        forms = {rule.form for rule in self.rules.values()}
        if forms <= {Identity, Diagonal}:
            return "some rows of a tensor"
        return "some rows of a layer, and its Gram matrix" if Gram in forms else "one layer of every model"

    @property
    def ridge(self) -> float:
        """λ, relative to the mean of the summed metric."""
        return float(getattr(self.options, "ridge", 0.0))

    @property
    def toward_base(self) -> bool:
        """Whether λ pulls to the base model; it is an option of methods that need one."""
        return getattr(self.options, "toward", "average") == "base"

    def configured(self, options: Options) -> Self:
        """Where what layers change is changed itself, the base model is read."""
        method = super().configured(options)
        if not method.changes:
            return method
        return replace(method, needs=replace(method.needs, base=True))

    def weights(self, coefficients: Sequence[float]) -> list[float] | None:
        """cᵢ/Σc of the weighted average."""
        if {rule.form for rule in self.rules.values()} != {Identity}:
            return None
        return [coefficient / sum(coefficients) for coefficient in coefficients]

    @property
    def scale(self) -> float:
        """The multiplier of what layers change."""
        return float(getattr(self.options, "scale", 1.0))

    @property
    def spectrum(self) -> float:
        """How far the singular values of what layers change are made more alike."""
        return float(getattr(self.options, "spectrum", 0.0))

    @property
    def changes(self) -> bool:
        """Whether what layers change is made longer, or its singular values are made more alike."""
        return self.scale != 1.0 or self.spectrum != 0.0

    def form(self, unit: Unit) -> type[Metric]:
        """The class of a unit's metrics."""
        return self.rules[unit.kind].form

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Those that ``treat`` has a rule for, and what joins them."""
        units, reasons = separately(facts, lambda fact: self.treat(fact, self.options), self.rules)
        units = self.join(units, {fact.name: fact for fact in facts}, self.options)
        treated = {name for unit in units for name in unit.names}
        return units, {name: reason for name, reason in reasons.items() if name not in treated}

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """Sums of Gram matrices, diagonals elementwise, and anything else by conjugate gradients."""
        form = self.form(unit)
        if form is Identity:
            return average_unit(unit, shares)
        if form is Gram:
            sums = self.new_sums()
            for share in shares:
                self.add(unit, share, sums)
            return self.solve(unit, sums)
        if form is Diagonal:
            return self._elementwise(unit, shares, None)
        (fact, *_), is_layer = unit.facts, unit.facts[0].layer is not None
        solution = solve_iteratively(
            (stacked(unit, share) if is_layer else as_matrix(share.tensor(fact.name), fact) for share in shares),
            [share.coefficient for share in shares],
            [self._metric(unit, share, Operator) for share in shares],
            self.ridge,
            start=self.start and self.start(unit, shares, self.options),
            precondition=self.precondition,
            steps=int(getattr(self.options, "steps", STEPS)),
        )
        value = solution.value
        if self.changes and is_layer and all(one.in_base for one in unit.facts):
            value = self._changed(value, unit, shares)
        merged = _unstacked(value, unit) if is_layer else {fact.name: as_stored(value, fact)}
        return Merged(merged, solution.note)

    def _changed(self, value: Tensor, unit: Unit, shares: Sequence[Share]) -> Tensor:
        """What the options ``scale`` and, but for the column of a bias, ``spectrum`` make of a layer's solution."""
        base, weight = stacked(unit, shares[0], base=True).to(value), slice(input_width(unit.facts[0]))
        change = value.sub_(base)
        if self.spectrum:
            tasks = ((stacked(unit, one).to(base) - base)[:, weight].mul_(one.coefficient) for one in shares)
            change[:, weight] = flattened(change[:, weight], lengthening_of(tasks) ** -self.spectrum)
        return torch.add(base, change, alpha=self.scale)

    def min_slice_rows(self, unit: Unit) -> int | None:
        """Rows where the metric is diagonal, and output rows of linear layers, at the price of preparing the whole."""
        form, local = self.form(unit), self.rules[unit.kind].local
        if form is Identity:
            return 1
        if form is Diagonal:
            # Fisher information would be read twice, for its mean and for the slices; changes of weights are at hand.
            rereads = bool(self.ridge and self.needs.statistics)
            return None if not local else ROWS if rereads else 1
        return BLOCK if form is Gram and not any(transposed(fact) for fact in unit.facts) else None

    def prepare(self, unit: Unit, shares: Sequence[Share]) -> Callable[[Unit, Sequence[Share]], Merged]:
        """Factor the system of Gram matrices once; each slice is a right-hand side of its own. Sum up diagonals."""
        form = self.form(unit)
        if form is Diagonal:
            mean = 0.0
            if self.ridge:
                metrics = (self.diagonal(unit, share) for share in shares)
                mean = float(summed_diagonal(metrics, [share.coefficient for share in shares]).mean())
            return lambda part, restricted: self._elementwise(part, restricted, mean)
        if form is not Gram:
            return self.merge
        local, alpha = self.rules[unit.kind].local, self.alpha(self.options)
        kept: dict[int, Tensor] = {}
        whole = self.new_sums()
        for share in shares:
            gram = self._gram(unit, share)
            if not local:
                kept[share.number] = gram
            stored = wide(share.rows(unit.names[0], 0, 1)).dtype
            whole.add(gram.new_empty(0, gram.shape[0], dtype=stored), gram, share.coefficient, alpha)
        factored = whole.factor(self.ridge, toward_reference=self.toward_base)

        def solve(part: Unit, restricted: Sequence[Share]) -> Merged:
            sums = GramSums(dtype=whole.dtype)  # that of the system, whatever the slice
            for share in restricted:
                gram = self._gram(part, share) if local else kept[share.number]
                self._refer(part, share, gram, sums)
                sums.add_right(stacked(part, share), gram, share.coefficient, alpha)
            return Merged(_unstacked(factored.solve(sums), part), factored.note)

        return solve

    def memory(self, unit: Unit, contributors: int) -> int:
        """By the form of the metric.

        Grams: as read, augmented (or else a packed triangle), the system; wide copies where alpha asks for float64;
        those of all contributors where slices cannot tell them. Weights: one contributor's, three sums, the merged
        ones. Diagonals: weights and metric of every contributor, and the solver's three sums.
        """
        form, width = self.form(unit), input_width(unit.facts[0]) + 1
        if form is Identity:
            return elements(unit) * 4 * 4
        if form is Diagonal:
            return elements(unit) * (8 * contributors + 4 * 8)
        if form is Gram:
            grams = 28 if self.alpha(self.options) > _WELL else 12 if layers_of(unit)[1] else 10
            if self.rules[unit.kind].local:
                return width**2 * grams + elements(unit) * 7 * 4
            kept = 8 * contributors if unit.facts[0].rows is not None else 0
            return width**2 * (grams + kept) + elements(unit) * 11 * 4
        height = elements(unit) // max(width - 1, 1)
        read = 2 * 8 * max(width, height) ** 2  # a packed triangle, the matrix of it, its copy
        bases = 0 if self.precondition is None else 8 * (width**2 + height**2) + 8 * 3 * max(width, height) ** 2
        held = 11 if self.changes else 9  # the base, and what is added to it
        return (width**2 + height**2) * 8 * contributors + max(read, bases) + elements(unit) * 8 * held

    def additive(self, unit: Unit) -> bool:
        """Linear layers with Gram matrices are."""
        return self.form(unit) is Gram

    def new_sums(self) -> GramSums:
        """In float32 where alpha keeps the system far from singular."""
        return GramSums(dtype=None if self.alpha(self.options) <= _WELL else torch.float64)

    def add(self, unit: Unit, share: Share, sums: GramSums) -> None:
        """Count a contributor: its weights stacked, its Gram matrix once."""
        gram = self._gram(unit, share)
        self._refer(unit, share, gram, sums)
        sums.add(stacked(unit, share), gram, share.coefficient, self.alpha(self.options))

    def _refer(self, unit: Unit, share: Share, gram: Tensor, sums: GramSums) -> None:
        """Make the base model the reference of new sums, where that is what λ pulls to."""
        if self.toward_base and sums.reference is None:
            sums.add_right(stacked(unit, share, base=True), gram, 0.0)

    def solve(self, unit: Unit, sums: GramSums) -> Merged:
        """One factorisation for all layers that share the input."""
        solution = sums.solve(self.ridge, toward_reference=self.toward_base)
        return Merged(_unstacked(solution.value, unit), solution.note)

    def _gram(self, unit: Unit, share: Share) -> Tensor:
        return self._metric(unit, share, Gram).matrix

    def diagonal(self, unit: Unit, share: Share) -> Tensor:
        """A contributor's metric where it is diagonal, broadcastable to the tensor."""
        return self._metric(unit, share, Diagonal).values

    def _metric(self, unit: Unit, share: Share, form: type[Form]) -> Form:
        metric = self.rules[unit.kind].metric(unit, share, self.options)
        if not isinstance(metric, form):
            raise TypeError(f"method {self.name!r}: {type(metric).__name__} is not a metric of {form.__name__}")
        return metric

    def _elementwise(self, unit: Unit, shares: Sequence[Share], mean: float | None) -> Merged:
        (name,) = unit.names
        solution = solve_diagonal(
            [share.tensor(name) for share in shares],
            [share.coefficient for share in shares],
            [self.diagonal(unit, share) for share in shares],
            self.ridge,
            mean,
            shares[0].base(name) if self.toward_base else None,
        )
        return Merged({name: solution.value}, solution.note)


def layers_of(unit: Unit) -> tuple[list[Layer], bool]:
    """The layers of a unit, and whether their biases are in it."""
    layers = [fact.layer for fact in unit.facts if fact.layer]
    return layers, len(unit.names) > len(layers)


def stacked(unit: Unit, share: Share, *, base: bool = False) -> Tensor:
    """The weights (out, in) of layers that share an input, on top of each other; the bias as one more column.

    Args:
        unit: of the layers.
        share: a contributor's.
        base: the base model's weights instead.
    """
    pieces, read = [], share.base if base else share.tensor
    _, with_bias = layers_of(unit)
    for fact in unit.facts:
        if fact.layer is None:
            continue
        weight = as_matrix(read(fact.name), fact)
        if with_bias and fact.layer.bias:
            weight = torch.cat([weight, read(fact.layer.bias)[:, None]], dim=1)
        pieces.append(weight)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _unstacked(weights: Tensor, unit: Unit) -> dict[str, Tensor]:
    """The inverse of :func:`stacked`, by on-disk name and in on-disk orientation."""
    _, with_bias = layers_of(unit)
    facts = [fact for fact in unit.facts if fact.layer]
    heights = [output_height(fact) for fact in facts]
    tensors = {}
    for weight, fact in zip(weights.split(heights), facts, strict=True):
        if with_bias and fact.layer and fact.layer.bias:
            tensors[fact.layer.bias] = weight[:, -1]
            weight = weight[:, :-1]
        tensors[fact.name] = as_stored(weight, fact)
    return tensors


def weighted_average(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """θ̄ = Σcᵢθᵢ / Σcᵢ in float64.

    Args:
        tensors: n tensors of one shape.
        coefficients: n numbers whose sum is not zero.
    """
    total = float(sum(coefficients))
    mean = tensors[0].to(torch.float64) * (coefficients[0] / total)
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        mean += tensor.to(torch.float64) * (coefficient / total)
    return mean


def solve_diagonal(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    metrics: Sequence[Tensor],
    ridge: float,
    mean: float | None = None,
    toward: Tensor | None = None,
) -> Solution:
    """Elementwise solution for diagonal metrics: θ̄ + Σcᵢmᵢ(θᵢ − θ̄) / (Σcᵢmᵢ + λ), λ = ridge · mean(Σcᵢmᵢ).

    Where all metrics are zero, the weighted average θ̄.

    Args:
        tensors: n tensors of one shape.
        coefficients: n non-negative numbers, not all zero.
        metrics: n non-negative tensors, broadcastable to that shape.
        ridge: pull toward the average, relative to the mean of the summed metric.
        mean: that mean, where these are some rows only of a larger tensor.
        toward: what stands in the place of θ̄.
    """
    average = weighted_average(tensors, coefficients) if toward is None else toward.to(torch.float64)
    weight = summed_diagonal(metrics, coefficients)
    correction = torch.zeros_like(average)
    for tensor, coefficient, metric in zip(tensors, coefficients, metrics, strict=True):
        scaled = metric.to(torch.float64) * coefficient
        correction += scaled * (tensor.to(torch.float64) - average)
    weight = weight + ridge * (weight.mean() if mean is None else mean)
    return Solution(average + torch.where(weight > 0, correction / weight.clamp_min(1e-300), 0.0))


def summed_diagonal(metrics: Iterable[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σcᵢmᵢ in float64."""
    weight = torch.zeros((), dtype=torch.float64)
    for metric, coefficient in zip(metrics, coefficients, strict=True):
        weight = weight + metric.to(torch.float64) * coefficient
    return weight
