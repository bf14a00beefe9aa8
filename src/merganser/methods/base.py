"""What a merging method is, as a function of tensors: what it needs, which tensors it treats, and how.

A method is one file that makes an instance of a shape (elementwise, matrix, least squares), and one line in
``merganser.methods.METHODS``. It sees no file and no configuration: what it may ask for is a :class:`Share` per
contributor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, prod
from typing import Any, Literal, Protocol, Self, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from merganser.checkpoints.layers import Layer
from merganser.methods.products import Product, combined
from merganser.methods.sums import GramSums

UNSEEN = ""
UNKNOWN = "a matrix that the model multiplies by in a way that is not known"  # why a method leaves it to the average
_HALVES = (torch.bfloat16, torch.float16)
#: Coefficients and options beyond this would overflow float32 sums of what they multiply, which may itself be large.
LARGEST = 1e18
_ZERO = 1e-12  # of the largest coefficient, below which a sum is rounding


T = TypeVar("T")
#: An option that is one for all contributors, or a tuple with one for each of the recipe's, in their order.
PerContributor: TypeAlias = T | tuple[T, ...]


def of_contributor(option: PerContributor[T], number: int) -> T:
    """An option as it is for one contributor, by its number in the recipe."""
    return option[number] if isinstance(option, tuple) else option


class Options(BaseModel):
    """Base class of a method's options: unknown keys are errors, and numbers that float32 sums cannot hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        for name, option in self:
            for value in option if isinstance(option, tuple) else (option,):
                if isinstance(value, (int, float)) and abs(value) > LARGEST:
                    raise ValueError(f"{name} is {float(value):g}, beyond {LARGEST:g}, which float32 sums cannot hold")
        return self


@dataclass(frozen=True)
class Facts:
    """What a plan knows of a tensor without reading it.

    Attributes:
        name: on-disk name.
        shape: its shape.
        layer: the plain linear map whose weight it is, if it is one.
        bias_of: the layer whose bias it is, if it is one.
        grams: for each contributor, the key of the Gram matrix of this layer's input, or None; :data:`UNSEEN` for an
            expert that no token of its data reached.
        counts: for each contributor, whether token counts of this embedding are published.
        fishers: for each contributor, whether its Fisher information is published.
        outputs: for each contributor, whether it publishes the covariance of the gradients of this layer's outputs.
        in_base: whether the base model holds the tensor, in the same shape.
        heads: how many attention heads the model's layers have, where its configuration says so.
        alone: contributors vote on different rows of it, so that it shares a unit with no other layer.
        rows: which rows of the whole tensor these are; None: all.
        stack: how many such tensors lie behind each other in the stored one, as experts do; None: it is one.
    """

    name: str
    shape: tuple[int, ...]
    layer: Layer | None = None
    bias_of: Layer | None = None
    grams: tuple[str | None, ...] = ()
    counts: tuple[bool, ...] = ()
    fishers: tuple[bool, ...] = ()
    outputs: tuple[bool, ...] = ()
    in_base: bool = False
    heads: int | None = None
    alone: bool = False
    rows: Sequence[int] | None = None
    stack: int | None = None


class Share(Protocol):
    """One contributor's share of a unit; every tensor is read when asked for, anew each time, and the caller's own.

    Shares that are restricted to some rows (labels that only some contributors know, a slice of a tall tensor) answer
    with those rows alone.
    """

    @property
    def number(self) -> int:
        """Which contributor it is, from 0."""

    @property
    def coefficient(self) -> float:
        """The contributor's weight in the merge."""

    def stored(self, name: str) -> Tensor:
        """The contributor's tensor as it is stored, in on-disk orientation."""

    def tensor(self, name: str) -> Tensor:
        """The contributor's tensor, float32 or wider, in on-disk orientation."""

    def base(self, name: str) -> Tensor:
        """The base model's tensor, likewise."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of :meth:`stored`, without the others."""

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """The base model's rows, float32 or wider."""

    def gram(self, weight: str) -> Tensor:
        """(d, d): the mean of x xᵀ over the inputs of the layer with this weight."""

    def mean(self, weight: str) -> Tensor:
        """(d,): the mean input of that layer."""

    def gradients(self, weight: str) -> Tensor:
        """(out, out): the mean of g gᵀ over the gradients of the outputs of that layer, of these rows."""

    def count(self, weight: str) -> Tensor:
        """(vocabulary,): the share of all tokens that each id has."""

    def fisher(self, name: str) -> Tensor:
        """Diagonal Fisher information of a parameter, shaped like it."""

    def activations(self, weight: str) -> Tensor:
        """(tokens, inputs): the inputs of the layer with this weight on the texts at hand."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are merged together, because they share a factorisation.

    Attributes:
        names: of the tensors.
        kind: the method's own word for how, shown in plans and provenance.
        facts: of each tensor, in the order of ``names``.
    """

    names: tuple[str, ...]
    kind: str
    facts: tuple[Facts, ...]

    def stack(self) -> dict[str, tuple[int, int]]:
        """Where the rows of each tensor are when all weights of the unit are put on top of each other: (start, stop).

        A bias goes with the rows of its layer's weight.
        """
        places: dict[str, tuple[int, int]] = {}
        height = 0
        for fact in self.facts:
            if fact.bias_of is not None and fact.bias_of.weight in places:
                places[fact.name] = places[fact.bias_of.weight]
            else:
                rows = fact.shape[0] if fact.shape else 1
                places[fact.name] = (height, height + rows)
                height += rows
        return places

    def height(self) -> int:
        """The number of stacked rows."""
        return max(stop for _, stop in self.stack().values())

    def cut(self, start: int, stop: int) -> tuple[Unit, dict[str, tuple[int, int]]]:
        """The part of the unit that lies in stacked rows ``start:stop``, and each tensor's own rows there."""
        places = self.stack()
        ranges: dict[str, tuple[int, int]] = {}
        facts = []
        for fact in self.facts:
            first, last = places[fact.name]
            low, high = max(start, first), min(stop, last)
            if low < high:
                ranges[fact.name] = (low - first, high - first)
                own = (range(last - first) if fact.rows is None else fact.rows)[low - first : high - first]
                facts.append(replace(fact, shape=(len(own), *fact.shape[1:]), rows=own))
        return Unit(tuple(ranges), self.kind, tuple(facts)), ranges

    def without_publications(self) -> Unit:
        """Without what only the choice of units asks for: what each contributor publishes."""
        bare = (replace(f, grams=(), counts=(), fishers=(), outputs=(), alone=False) for f in self.facts)
        return replace(self, facts=tuple(bare))

    def only(self, rows: Sequence[int]) -> Unit:
        """The part of the unit that lies in these rows of each of its tensors."""
        facts = (replace(fact, shape=(len(rows), *fact.shape[1:]), rows=rows) for fact in self.facts)
        return replace(self, facts=tuple(facts))


@dataclass(frozen=True)
class Merged:
    """Merged tensors by name, float32 or wider, in on-disk orientation, and what was noteworthy.

    Of weights in ``products`` it is the difference from the base model, as (out, in), and the tensor is not made.
    """

    tensors: dict[str, Tensor]
    note: str | None = None
    products: dict[str, Product] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a method needs of a merge, so that a plan can refuse before any work.

    Attributes:
        base: the pre-trained model.
        statistics: every contributor's Gram matrices, Fisher information or both Kronecker factors of it (``kfac``);
            None where it reads no statistics.
        layers: which tensors are weights of linear layers; statistics say it anyway.
        models: exactly so many contributors; None: any number.
        at_least: so many contributors, or more.
        signed: negative coefficients have a meaning.
        normalised: it divides by the sum of the coefficients, which therefore cannot be zero.
        weighted: coefficients that differ have a meaning.
        data: texts at hand, which its options ``data``, ``tokens`` and ``seed`` name.
        package: a package beyond those of merganser, as (name to import, name to install).
    """

    base: bool = False
    statistics: Literal["gram", "fisher", "kfac"] | None = None
    layers: bool = False
    models: int | None = None
    at_least: int = 1
    signed: bool = False
    normalised: bool = True
    weighted: bool = True
    data: bool = False
    package: tuple[str, str] | None = None

    @property
    def structure(self) -> bool:
        """Whether it matters what a tensor is in the model: of which layer it is the weight, and what goes into it."""
        return self.layers or self.data or self.statistics is not None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A merging method with its options. Most are an instance of one of the three shapes.

    Attributes:
        name: in recipes and commands.
        title: in tables and figures.
        summary: one line for people who choose.
        formula: the merged parameter in one line of plain text, with θᵢ, θ₀, δᵢ = θᵢ − θ₀ and cᵢ.
        reference: the paper or source, such as ``Yadav et al. 2023, arXiv 2306.01708``.
        needs: what the plan has to check.
        options: of this merge; an instance of the class of the method's options.
    """

    name: str
    title: str
    summary: str
    formula: str = ""
    reference: str = ""
    needs: Needs = field(default_factory=Needs)
    options: Any = field(default_factory=Options)

    @property
    def options_type(self) -> type[Options]:
        """The class of the method's options."""
        return type(self.options)

    def configured(self, options: Options) -> Self:
        """The same method with other options."""
        return replace(self, options=options)

    @property
    def streaming(self) -> str:
        """How much of a model lies in memory while it is merged, in a few words."""
        return "one layer of every model"

    @abstractmethod
    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Which of the given tensors the method treats, grouped; and for each other one, why it does not."""

    @abstractmethod
    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """Merge one unit. Pure: reads only the shares, decides only by the options."""

    def weights(self, coefficients: Sequence[float]) -> list[float] | None:
        """The weight wᵢ of each contributor where θ − θ₀ = Σwᵢδᵢ for every tensor; None for any other method."""
        return None

    @property
    def takes_products(self) -> bool:
        """Whether changes of low rank can be merged by :meth:`merge_products`, without being multiplied out."""
        return self.weights([1.0]) is not None

    def merge_products(self, unit: Unit, products: Sequence[Product], shares: Sequence[Share]) -> Product:
        """The merge's difference from the base model.

        Args:
            unit: a single weight.
            products: each contributor's difference from it.
            shares: the contributors.
        """
        weights = self.weights([share.coefficient for share in shares])
        if weights is None:
            raise RuntimeError(f"{self.name} takes no products")
        return combined(products, weights)

    def min_slice_rows(self, unit: Unit) -> int | None:
        """The fewest stacked rows of the unit that can be merged apart; None where only the whole can.

        1 where slices cost nothing. Anything larger costs something (see :meth:`prepare`), and is cut, into multiples
        of it, only where memory asks for it.
        """
        return None

    @property
    def reads_twice(self) -> bool:
        """Whether :meth:`prepare` reads tensors, piece by piece, that the slices are then made of."""
        return False

    def prepare(self, unit: Unit, shares: Sequence[Share]) -> Callable[[Unit, Sequence[Share]], Merged]:
        """What merges slices of a unit that can be cut, after whatever has to be known of the whole.

        Args:
            unit: the whole unit.
            shares: whole shares.

        Returns:
            a function of a slice (see :meth:`Unit.cut`) and of shares restricted to it. All slices together are, to
            the byte, what :meth:`merge` gives.
        """
        return self.merge

    def memory(self, unit: Unit, contributors: int) -> int:
        """Estimate of the bytes of tensors that :meth:`merge` of a unit, or of a slice, holds at its worst moment."""
        return elements(unit) * 4 * (contributors + 7)

    def additive(self, unit: Unit) -> bool:
        """Whether the unit is merged by :meth:`add`, contributor by contributor in order, and :meth:`solve`.

        Such sums can be kept and added to later; contributors are read one at a time.
        """
        return False

    def new_sums(self) -> GramSums:
        """Sums of no contributor."""
        raise NotImplementedError

    def add(self, unit: Unit, share: Share, sums: GramSums) -> None:
        """Count one more contributor of an additive unit."""
        raise NotImplementedError

    def solve(self, unit: Unit, sums: GramSums) -> Merged:
        """The merge of the contributors counted so far; ``sums`` stay as they are."""
        raise NotImplementedError


def separately(
    facts: Sequence[Facts], treat: Callable[[Facts], str], kinds: Collection[str]
) -> tuple[list[Unit], dict[str, str]]:
    """A unit for each tensor that ``treat`` gives one of the kinds; anything else it says is the reason why not."""
    said = {fact.name: treat(fact) for fact in facts}
    units = [Unit((fact.name,), said[fact.name], (fact,)) for fact in facts if said[fact.name] in kinds]
    return units, {name: reason for name, reason in said.items() if reason not in kinds}


def sums_to_zero(coefficients: Sequence[float]) -> bool:
    """Whether coefficients cancel out but for rounding, so that nothing can be divided by their sum."""
    return abs(fsum(coefficients)) <= _ZERO * max(map(abs, coefficients), default=0.0)


def wide(stored: Tensor) -> Tensor:
    """A floating-point tensor in float32, or in float64 as it is."""
    return stored if stored.dtype == torch.float64 else stored.to(torch.float32)


def elements(unit: Unit) -> int:
    """The numbers of all tensors of a unit."""
    return sum(prod(fact.shape) for fact in unit.facts)


def transposed(fact: Facts) -> bool:
    """Whether a layer's weight lies on disk as (in, out)."""
    return fact.layer is not None and fact.layer.kind == "conv1d"


def input_width(fact: Facts) -> int:
    """The number of inputs of a layer, by the shape of its weight; of a convolution, those of a patch."""
    return fact.shape[0] if transposed(fact) else prod(fact.shape[1:])


def output_height(fact: Facts) -> int:
    """The number of outputs of a layer, by the shape of its weight."""
    return prod(fact.shape[1:]) if transposed(fact) else fact.shape[0]


def as_matrix(tensor: Tensor, fact: Facts) -> Tensor:
    """A weight, or some rows of it, as (out, in), from how it lies on disk."""
    flat = tensor.flatten(1) if tensor.dim() > 2 else tensor
    return flat.T if transposed(fact) else flat


def as_stored(matrix: Tensor, fact: Facts) -> Tensor:
    """A weight as it lies on disk, from (out, in)."""
    flat = matrix.T if transposed(fact) else matrix
    return flat if len(fact.shape) == 2 else flat.reshape(flat.shape[0], *fact.shape[1:])


def average(name: str, shares: Sequence[Share]) -> Tensor:
    """The weighted average of a tensor: what every method falls back to, and says so.

    R + Σcᵢ(θᵢ − R) / Σcᵢ with R the first contributor's, in one float32 buffer (float64 where a contributor is stored
    so): merging a model with itself returns it, rounding is in proportion to how much the contributors differ, and a
    division at the end keeps what lies halfway between two storable numbers there. Where all count the same, numbers
    of 16 bits are added as they are, which is faster: float32 has room for their sum.

    Raises:
        ValueError: the coefficients sum to zero.
    """
    if sums_to_zero([share.coefficient for share in shares]):
        raise ValueError("coefficients that sum to zero have no average")
    total = sum(share.coefficient for share in shares)
    first = shares[0].stored(name)
    if first.dtype in _HALVES and len({share.coefficient for share in shares}) == 1:
        mean = wide(first)
        for share in shares[1:]:
            stored = share.stored(name)
            mean = mean.add_(stored) if stored.dtype in _HALVES else mean + wide(stored)
        return mean.div_(len(shares))
    reference = wide(first)
    shift: Tensor | None = None
    for share in shares[1:]:
        tensor = wide(share.stored(name))
        if tensor.dtype != reference.dtype:
            tensor, reference = tensor.to(torch.float64), reference.to(torch.float64)
            shift = None if shift is None else shift.to(torch.float64)
        tensor -= reference
        if shift is not None:
            shift.add_(tensor, alpha=share.coefficient)
        else:
            shift = tensor if share.coefficient == 1 else tensor.mul_(share.coefficient)
    return reference if shift is None else reference.add_(shift.div_(total))


def average_unit(unit: Unit, shares: Sequence[Share]) -> Merged:
    """The weighted average of each tensor of a unit."""
    return Merged({name: average(name, shares) for name in unit.names})
