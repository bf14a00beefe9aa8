"""What a contributor brings to one unit, read from its files when a method asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merganser.errors import CheckpointError
from merganser.merging.parents import Parent
from merganser.methods.base import wide
from merganser.statistics import LayerStatistics, Statistics
from merganser.tensors import is_finite

Ranges = Mapping[str, tuple[int, int]]


class ParentShare:
    """A contributor's :class:`~merganser.methods.Share` of one unit.

    Args:
        parent: the contributor.
        base: the base model, where there is one.
        number: which contributor it is, from 0.
        rows: the rows of its own tensors that are meant, all by default.
        ranges: by the first contributor's names, the range of rows of each tensor that is meant; all by default.
        device: where tensors are put.
    """

    def __init__(
        self,
        parent: Parent,
        base: Parent | None,
        *,
        number: int = 0,
        rows: Sequence[int] | None = None,
        ranges: Ranges | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.parent, self.number, self.own = parent, number, rows
        self._base, self._ranges, self._device = base, ranges or {}, device
        self._rows = None if rows is None else torch.tensor(rows)

    @property
    def coefficient(self) -> float:
        """The contributor's weight in the merge."""
        return self.parent.contributor.coefficient

    def stored(self, name: str) -> Tensor:
        """Its tensor as it is stored; checked to be finite."""
        return self._picked(read_finite(self.parent, name, *self._range(name)))

    def tensor(self, name: str) -> Tensor:
        """Its tensor in float32 or wider, likewise."""
        return wide(self.stored(name))

    def base(self, name: str) -> Tensor:
        """The base model's tensor, likewise."""
        return wide(self._picked(read_finite(self._known_base, name, *self._range(name))))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some of these rows, likewise."""
        return wide(self._some_rows(self.parent, name, start, stop))

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """The base model's rows, likewise."""
        return wide(self._some_rows(self._known_base, name, start, stop))

    def gram(self, weight: str) -> Tensor:
        """The Gram matrix of the inputs of the layer with this weight."""
        return self._placed(self._statistics.gram(self._input(weight)))

    def mean(self, weight: str) -> Tensor:
        """The mean input of that layer."""
        return self._placed(self._statistics.mean(self._input(weight)))

    def count(self, weight: str) -> Tensor:
        """The share of all tokens that each id has."""
        counts = self._statistics.count(self._layer(weight).module).to(torch.float64)
        start, stop = self._range(weight)
        return self._picked((counts / counts.sum().clamp_min(1))[start:stop])

    def fisher(self, name: str) -> Tensor:
        """Its diagonal Fisher information of a parameter."""
        start, stop = self._range(name)
        return self._picked(self._statistics.fisher(self.parent.names[name])[start:stop])

    @property
    def _statistics(self) -> Statistics:
        if self.parent.statistics is None:
            raise RuntimeError("the plan promised statistics")
        return self.parent.statistics

    @property
    def _known_base(self) -> Parent:
        if self._base is None:
            raise RuntimeError("the plan promised a base model")
        return self._base

    def _layer(self, weight: str) -> LayerStatistics:
        layer = self._statistics.layer(self.parent.names[weight])
        if layer is None:
            raise RuntimeError(f"the plan promised statistics of {weight}")
        return layer

    def _input(self, weight: str) -> str:
        return str(self._layer(weight).input)

    def _range(self, name: str) -> tuple[int, int | None]:
        return self._ranges.get(name, (0, None))

    def _some_rows(self, parent: Parent, name: str, start: int, stop: int) -> Tensor:
        if self._rows is not None:
            return self._placed(read_finite(parent, name)[self._rows[start:stop]])
        first, _ = self._range(name)
        return self._placed(read_finite(parent, name, first + start, first + stop))

    def _picked(self, tensor: Tensor) -> Tensor:
        return self._placed(tensor if self._rows is None else tensor[self._rows])

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)


def read_finite(parent: Parent, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of a contributor's tensor by the first contributor's name, as stored, hashed on the way.

    Raises:
        CheckpointError: NaN or Inf in it.
    """
    own = parent.names[name]
    stored = parent.checkpoint.read(own, start, stop)
    parent.checkpoint.observe(own, stored, start)
    if not is_finite(stored):
        raise CheckpointError(
            f"tensor {own!r} holds NaN or Inf",
            where=parent.checkpoint.name,
            mend="this checkpoint is damaged or its training diverged; use another",
        )
    return stored
