"""What a contributor brings to one unit, read from its files when a method asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merganser.checkpoints import Checkpoint
from merganser.errors import CheckpointError
from merganser.merging.parents import Inputs, Parent
from merganser.merging.plan import Source, Step
from merganser.methods.base import wide
from merganser.statistics import LayerStatistics, Statistics
from merganser.tensors import is_finite

Ranges = Mapping[str, tuple[int, int]]


class ParentShare:
    """A contributor's :class:`~merganser.methods.Share` of one step.

    Args:
        inputs: the open files.
        step: what is merged.
        number: which contributor it is, from 0.
        rows: the rows of its own tensors that are meant, all by default.
        ranges: by target, the range of rows that is meant; all by default.
        device: where tensors are put.
    """

    def __init__(
        self,
        inputs: Inputs,
        step: Step,
        number: int,
        *,
        rows: Sequence[int] | None = None,
        ranges: Ranges | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.parent, self.number, self.own = inputs.parents[number], number, rows
        self.coefficient = step.coefficients[number]
        self.sources, self._base_sources, self._base = step.sources[number], step.base, inputs.base
        self._ranges, self._device = ranges or {}, device
        self._rows = None if rows is None else torch.tensor(rows)

    def stored(self, name: str) -> Tensor:
        """Its tensor as it is stored; checked to be finite."""
        return self._picked(self._read(name, *self._range(name)))

    def tensor(self, name: str) -> Tensor:
        """Its tensor in float32 or wider, likewise."""
        return wide(self.stored(name))

    def base(self, name: str) -> Tensor:
        """The base model's tensor, likewise."""
        return wide(self._picked(self._read_base(name, *self._range(name))))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some of these rows, likewise."""
        if self._rows is not None:
            return wide(self._placed(self._read(name)[self._rows[start:stop]]))
        first, _ = self._range(name)
        return wide(self._placed(self._read(name, first + start, first + stop)))

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """The base model's rows, likewise."""
        if self._rows is not None:
            return wide(self._placed(self._read_base(name)[self._rows[start:stop]]))
        first, _ = self._range(name)
        return wide(self._placed(self._read_base(name, first + start, first + stop)))

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
        return self._picked(self._statistics.fisher(self.sources[name].tensor)[start:stop])

    @property
    def _statistics(self) -> Statistics:
        if self.parent.statistics is None:
            raise RuntimeError("the plan promised statistics")
        return self.parent.statistics

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return read_finite(self.parent, self.sources[name], start, stop)

    def _read_base(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if self._base is None:
            raise RuntimeError("the plan promised a base model")
        return read_finite(self._base, self._base_sources[name], start, stop)

    def _layer(self, weight: str) -> LayerStatistics:
        layer = self._statistics.layer(self.sources[weight].tensor)
        if layer is None:
            raise RuntimeError(f"the plan promised statistics of {weight}")
        return layer

    def _input(self, weight: str) -> str:
        return str(self._layer(weight).input)

    def _range(self, name: str) -> tuple[int, int | None]:
        return self._ranges.get(name, (0, None))

    def _picked(self, tensor: Tensor) -> Tensor:
        return self._placed(tensor if self._rows is None else tensor[self._rows])

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)


def read_finite(parent: Parent, source: Source, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of what a source names, as stored, hashed on the way.

    Raises:
        CheckpointError: NaN or Inf in it.
    """
    stored = read_source(parent.checkpoint, source, start, stop)
    if not is_finite(stored):
        raise CheckpointError(
            f"tensor {source.tensor!r} holds NaN or Inf",
            where=parent.checkpoint.name,
            mend="this checkpoint is damaged or its training diverged; use another",
        )
    return stored


def read_source(checkpoint: Checkpoint, source: Source, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start:stop`` of what a source names, as stored; a tensor that is read as it is is hashed on the way."""
    if source.transposed:
        return read_source(checkpoint, replace(source, transposed=False)).mT.contiguous()[start:stop]
    if source.rows is not None:
        first, last = source.rows
        start, stop = first + start, last if stop is None else min(first + stop, last)
    if source.index is not None:
        return checkpoint.read(source.tensor, source.index, source.index + 1)[0][start:stop]
    stored = checkpoint.read(source.tensor, start, stop)
    checkpoint.observe(source.tensor, stored, start)
    return stored
