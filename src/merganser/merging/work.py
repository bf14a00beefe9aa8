"""Merging as the work of an execution: what contributors bring to a step, and how its method is applied to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import torch
from torch import Tensor

from merganser.checkpoints import Checkpoint
from merganser.errors import CheckpointError, RecipeError
from merganser.merging.execution import Slice
from merganser.merging.matching import RowMap
from merganser.merging.memory import RunSettings
from merganser.merging.parents import Inputs, Parent
from merganser.merging.plan import COPY, KEPT, Source, Step
from merganser.merging.running_sums import RunningSums
from merganser.methods import Merged, Method, Unit, average_unit
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

    def identity(self, unit: Unit) -> list[object]:
        """Everything that what it brings to a unit depends on, as plain values."""
        statistics, sources = self.parent.statistics, self.sources
        weights = [[self.parent.checkpoint.hash(s.tensor, "blake3"), *astuple(s)[1:]] for s in sources.values()]
        known = [statistics.layer(sources[f.name].tensor) for f in unit.facts if f.layer and statistics]
        published = None if statistics is None or statistics.path is None else statistics.sha256()
        grams = [published, *(entry.input if entry else None for entry in known)]
        return [self.coefficient, weights, grams, None if self.own is None else list(self.own)]

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
    """RowMap of what a source names, as stored, hashed on the way.

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
    """RowMap ``start:stop`` of what a source names, as stored; a tensor that is read as it is is hashed on the way."""
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


@dataclass
class Merging:
    """Steps as their methods have it.

    Args:
        inputs: the open files.
        settings: device, and the folder of running sums.
    """

    inputs: Inputs
    settings: RunSettings = field(default_factory=RunSettings)
    mend: str = "collect the statistics again, or exclude this tensor (--exclude)"

    def prefetch(self, step: Step) -> None:
        """Of every contributor and the base."""
        for parent, sources in zip(self.inputs.parents, step.sources, strict=True):
            for source in sources.values():
                parent.checkpoint.prefetch(source.tensor)
        if self.inputs.base is not None:
            for source in step.base.values():
                self.inputs.base.checkpoint.prefetch(source.tensor)

    def slices(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """Float tensors come in float32 or wider, others as they are stored."""
        unit, method = step.unit, step.treatment
        sums = None if self.settings.sums is None or method is None else RunningSums(self.settings.sums)
        keeps = sums is not None and method is not None and method.additive(unit)
        if step.method in (COPY, KEPT):
            yield from self._copies(step, rows)
        elif step.rows is not None:
            merged = self._by_rows(step, step.rows, method, sums if keeps else None)
            yield dict.fromkeys(merged.tensors, 0), merged
        elif sums is not None and method is not None and keeps:
            merged = _with_sums(step, method, unit, self.shares(step), sums, None)
            yield dict.fromkeys(merged.tensors, 0), merged
        elif rows is None:
            merged = average_unit(unit, self.shares(step)) if method is None else method.merge(unit, self.shares(step))
            yield dict.fromkeys(merged.tensors, 0), merged
        else:
            merge = average_unit if method is None else method.prepare(unit, self.shares(step))
            for start in range(0, unit.height(), rows):
                part, ranges = unit.cut(start, start + rows)
                yield {name: first for name, (first, _) in ranges.items()}, merge(part, self.shares(step, ranges))

    def shares(self, step: Step, ranges: Ranges | None = None) -> list[ParentShare]:
        """Of every contributor that takes part, of these rows of each tensor; of all by default."""
        device = self.settings.torch_device
        return [ParentShare(self.inputs, step, number, ranges=ranges, device=device) for number in step.takers]

    def _by_rows(self, step: Step, table: RowMap, method: Method | None, sums: RunningSums | None) -> Merged:
        """Row by row, by those contributors that have the row."""
        pieces: dict[str, Tensor] = {}
        notes: dict[str, None] = {}
        device = self.settings.torch_device
        for rows, owners in table.groups():
            own = {i: [table.own[i][row] for row in rows] for i in owners}
            shares = [ParentShare(self.inputs, step, i, rows=own[i], device=device) for i in owners]
            if not sum(share.coefficient for share in shares):
                owned = ", ".join(share.parent.title for share in shares)
                raise RecipeError(
                    f"rows of {step.unit.names[0]!r} belong to {owned} alone, whose coefficients sum to zero",
                    mend="give at least one of them another coefficient",
                )
            part = step.unit.only(rows)
            if method is None:
                merged = average_unit(part, shares)
            elif sums is not None:
                merged = _with_sums(step, method, part, shares, sums, rows)
            else:
                merged = method.merge(part, shares)
            notes |= {merged.note: None} if merged.note else {}
            for name, tensor in merged.tensors.items():
                whole = pieces.setdefault(name, tensor.new_empty(table.size, *tensor.shape[1:]))
                whole[torch.tensor(rows)] = tensor
        return Merged(pieces, "; ".join(notes) or None)

    def _copies(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """A tensor as the first contributor has it; the others that have it are to agree."""
        (name,), (first, *others) = step.unit.names, step.takers
        parent, source = self.inputs.parents[first], step.sources[first][name]
        for number in others:
            other, theirs = self.inputs.parents[number], step.sources[number][name]
            if not torch.equal(read_source(other.checkpoint, theirs), read_source(parent.checkpoint, source)):
                raise CheckpointError(
                    f"tensor {theirs.tensor!r} is not floating point and differs from that of {parent.title}",
                    where=other.checkpoint.name,
                    mend=f"--keep-separate '{name}' so that each contributor keeps its own",
                )
        height = step.unit.height()
        for start in range(0, max(height, 1), rows or max(height, 1)):
            yield {name: start}, Merged({name: read_finite(parent, source, start, rows and start + rows)})


def _with_sums(
    step: Step, method: Method, unit: Unit, shares: Sequence[ParentShare], kept: RunningSums, rows: Sequence[int] | None
) -> Merged:
    """Merge a unit, or the part of it in these rows, going on from the sums of earlier merges."""
    keys = kept.keys(method, step.unit, [share.identity(step.unit) for share in shares])
    found, done = kept.load(step.unit, rows, keys)
    sums = method.new_sums() if found is None else found
    for share in shares[done:]:
        method.add(unit, share, sums)
    if done < len(shares):
        kept.save(step.unit, rows, keys, sums)
    return method.solve(unit, sums)
