"""How a model's parameters are put together from tensors on disk, found by running transformers' own conversions.

The operations by which transformers loads a checkpoint (stacking experts, cutting fused projections, transposing) are
run once on tensors without memory that remember which box of which stored tensor lies where. Nothing of the
operations is known here beside what they do to boxes; one that is not made of boxes, such as a permutation of rows,
leaves a :class:`Traced` tensor that knows which tensors it was made of, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from merganser.checkpoints.sources import Source

Range = tuple[int, int]
_ties: WeakKeyDictionary[nn.Module, list[list[str]]] = WeakKeyDictionary()
_states: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Box:
    """A box of a tensor that is a box of a stored one.

    Attributes:
        at: where it lies in the tensor, (start, stop) along each dimension.
        tensor: the stored tensor.
        part: which box of that, likewise.
        dims: for each dimension of the tensor, which one of the stored it is; None: a new one.
    """

    at: tuple[Range, ...]
    tensor: str
    part: tuple[Range, ...]
    dims: tuple[int | None, ...]

    @classmethod
    def whole(cls, tensor: str, shape: Sequence[int]) -> Box:
        """All of a stored tensor."""
        ranges = tuple((0, size) for size in shape)
        return cls(ranges, tensor, ranges, tuple(range(len(shape))))

    def within(self, dim: int, start: int, stop: int) -> Box | None:
        """The part of it that lies at ``start:stop`` along a dimension, as seen from there."""
        low, high = max(self.at[dim][0], start), min(self.at[dim][1], stop)
        if low >= high:
            return None
        at = (*self.at[:dim], (low - start, high - start), *self.at[dim + 1 :])
        stored, part = self.dims[dim], self.part
        if stored is not None:
            first = part[stored][0] + low - self.at[dim][0]
            part = (*part[:stored], (first, first + high - low), *part[stored + 1 :])
        return replace(self, at=at, part=part)

    def without(self, dim: int) -> Box:
        """The same without a dimension along which it is one thick."""
        return replace(self, at=_dropped(self.at, dim), dims=_dropped(self.dims, dim))


@dataclass(frozen=True)
class Place:
    """Where a parameter lies on disk.

    Attributes:
        boxes: of stored tensors that it is made of; None where it is made in another way.
        stored: the names of these tensors.
        is_whole: it is one stored tensor as it is.
    """

    boxes: tuple[Box, ...] | None
    stored: tuple[str, ...]
    is_whole: bool = False

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Place:
        """A stored tensor as it is."""
        return cls((Box.whole(name, shape),), (name,), is_whole=True)


class Traced(Tensor):
    """A tensor without memory that knows where its numbers are stored.

    Attributes:
        boxes: that it is made of; None where it is not made of boxes.
        stored: the names of the tensors that it is made of.
    """

    boxes: tuple[Box, ...] | None
    stored: tuple[str, ...]

    @staticmethod
    def of(name: str, shape: tuple[int, ...]) -> Traced:
        """A stored tensor."""
        return _traced(torch.empty(shape, device="meta"), (Box.whole(name, shape),), (name,))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do what the function does to shapes, and to boxes where it is one of those that keep them."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        sources = [one for one in _flat(args) if isinstance(one, Traced)]
        stored = tuple(dict.fromkeys(name for one in sources for name in one.stored))
        follow = _FOLLOWED.get(getattr(function, "__name__", ""))
        boxes = None
        if follow is not None and all(one.boxes is not None for one in sources):
            boxes = follow(*args, **kwargs)
        if isinstance(result, Tensor):
            return _traced(result, boxes, stored)
        if isinstance(result, (tuple, list)) and result and all(isinstance(one, Tensor) for one in result):
            found = [None] * len(result) if boxes is None else boxes
            return type(result)(_traced(one, mine, stored) for one, mine in zip(result, found, strict=True))
        return result


def _traced(tensor: Tensor, boxes: Any, stored: tuple[str, ...]) -> Traced:
    found = tensor.as_subclass(Traced)
    found.boxes, found.stored = None if boxes is None else tuple(boxes), stored
    return found


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _dropped(values: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    return (*values[:place], *values[place + 1 :])


def _inserted(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place:])


def _same(tensor: Traced, *_: Any, **__: Any) -> Sequence[Box]:
    return tensor.boxes or ()


def _stack(tensors: Sequence[Traced], dim: int = 0, **_: Any) -> list[Box]:
    dim %= tensors[0].dim() + 1
    return [
        replace(box, at=_inserted(box.at, dim, (number, number + 1)), dims=_inserted(box.dims, dim, None))
        for number, tensor in enumerate(tensors)
        for box in tensor.boxes or ()
    ]


def _cat(tensors: Sequence[Traced], dim: int = 0, **_: Any) -> list[Box]:
    dim %= tensors[0].dim()
    found, first = [], 0
    for tensor in tensors:
        for box in tensor.boxes or ():
            start, stop = box.at[dim]
            found.append(replace(box, at=(*box.at[:dim], (first + start, first + stop), *box.at[dim + 1 :])))
        first += tensor.shape[dim]
    return found


def _pieces(tensor: Traced, dim: int, sizes: Iterable[int]) -> list[list[Box]]:
    dim %= tensor.dim()
    found, first = [], 0
    for size in sizes:
        inside = (box.within(dim, first, first + size) for box in tensor.boxes or ())
        found.append([box for box in inside if box is not None])
        first += size
    return found


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> list[list[Box]]:
    size = -(-tensor.shape[dim] // chunks)
    return _split(tensor, size, dim)


def _split(tensor: Traced, sizes: Any, dim: int = 0) -> list[list[Box]]:
    height = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, height - first) for first in range(0, height, sizes)]
    return _pieces(tensor, dim, sizes)


def _unbind(tensor: Traced, dim: int = 0) -> list[list[Box]]:
    dim %= tensor.dim()
    return [[box.without(dim) for box in piece] for piece in _pieces(tensor, dim, [1] * tensor.shape[dim])]


def _squeeze(tensor: Traced, dim: int) -> list[Box] | Sequence[Box]:
    dim %= tensor.dim()
    return [box.without(dim) for box in tensor.boxes or ()] if tensor.shape[dim] == 1 else tensor.boxes or ()


def _transpose(tensor: Traced, dim0: int, dim1: int) -> list[Box]:
    order = list(range(tensor.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return [
        replace(box, at=tuple(box.at[d] for d in order), dims=tuple(box.dims[d] for d in order))
        for box in tensor.boxes or ()
    ]


_FOLLOWED: dict[str, Callable[..., Any]] = {
    "stack": _stack,
    "cat": _cat,
    "chunk": _chunk,
    "split": _split,
    "unbind": _unbind,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "contiguous": _same,
    "clone": _same,
}


def seen_from(mine: Box, its: Box) -> Box | None:
    """What two boxes of one parameter have in common: where it lies in the tensor of the first, from the second's."""
    common: Box | None = its
    for dim, (start, stop) in enumerate(mine.at):
        common = common and common.within(dim, start, stop)
    if common is None:
        return None
    at = list(mine.part)
    dims: list[int | None] = [None] * len(mine.part)
    for dim, stored in enumerate(mine.dims):
        if stored is not None:
            first, (start, stop) = mine.part[stored][0], common.at[dim]
            at[stored], dims[stored] = (first + start, first + stop), common.dims[dim]
    return Box(tuple(at), common.tensor, common.part, tuple(dims))


def source_of(boxes: Sequence[Box], shape: Sequence[int]) -> Source | None:
    """The boxes that make up a tensor of this shape, as a source; None where a source cannot say it.

    What a source can say: one box, boxes behind each other along the first dimension, or stacks of these.
    """
    if len(boxes) == 1:
        return _one_box(boxes[0]) if _extent(boxes[0].at) == tuple(shape) else None
    if not boxes or not shape:
        return None
    slabs: dict[Range, list[Box]] = {}
    for box in boxes:
        slabs.setdefault(box.at[0], []).append(box)
    ordered = sorted(slabs)
    if [start for start, _ in ordered] != [0, *(stop for _, stop in ordered[:-1])] or ordered[-1][1] != shape[0]:
        return None
    if len(ordered) == 1:  # side by side: the same of the transposed, where that says it
        turned = [replace(box, at=box.at[::-1], dims=box.dims[::-1]) for box in boxes] if len(shape) == 2 else []
        beside = len({box.at[0] for box in turned}) > 1
        side = source_of(turned, tuple(shape)[::-1]) if beside else None
        return None if side is None else replace(side, transposed=True)
    stacked = len(shape) > 1 and all(stop - start == 1 for start, stop in ordered)
    stacked = stacked and all(box.dims[0] is None for box in boxes)
    parts = []
    for start, stop in ordered:
        inner = [box.within(0, start, stop) for box in slabs[start, stop]]
        found = [box.without(0) if stacked else box for box in inner if box is not None]
        part = source_of(found, shape[1:] if stacked else (stop - start, *shape[1:]))
        if part is None:
            return None
        parts.append(part)
    return Source(parts=tuple(parts), stacked=stacked)


def _extent(ranges: Iterable[Range]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in ranges)


def _one_box(box: Box) -> Source | None:
    """A box as a source: one of a stack or the whole, some rows and columns of it, perhaps transposed."""
    if any(dim is None for dim in box.dims):
        return None
    used = [dim for dim in box.dims if dim is not None]
    fixed = [dim for dim in range(len(box.part)) if dim not in used]
    if fixed not in ([], [0]):
        return None
    index = box.part[0][0] if fixed else None
    straight = sorted(used)
    turned = [*straight[:-2], *straight[:-3:-1]]
    if used not in (straight, turned):
        return None
    return Source(box.tensor, index, transposed=used != straight, rows=box.part[straight[0]] if straight else None,
                  columns=box.part[straight[-1]] if len(straight) > 1 else None)  # fmt: skip


def simplified(source: Source, shapes: Callable[[str], tuple[int, ...]]) -> Source:
    """The same without rows and columns that are all there are."""
    if source.parts:
        return replace(source, parts=tuple(simplified(part, shapes) for part in source.parts))
    stored = shapes(source.tensor)
    inner = stored if source.index is None else stored[1:]
    rows = None if source.rows is None or source.rows == (0, inner[0]) else source.rows
    columns = None if source.columns is None or source.columns == (0, inner[-1]) else source.columns
    return replace(source, rows=rows, columns=columns)


class Renaming:
    """From names on disk to names of parameters, by transformers' own tables.

    Args:
        model: which may be on the meta device.

    Attributes:
        wanted: the shape of each parameter and stored buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self.wanted = state_shapes(model)
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The parameter that a name on disk means, and the pattern of the converter that it goes through, if any.

        A name that means nothing here is returned as something that is not wanted.
        """
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.wanted)
        return (name, None) if renamed not in self.wanted and name in self.wanted else (renamed, pattern)

    def converter(self, pattern: str) -> Any:
        """A fresh converter, by one of its patterns."""
        return deepcopy(self._by_pattern[pattern])


def find_places(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Place], frozenset[str], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Where the parameters lie, stored tensors without a parameter, and parameters of another shape.

    This is transformers' own way of loading, with its renamings and converters, on tensors without memory.
    """
    from transformers.core_model_loading import dot_natural_key

    rename = Renaming(model)
    wanted = rename.wanted
    places: dict[str, Place] = {}
    unused, mismatched = set[str](), dict[str, tuple[tuple[int, ...], tuple[int, ...]]]()
    waiting: dict[str, Any] = {}

    def put(parameter: str, shape: tuple[int, ...], place: Place) -> None:
        if wanted.get(parameter) != shape:
            if parameter in wanted:
                mismatched[parameter] = (shape, wanted[parameter])
            else:
                unused.update(place.stored)
        places.setdefault(parameter, place)

    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename(name)
        if renamed not in wanted:
            unused.add(name)
        elif pattern is None:
            put(renamed, shapes[name], Place.whole(name, shapes[name]))
        else:
            if renamed not in waiting:
                waiting[renamed] = rename.converter(pattern)
            waiting[renamed].add_tensor(renamed, name, pattern, Traced.of(name, shapes[name]))
    for parameter, converter in waiting.items():
        stored = tuple(t.stored[0] for tensors in converter.collected_tensors.values() for t in tensors)
        try:
            made = converter.convert(parameter, model=model, config=model.config)
        except Exception:  # shapes of another model, or an operation that needs numbers
            unused.update(stored)
            continue
        for target, value in made.items():
            tensor = value[0] if isinstance(value, list) else value
            boxes = tensor.boxes if isinstance(tensor, Traced) else None
            put(target, tuple(tensor.shape), Place(boxes, tensor.stored if isinstance(tensor, Traced) else stored))
    return places, frozenset(unused), mismatched


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what a model stores; worked out once a model."""
    if model not in _states:
        _states[model] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return _states[model]


def ties(model: nn.Module) -> list[list[str]]:
    """Groups of parameters that are one tensor, that which the others are tied to first; worked out once a model."""
    if model not in _ties:
        _ties[model] = _find_ties(model)
    return _ties[model]


def _find_ties(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    by_name = {name: group for group in groups.values() for name in group}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        ours, theirs = by_name.get(source), by_name.get(target)
        if ours is not None and theirs is not None and ours is not theirs:
            ours += theirs
            by_name |= dict.fromkeys(theirs, ours)
    return list({id(group): group for group in by_name.values() if len(group) > 1}.values())
