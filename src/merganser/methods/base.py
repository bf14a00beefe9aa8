"""What a merging method is: a choice of metric for each tensor, as a function of tensors.

A method is one file with one subclass of :class:`Method` and one line in ``merganser.methods.METHODS``. It sees no
file and no configuration: what it may ask for is a :class:`Share` per contributor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from merganser.checkpoints.layers import Layer
from merganser.methods.least_squares import weighted_average
from merganser.methods.sums import GramSums


class Options(BaseModel):
    """Base class of a method's options: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Facts:
    """What a plan knows of a tensor without reading it.

    Attributes:
        name: on-disk name.
        shape: its shape.
        layer: the plain linear map whose weight it is, if it is one.
        bias_of: the layer whose bias it is, if it is one.
        grams: for each contributor, the key of the Gram matrix of this layer's input, or None.
        counts: for each contributor, whether token counts of this embedding are published.
        fishers: for each contributor, whether its Fisher information is published.
        in_base: whether the base model holds the tensor, in the same shape.
        heads: how many attention heads the model's layers have, where its configuration says so.
        alone: contributors vote on different rows of it, so that it shares a unit with no other layer.
    """

    name: str
    shape: tuple[int, ...]
    layer: Layer | None = None
    bias_of: Layer | None = None
    grams: tuple[str | None, ...] = ()
    counts: tuple[bool, ...] = ()
    fishers: tuple[bool, ...] = ()
    in_base: bool = False
    heads: int | None = None
    alone: bool = False


class Share(Protocol):
    """One contributor's share of a unit; every tensor is read when asked for.

    ``rows``-restricted shares (labels that only some contributors know) answer with those rows alone.
    """

    @property
    def coefficient(self) -> float:
        """The contributor's weight in the merge."""

    def tensor(self, name: str) -> Tensor:
        """The contributor's tensor, float32 or wider, in on-disk orientation."""

    def base(self, name: str) -> Tensor:
        """The base model's tensor, likewise."""

    def gram(self, weight: str) -> Tensor:
        """(d, d): the mean of x xᵀ over the inputs of the layer with this weight."""

    def mean(self, weight: str) -> Tensor:
        """(d,): the mean input of that layer."""

    def count(self, weight: str) -> Tensor:
        """(vocabulary,): the share of all tokens that each id has."""

    def fisher(self, name: str) -> Tensor:
        """Diagonal Fisher information of a parameter, shaped like it."""


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


@dataclass(frozen=True)
class Merged:
    """Merged tensors by name, float32 or wider, in on-disk orientation, and what was noteworthy."""

    tensors: dict[str, Tensor]
    note: str | None = None


class Method:
    """A family of merges. Subclasses set the class attributes and implement :meth:`units` and :meth:`merge`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    needs_statistics: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    needs_layers: ClassVar[bool] = False
    signed: ClassVar[bool] = False  # whether negative coefficients make sense

    options: Any  # an instance of the class's Options

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options = self.Options() if options is None else options

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Which of the given tensors the method treats, grouped; and for each other one, why it does not."""
        raise NotImplementedError

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """Merge one unit. Pure: reads only the shares, decides only by the options."""
        raise NotImplementedError

    def additive(self, unit: Unit) -> bool:
        """Whether the unit is merged by :meth:`add`, contributor by contributor in order, and :meth:`solve`.

        Such sums can be kept and added to later; contributors are read one at a time.
        """
        return False

    def add(self, unit: Unit, share: Share, sums: GramSums) -> None:
        """Count one more contributor of an additive unit."""
        raise NotImplementedError

    def solve(self, unit: Unit, sums: GramSums) -> Merged:
        """The merge of the contributors counted so far; ``sums`` stay as they are."""
        raise NotImplementedError


def average(names: Sequence[str], shares: Sequence[Share]) -> dict[str, Tensor]:
    """The weighted average of each named tensor, float64: what every method falls back to, and says so."""
    coefficients = [share.coefficient for share in shares]
    return {name: weighted_average([share.tensor(name) for share in shares], coefficients) for name in names}
