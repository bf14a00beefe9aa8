"""What a contributor brings to one step: its tensors, the base's, its statistics, read when a method asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from merganser.checkpoints.sources import Source, read_source
from merganser.errors import CheckpointError
from merganser.merging.activations import Activations
from merganser.merging.adapters import brings_product, product_of
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.matching import BASE_NUMBER, Fill
from merganser.merging.plan import Step
from merganser.methods import Unit
from merganser.methods.base import input_width, wide
from merganser.methods.products import Product
from merganser.statistics import LayerStatistics, Statistics
from merganser.tensors import DTYPES, is_finite

#: Rows of which so many lie between the first and the last are read with all of these.
_SPREAD = 4
_PIECE = 4096  # rows of which a mean is summed at once

Ranges = Mapping[str, tuple[int, int]]


class ParentShare:
    """A contributor's :class:`~merganser.methods.Share` of one step.

    Args:
        inputs: the open files.
        step: what is merged.
        number: which contributor it is, from 0.
        rows: the rows of its own tensors that are meant, all by default.
        base_rows: those of the base's tensors, where they are others.
        targets: the rows of the result that these are.
        ranges: by target, the range of rows that is meant; all by default.
        device: where tensors are put.
        seen: what the contributors' units do on texts at hand.
        kept: pieces of whole tensors; a share of a range, which is a slice, takes them from there.
    """

    def __init__(
        self,
        inputs: Inputs,
        step: Step,
        number: int,
        *,
        rows: Sequence[int] | None = None,
        base_rows: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
        ranges: Ranges | None = None,
        device: torch.device | None = None,
        seen: Activations | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.parent, self.number, self.own = inputs.parents[number], number, rows
        self.coefficient = step.coefficients[number]
        self.sources, self._base_sources, self._base = step.sources[number], step.base, inputs.base
        self._ranges, self._device, self._seen = ranges or {}, device, seen
        self._kept = kept
        self._dtype = None if step.computation is None else DTYPES[step.computation]
        self._rows = None if rows is None else torch.tensor(rows)
        self._facts = {fact.name: fact for fact in step.unit.facts}
        self._widths = {fact.name: input_width(fact) for fact in step.unit.facts if fact.layer}
        self._theirs = self._rows if base_rows is None else torch.tensor(base_rows)
        fills = () if step.rows is None or targets is None else step.rows.fills
        self._filling = Filling(inputs, step, torch.tensor(targets), fills) if fills and targets is not None else None

    def stored(self, name: str) -> Tensor:
        """Its tensor as it is stored, or in the dtype to compute in; checked to be finite."""
        tensor = (
            self._read(name, *self._range(name)) if self._rows is None else self._gathered(name, 0, len(self._rows))
        )
        return self._placed(tensor if self._dtype is None else tensor.to(self._dtype))

    def tensor(self, name: str) -> Tensor:
        """Its tensor in float32 or wider, likewise."""
        return self._wide(self.stored(name))

    def base(self, name: str) -> Tensor:
        """The base model's tensor, likewise."""
        if self._theirs is None:
            return self._wide(self._placed(self._read_base(name, *self._range(name))))
        return self._wide(self._placed(self._gathered_base(name, 0, len(self._theirs))))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of :meth:`stored`."""
        if self._rows is not None:
            tensor = self._gathered(name, start, stop)
        else:
            first, _ = self._range(name)
            tensor = self._read(name, first + start, first + stop)
        return self._placed(tensor if self._dtype is None else tensor.to(self._dtype))

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of :meth:`base`."""
        if self._theirs is not None:
            return self._wide(self._placed(self._gathered_base(name, start, stop)))
        first, _ = self._range(name)
        return self._wide(self._placed(self._read_base(name, first + start, first + stop)))

    def product(self, name: str) -> Product | None:
        """Its difference from the base as a product, where it is an adapter on the base of this merge."""
        part = self._rows is not None or self._range(name) != (0, None)
        if part or not brings_product(self.parent, self._base, self.sources[name]):
            return None
        found = product_of(self.parent, self.sources[name], self._facts[name])
        return Product(self._placed(found.left), self._placed(found.right))

    def gram(self, weight: str) -> Tensor:
        """The Gram matrix of the inputs of the layer with this weight; zero for an expert that no token reached."""
        input, width = self._input(weight), self._widths[weight]
        return self._placed(torch.zeros(width, width) if input is None else self._statistics.gram(input))

    def mean(self, weight: str) -> Tensor:
        """The mean input of that layer, likewise."""
        input = self._input(weight)
        return self._placed(torch.zeros(self._widths[weight]) if input is None else self._statistics.mean(input))

    def gradients(self, weight: str) -> Tensor:
        """The covariance of the gradients of that layer's outputs, of these rows."""
        layer = self._layer(weight)
        if layer is None or layer.output is None:
            raise RuntimeError(f"the plan promised gradients of the outputs of {weight}")
        whole = self._statistics.gram(layer.output)
        return self._placed(whole if self._rows is None else whole[self._rows][:, self._rows])

    def count(self, weight: str) -> Tensor:
        """The share of all tokens that each id has."""
        layer = self._layer(weight)
        if layer is None:
            raise RuntimeError(f"the plan promised token counts of {weight}")
        counts = self._statistics.count(layer.module).to(torch.float64)
        start, stop = self._range(weight)
        return self._picked((counts / counts.sum().clamp_min(1))[start:stop])

    def fisher(self, name: str) -> Tensor:
        """Its diagonal Fisher information of a parameter."""
        start, stop = self._range(name)
        source = self.sources[name]
        whole = self._statistics.fisher(source.tensor)
        return self._picked((whole if source.index is None else whole[source.index])[start:stop])

    def activations(self, weight: str) -> Tensor:
        """The inputs of the layer with this weight on texts at hand."""
        if self._seen is None:
            raise RuntimeError("nobody has looked at texts")
        return self._placed(self._seen.of(self.number, weight))

    def identity(self, unit: Unit) -> list[object]:
        """Everything that what it brings to a unit depends on, as plain values."""
        statistics, sources = self.parent.statistics, self.sources
        checkpoint = self.parent.checkpoint
        weights = [[[checkpoint.hash(t, "blake3") for t in s.tensors()], astuple(s)] for s in sources.values()]
        known = [self._layer(f.name) for f in unit.facts if f.layer and statistics]
        published = None if statistics is None or statistics.path is None else statistics.sha256()
        grams = [published, *(entry.input if entry else None for entry in known)]
        return [self.coefficient, weights, grams, None if self.own is None else list(self.own)]

    @property
    def _statistics(self) -> Statistics:
        if self.parent.statistics is None:
            raise RuntimeError("the plan promised statistics")
        return self.parent.statistics

    def _gathered(self, name: str, start: int, stop: int) -> Tensor:
        """These of the rows that are meant, with those that other models give."""
        if self._rows is None:
            raise RuntimeError("all rows are meant")
        read, own = partial(self._read, name), self._rows[start:stop]
        return gathered(read, own) if self._filling is None else self._filling.rows(self.number, name, start, stop)

    def _gathered_base(self, name: str, start: int, stop: int) -> Tensor:
        if self._theirs is None:
            raise RuntimeError("all rows are meant")
        read, own = partial(self._read_base, name), self._theirs[start:stop]
        return gathered(read, own) if self._filling is None else self._filling.rows(BASE_NUMBER, name, start, stop)

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._known(self.number, self.parent, self.sources[name], start, stop)

    def _read_base(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if self._base is None:
            raise RuntimeError("the plan promised a base model")
        return self._known(BASE_NUMBER, self._base, self._base_sources[name], start, stop)

    def _known(self, model: int, parent: Parent, source: Source, start: int, stop: int | None) -> Tensor:
        """What a source of a model names, read or from what was kept."""
        read = partial(read_finite, parent, source, start, stop)
        if self._kept is None or stop is None:
            return read()
        place = (model, start, stop)
        return self._kept.taken(place, read) if self._ranges else self._kept.looked_at(place, read)

    def _layer(self, weight: str) -> LayerStatistics | None:
        leaf = self.sources[weight].leaf
        return self._statistics.layer(leaf.tensor, leaf.index)

    def _input(self, weight: str) -> str | None:
        layer = self._layer(weight)
        return layer.input if layer else None

    def _range(self, name: str) -> tuple[int, int | None]:
        return self._ranges.get(name, (0, None))

    def _picked(self, tensor: Tensor) -> Tensor:
        return self._placed(tensor if self._rows is None else tensor[self._rows])

    def _wide(self, tensor: Tensor) -> Tensor:
        return wide(tensor) if self._dtype is None else tensor.to(self._dtype)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)


class Kept:
    """Pieces of one tensor of every model, kept from a pass over the whole for the slices that come after it.

    Numbers of 16 bits alone are kept: whoever computes with them makes wider ones first, and leaves them as they are.

    Args:
        room: how many bytes may be kept.
    """

    def __init__(self, room: int) -> None:
        self._room, self._pieces = room, dict[tuple[int, int, int], Tensor]()

    def looked_at(self, place: tuple[int, int, int], read: Callable[[], Tensor]) -> Tensor:
        """A piece, which will be asked for again: rows from and to of a model."""
        piece = self._pieces.get(place)
        if piece is None:
            piece = read()
            if piece.element_size() == 2 and piece.nbytes <= self._room:
                self._room -= piece.nbytes
                self._pieces[place] = piece
        return piece

    def taken(self, place: tuple[int, int, int], read: Callable[[], Tensor]) -> Tensor:
        """A piece, for the last time."""
        piece = self._pieces.pop(place, None)
        return read() if piece is None else piece


class Filling:
    """Rows of a model with those that it lacks, from where the plan says.

    Args:
        inputs: the open files.
        step: what is merged.
        targets: the rows of the result that are meant, in ascending order.
        fills: what models have from others.
    """

    def __init__(self, inputs: Inputs, step: Step, targets: Tensor, fills: Sequence[Fill]) -> None:
        self._inputs, self._step, self._targets, self._fills = inputs, step, targets, fills

    def rows(self, model: int, name: str, start: int, stop: int) -> Tensor:
        """Those of the rows that are meant, in float32 or wider, of a contributor, or of the base (-1)."""
        return self._of(model, name, self._targets[start:stop])

    def _of(self, model: int, name: str, targets: Tensor) -> Tensor:
        own = self._own(model)[targets]
        has = own >= 0
        found = self._read(model, name, own[has])
        if bool(has.all()):
            return found
        whole = found.new_zeros(len(targets), *found.shape[1:])
        whole[has] = found
        for fill in self._fills:
            if model not in fill.takers:
                continue
            rows = torch.from_numpy(fill.rows)
            here, at = torch.isin(targets, rows[0]), torch.isin(rows[0], targets)
            if not bool(here.any()):
                continue
            if fill.own_mean:
                given = self._mean(model, name, rows[0]).expand(int(here.sum()), *whole.shape[1:])
            else:
                each = [self._read(giver, name, own[at]) for giver, own in zip(fill.givers, rows[1:], strict=True)]
                given = sum(each[1:], start=each[0]) / len(each) if each else whole[here]
            whole = whole.to(torch.promote_types(whole.dtype, given.dtype))
            whole[here] = given.to(whole.dtype)
        return whole

    def _mean(self, model: int, name: str, without: Tensor) -> Tensor:
        """The mean over all rows of the result but some, read piece by piece."""
        everything = torch.arange(self._own(model).numel())
        rest, total = everything[~torch.isin(everything, without)], torch.zeros(())
        for piece in rest.split(_PIECE):
            total = total + self._of(model, name, piece).sum(0, dtype=torch.float64)
        return (total / max(rest.numel(), 1)).to(torch.float32)

    def _own(self, model: int) -> Tensor:
        table = self._step.rows
        if table is None:
            raise RuntimeError("the plan promised rows")
        return torch.tensor(table.own_base if model == BASE_NUMBER else table.own[model])

    def _read(self, model: int, name: str, rows: Tensor) -> Tensor:
        base = self._inputs.base
        if model != BASE_NUMBER:
            parent, source = self._inputs.parents[model], self._step.sources[model][name]
        elif base is not None:
            parent, source = base, self._step.base[name]
        else:
            raise RuntimeError("the plan promised a base model")
        read = partial(read_finite, parent, source)
        return wide(gathered(read, rows) if rows.numel() else read(0, 1)[:0])


def gathered(read: Callable[[int, int | None], Tensor], rows: Tensor) -> Tensor:
    """These rows, in their order, of what is read.

    Rows that lie close together are read at once, with what is between them; others run by run.
    """
    first, last = (int(rows.min()), int(rows.max()) + 1) if rows.numel() else (0, 0)
    if last - first <= _SPREAD * rows.numel():
        return read(first, last)[rows - first]
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    runs = rows.tensor_split(breaks)
    return torch.cat([read(int(run[0]), int(run[-1]) + 1) for run in runs])


def read_finite(
    parent: Parent, source: Source, start: int = 0, stop: int | None = None, *, infinite: bool = False
) -> Tensor:
    """Rows of what a source names, as stored, hashed on the way.

    Args:
        parent: whose it is.
        source: where it lies.
        start, stop: the rows.
        infinite: numbers may be infinite, as those of masks in buffers are; NaN never.

    Raises:
        CheckpointError: NaN or Inf in it.
    """
    stored = read_source(parent.checkpoint, source, start, stop)
    if not stored.is_floating_point() or is_finite(stored):
        return stored
    if not infinite or bool(stored.isnan().any()):
        raise CheckpointError(
            f"tensor {source.leaf.tensor!r} holds {'NaN' if infinite else 'NaN or Inf'}",
            where=parent.checkpoint.name,
            mend="this checkpoint is damaged or its training diverged; use another",
        )
    return stored
