"""Methods of low-rank changes: a matrix shape that works on the factors of each δᵢ = BᵢAᵢ instead of on δᵢ.

An adapter on the base of the merge brings its factors as they are; of any other contributor they are found from its
task vector (:func:`~merganser.methods.products.factored`). Inside, a merge of small matrices in a shared basis is left
to any of the elementwise methods, with nothing as the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from merganser.methods.base import Facts, Merged, Options, Share, Unit, as_matrix, as_stored, elements, input_width
from merganser.methods.elementwise import Elementwise, added
from merganser.methods.matrix import Matrix
from merganser.methods.products import BringsProducts, Product, factored
from merganser.methods.task_vectors.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from merganser.methods.task_vectors.consensus import CONSENSUS, MAGMAX
from merganser.methods.task_vectors.dare import DARE_LINEAR, DARE_TIES
from merganser.methods.task_vectors.della import DELLA, DELLA_LINEAR
from merganser.methods.task_vectors.pcb import PCB
from merganser.methods.task_vectors.ram import RAM, RAM_PLUS
from merganser.methods.task_vectors.sce import SCE
from merganser.methods.task_vectors.task_arithmetic import TASK_ARITHMETIC
from merganser.methods.task_vectors.ties import TIES

#: The elementwise methods that can merge what a method of this family makes of the task vectors.
INNER: Mapping[str, Elementwise] = {
    method.name: method
    for method in (
        *(TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES, DELLA, DELLA_LINEAR, BREADCRUMBS, BREADCRUMBS_TIES),
        *(SCE, MAGMAX, CONSENSUS, PCB, RAM, RAM_PLUS),
    )
}
_MEAN = "mean"  # Σcᵢδᵢ / Σcᵢ


class LowRankOptions(Options):
    """Options of every method of this family."""

    merge: str = Field("ties", description=f"what merges them: {_MEAN}, {', '.join(INNER)}")
    merge_options: dict[str, Any] = Field(default_factory=dict, description="the options of that, such as density")
    rank: int | None = Field(
        None, ge=1, description="singular values that are kept of a task vector that comes without factors; all"
    )
    scale: float = Field(1.0, description="multiplier of the merged task vector")

    @model_validator(mode="after")
    def _of_a_method(self) -> LowRankOptions:
        if self.merge == _MEAN and self.merge_options:
            raise ValueError(f"the {_MEAN} has no options")
        if self.merge not in (_MEAN, *INNER):
            raise ValueError(f"merge is {self.merge!r}; it can be {_MEAN}, {', '.join(INNER)}")
        method, given = _inner(self.merge, self.merge_options)
        method.options_type.model_validate(given)
        return self


def _inner(name: str, options: Mapping[str, Any]) -> tuple[Elementwise, Mapping[str, Any]]:
    """The method that a name means here, and its options beside the scale, which is 1 unless it is given."""
    method, given = (TASK_ARITHMETIC, {"normalize": True}) if name == _MEAN else (INNER[name], options)
    scaled = {"scale": 1.0} if "scale" in method.options_type.model_fields else {}
    return method, {**scaled, **given}


@dataclass(frozen=True, kw_only=True)
class LowRankMatrix(Matrix):
    """A method of this family. It has ``Needs(base=True, layers=True)``.

    Attributes:
        products: of the task vectors as products, and what merges matrices of one shape: the merged task vector.
    """

    function: Callable[..., Tensor] = torch.add  # never asked: products are merged
    products: Callable[[Sequence[Product], Callable[[Sequence[Tensor]], Tensor], Any], Product]

    @property
    def takes_products(self) -> bool:
        """Always."""
        return True

    def memory(self, unit: Unit, contributors: int) -> int:
        """In float64: the task vectors, their factors, these in the shared basis, and what merges them."""
        width = input_width(unit.facts[0])
        side = max(width, elements(unit) // max(width, 1))
        return elements(unit) * 8 * (5 * contributors + 7) + side**2 * 8 * 4

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """θ₀ and the merged task vector."""
        (name,), (fact,) = unit.names, unit.facts
        base = as_matrix(shares[0].base(name), fact)
        found = [share.product(name) if isinstance(share, BringsProducts) else None for share in shares]
        changes = [
            factored(as_matrix(share.tensor(name), fact).to(torch.float64) - base, self.options.rank)
            if product is None
            else product
            for share, product in zip(shares, found, strict=True)
        ]
        change = self.merge_products(unit, changes, shares).dense()
        return Merged({name: as_stored(added(base.to(torch.float64), change, 1.0).to(base.dtype), fact)})

    def merge_products(self, unit: Unit, products: Sequence[Product], shares: Sequence[Share]) -> Product:
        """The merged task vector as a product."""
        wide = [Product(one.left.to(torch.float64), one.right.to(torch.float64)) for one in products]
        merged = self.products(wide, _Inner(unit, shares, self.options), self.options)
        return Product(merged.left * self.options.scale, merged.right)


@dataclass(frozen=True)
class _Inner:
    """Merges a matrix of each contributor elementwise.

    Attributes:
        unit: that they belong to, whose name decides on random numbers.
        shares: of the contributors, for their numbers and coefficients.
        options: of the method.
    """

    unit: Unit
    shares: Sequence[Share]
    options: LowRankOptions

    def __call__(self, matrices: Sequence[Tensor]) -> Tensor:
        if not matrices[0].numel():
            return matrices[0]
        (name,) = self.unit.names
        method, given = _inner(self.options.merge, self.options.merge_options)
        chosen = method.options_type.model_validate(given)
        shape = tuple(matrices[0].shape)
        inner = Unit((name,), method.name, (Facts(name, shape, in_base=True),))
        own = [_OneMatrix(m, s.number, s.coefficient) for m, s in zip(matrices, self.shares, strict=True)]
        return method.configured(chosen).merge(inner, cast(list[Share], own)).tensors[name]


@dataclass(frozen=True)
class _OneMatrix:
    """A contributor's share of one matrix, beside a base of zeros."""

    matrix: Tensor
    number: int
    coefficient: float

    def stored(self, name: str) -> Tensor:
        return self.matrix.clone()

    def base(self, name: str) -> Tensor:
        return torch.zeros_like(self.matrix)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop].clone()

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        return torch.zeros_like(self.matrix[start:stop])
