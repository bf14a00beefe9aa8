"""Elementwise methods: the first shape, θ = θ₀ + f(δ₁, …, δₙ) number by number, with δᵢ = θᵢ − θ₀."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil, prod
from types import EllipsisType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from merganser.methods import devices
from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements, separately, wide
from merganser.methods.selection import PIECE, selection_memory

#: Numbers of a slice that a function is given at once on a processor: few enough for the caches of one core, and enough
#: that threads do not wait for each other between calls.
BLOCK = 1 << 19
_DIGITS = 24  # bits of a random word that float32 holds exactly


@dataclass(frozen=True)
class Position:
    """Where the numbers that a function is given lie, so that its result does not depend on how they are cut.

    Attributes:
        name: of the tensor.
        rows: which rows of the whole tensor these are.
        contributors: the number of each, from 0.
        whole: what ``reduce`` found of the whole tensor.
        notes: what a function finds noteworthy, to be added to by it: in words that are the same for every slice.
    """

    name: str
    rows: Sequence[int]
    contributors: Sequence[int]
    whole: Any = None
    notes: list[str] = field(default_factory=list)

    def uniform(self, delta: Tensor, index: int, seed: int) -> Tensor:
        """Random numbers from [0, 1) in float32 for the δ of this index, shaped like it and on its device.

        They depend on the seed, the tensor's name, the contributor's number and the place in the whole tensor, which
        is what the generator counts by (Salmon et al. 2011), and so on nothing that a run could choose.
        """
        found = torch.empty(delta.numel(), dtype=torch.float32, device=delta.device)
        for here, words in self._words_beside(delta, index, seed):
            found[here] = devices.uniform(words)
        return found.reshape(delta.shape)

    def words(self, delta: Tensor, index: int, seed: int) -> np.ndarray:
        """(n,) uint32: the random words of which :meth:`uniform` takes the upper bits."""
        from merganser.methods import kernels

        words = np.empty(delta.numel(), dtype=np.uint32)
        for here, start in self._runs(delta):
            kernels.draw(words[here], *self._key(index, seed), start)
        return words

    def drawn(self, delta: Tensor, index: int, seed: int, chance: float, divisor: float = 1.0) -> Tensor:
        """δ, which is changed: divided where :meth:`uniform` is below a chance, and zero elsewhere."""
        below = ceil(float(np.float32(chance)) * 2**_DIGITS) << (32 - _DIGITS)
        if below >= 2**32:
            return devices.divide_(delta, divisor)
        if not fits_kernels(delta):
            delta = delta.contiguous()
            for here, words in self._words_beside(delta, index, seed):
                delta.view(-1)[here].masked_fill_(devices.at_least(words, below), 0)
            return devices.divide_(delta, divisor)
        from merganser.methods import kernels

        numbers, key = kernels.flat(delta), self._key(index, seed)
        for here, start in self._runs(delta):
            kernels.keep_drawn(numbers[here], *key, start, np.uint32(below), np.float32(divisor))
        return delta

    def _words_beside(self, delta: Tensor, index: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
        """The words of some of δ's numbers at a time, as int32 on its device; made there, unless its rows lie apart."""
        if devices.elsewhere(delta) and isinstance(self.rows, range):
            first, second = map(int, self._key(index, seed))
            ((_, start),) = self._runs(delta)
            yield from devices.draw((first, second), start, delta.numel(), delta.device)
        else:
            words = torch.from_numpy(self.words(delta, index, seed).view(np.int32))
            yield slice(0, len(words)), words.to(delta.device)

    def _key(self, index: int, seed: int) -> tuple[np.uint32, np.uint32]:
        """Of the contributor's sequence of random words for this tensor."""
        identity = hashlib.sha256(f"{seed} {self.contributors[index]} {self.name}".encode()).digest()
        first, second = struct.unpack_from("<II", identity)
        return np.uint32(first), np.uint32(second)

    def _runs(self, delta: Tensor) -> Iterator[tuple[slice, int]]:
        """Where rows that follow each other lie in δ, and at which number of the whole tensor they start."""
        width, rows = prod(delta.shape[1:]), self.rows
        if isinstance(rows, range):
            yield slice(0, len(rows) * width), rows.start * width
            return
        for place, row in enumerate(rows):
            yield slice(place * width, (place + 1) * width), row * width


@dataclass(frozen=True)
class Whole:
    """A whole tensor of every contributor, from which a method finds a few numbers, reading it piece by piece.

    Attributes:
        unit: of this one tensor.
        shares: whole ones, of the contributors that take part.
        with_base: whether the method reads the base model.
        differences: whether it then wants the δ, or the θ and the base apart.
        by_rows: whether a tensor of one dimension is one row, which is not cut.
    """

    unit: Unit
    shares: Sequence[Share]
    with_base: bool
    differences: bool = True
    by_rows: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.unit.facts[0].shape

    @property
    def height(self) -> int:
        """Its rows; of a tensor of one dimension, its numbers."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """The numbers of a row."""
        return prod(self.shape[1:])

    def pieces(self) -> list[tuple[int, int]]:
        """Rows (start, stop) of about so many numbers as caches hold: the same ones whatever memory there is."""
        if self.by_rows and len(self.shape) < 2:
            return [(0, self.height)]
        step = max(1, PIECE // max(self.width, 1))
        return [(start, min(start + step, self.height)) for start in range(0, self.height, step)]

    def blocks(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """All of it, a few rows (start, stop) at a time that fit a core's cache, and their :meth:`deltas`.

        These are gone when the next ones are asked for.
        """
        for first, last in self.pieces():
            deltas = self.deltas(first, last)
            for here in blocks_of_rows(deltas[0], self.by_rows) or [slice(0, last - first)]:
                block = [delta[here] if delta.dim() else delta for delta in deltas]
                yield first + here.start, min(first + here.stop, last), block
                block.clear()  # or it would keep the piece in memory while the next one is read
            deltas.clear()

    def base(self, start: int, stop: int) -> Tensor:
        """θ₀ in rows start:stop; the caller's own."""
        return self.shares[0].base_rows(self.unit.names[0], start, min(stop, self.height))

    def deltas(self, start: int, stop: int) -> list[Tensor]:
        """Every contributor's δ (or θ, where the method reads no base or wants no differences) in these rows."""
        if not (self.with_base and self.differences):
            return [wide(theta) for theta in self.stored(start, stop)]
        base = self.base(start, stop)
        return [difference(theta, base) for theta in self.stored(start, stop)]

    def stored(self, start: int, stop: int) -> Iterator[Tensor]:
        """Every contributor's θ in these rows, as it is stored."""
        (name,), stop = self.unit.names, min(stop, self.height)
        return (share.rows(name, start, stop) for share in self.shares)

    def position(self, start: int, stop: int) -> Position:
        """Where these rows lie, for random numbers and for options that differ between contributors."""
        (name,), rows = self.unit.names, self.unit.facts[0].rows or range(self.height)
        return Position(name, rows[start : min(stop, self.height)], [share.number for share in self.shares])


Function = Callable[[Any, Iterator[Tensor], Sequence[float], Any, Position], Tensor]


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """A method that computes each number from the same number of every contributor.

    Attributes:
        function: of θ₀, the δᵢ, the coefficients, the options and the position: what is added to θ₀, times the option
            ``scale`` where there is one. The δᵢ are made one at a time and are the function's own. For a method
            that needs no base model, θ₀ is None, the δᵢ are the θᵢ, and the function gives the merged numbers. It is
            called with a few rows at a time.
        reduce: where the function depends on the whole tensor, what it has to know of it: a function of the whole,
            the coefficients and the options.
        by_rows: the function looks at whole rows, each by itself; a tensor of one dimension is one row.
        differences: False for a function that takes the θᵢ as they are stored, not the δᵢ, and gives the merged
            numbers, though it reads the base: it can return what is in a model exactly.
        weighted: where the result is θ₀ + Σwᵢδᵢ, the wᵢ, of the coefficients and the options.
        thresholds: how many k-th largest numbers of each contributor ``reduce`` looks for at once, which takes memory.
    """

    function: Function
    reduce: Callable[[Whole, Sequence[float], Any], Any] | None = None
    by_rows: bool = False
    differences: bool = True
    thresholds: int = 1

    @property
    def streaming(self) -> str:
        """By rows: whatever the size of a tensor."""
        return "some rows of a tensor" + (", after a pass over the whole" if self.reduce is not None else "")

    weighted: Callable[[Sequence[float], Any], list[float]] | None = None

    @property
    def reads_twice(self) -> bool:
        """Where something has to be known of the whole."""
        return self.reduce is not None

    def weights(self, coefficients: Sequence[float]) -> list[float] | None:
        """Those of ``weighted``."""
        return None if self.weighted is None else self.weighted(coefficients, self.options)

    def configured(self, options: Options) -> Self:
        """With an option ``task_vectors``, the base model is read where that is true."""
        method = super().configured(options)
        if (reads_base := getattr(options, "task_vectors", None)) is None:
            return method
        return replace(method, needs=replace(method.needs, base=bool(reads_base)))

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Every tensor by itself; of those that the base model holds, where it is needed."""

        def treat(fact: Facts) -> str:
            return self.name if fact.in_base or not self.needs.base else "not in the base model"

        return separately(facts, treat, (self.name,))

    def min_slice_rows(self, unit: Unit) -> int | None:
        """Any row by itself, once the whole is known."""
        return None if self.by_rows and len(unit.facts[0].shape) < 2 else 1

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """The whole as one slice."""
        return self.prepare(unit, shares)(unit, shares)

    def prepare(self, unit: Unit, shares: Sequence[Share]) -> Callable[[Unit, Sequence[Share]], Merged]:
        """Reduce the whole tensor."""
        found = None
        if self.reduce is not None:
            coefficients = [share.coefficient for share in shares]
            whole = Whole(unit, shares, self.needs.base, self.differences, self.by_rows)
            found = self.reduce(whole, coefficients, self.options)
        return lambda part, restricted: self._apply(part, restricted, found)

    def memory(self, unit: Unit, contributors: int) -> int:
        """Every δ, the base, three sums and masks; or what the search for a threshold of the whole takes."""
        work = super().memory(unit, contributors)
        if self.reduce is None:
            return work
        return max(work, selection_memory(elements(unit), contributors, contributors * self.thresholds))

    def _given(self, tensors: Sequence[Tensor], origin: Tensor | None) -> Iterator[Tensor]:
        """What a function is given of the contributors: differences lie behind each other where they can."""
        if origin is None:
            return (wide(stored) if self.differences else stored for stored in tensors)
        places = origin.new_empty(len(tensors), *origin.shape)
        return (difference(stored, origin, place) for stored, place in zip(tensors, places, strict=True))

    def _apply(self, unit: Unit, shares: Sequence[Share], whole: Any) -> Merged:
        (name,), (fact,) = unit.names, unit.facts
        base = shares[0].base(name) if self.needs.base else None
        tensors = [share.stored(name) for share in shares]
        rows = range(fact.shape[0] if fact.shape else 1) if fact.rows is None else fact.rows
        position = Position(name, rows, [share.number for share in shares], whole)
        coefficients = [share.coefficient for share in shares]
        scale = getattr(self.options, "scale", 1.0)

        def block(here: slice | EllipsisType) -> Tensor:
            theirs = None if base is None else base[here]
            origin = theirs if self.differences else None
            deltas = self._given([tensor[here] for tensor in tensors], origin)
            there = position if here is ... else replace(position, rows=rows[here])
            found = self.function(theirs, deltas, coefficients, self.options, there)
            return found if origin is None else added(origin, found, scale)

        blocks = blocks_of_rows(tensors[0], self.by_rows)
        merged = block(...) if len(blocks) < 2 else _joined(map(block, blocks), blocks, fact.shape)
        return Merged({name: merged}, "; ".join(dict.fromkeys(position.notes)) or None)


def _joined(parts: Iterator[Tensor], blocks: Sequence[slice], shape: Sequence[int]) -> Tensor:
    """Parts put together to one tensor, each before the next one is made."""
    first = next(parts)
    merged = first.new_empty(shape)
    for here, part in zip(blocks, chain([first], parts), strict=True):
        merged[here] = part
    return merged


def difference(stored: Tensor, base: Tensor, place: Tensor | None = None) -> Tensor:
    """θ − θ₀ in float32 or wider: in a place like θ₀ if one is given, or in that of θ, which is not used again."""
    if devices.elsewhere(stored) and stored.dtype.itemsize == 2 and base.dtype == torch.float32:
        return torch.sub(stored, base)  # one pass, in which θ is widened
    if stored.dtype != torch.bfloat16 or not stored.is_contiguous() or not fits_kernels(base):
        return wide(stored).sub_(base)
    from merganser.methods import kernels

    found = torch.empty_like(base) if place is None else place
    kernels.subtract(kernels.flat(stored.view(torch.uint16)), kernels.flat(base), kernels.flat(found))
    return found


def blocks_of_rows(tensor: Tensor, by_rows: bool = False) -> list[slice]:
    """Rows that are worked on at once, so that they fit a core's cache; none where all are, as on other devices.

    Args:
        tensor: some rows of the whole tensor.
        by_rows: a tensor of one dimension is one row.
    """
    if tensor.dim() < 1 + by_rows or tensor.device.type != "cpu":
        return []
    step = max(1, BLOCK // max(prod(tensor.shape[1:]), 1))
    return [slice(start, start + step) for start in range(0, len(tensor), step)]


def fits_kernels(*tensors: Tensor) -> bool:
    """Whether :mod:`merganser.methods.kernels` can work on these: float32 on the processor, without gaps."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def stacked(tensors: Sequence[Tensor]) -> np.ndarray:
    """(T, n): the numbers of T tensors on the processor, as uint16 where all are bfloat16, else as float32."""
    if all(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return torch.stack(list(tensors)).reshape(len(tensors), -1).view(torch.uint16).numpy()
    first, size = tensors[0], tensors[0].numel()
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    offsets = [tensor.storage_offset() - first.storage_offset() for tensor in tensors]
    if len(storages) == 1 and fits_kernels(*tensors) and offsets == [size * i for i in range(len(tensors))]:
        return first.as_strided((len(tensors), size), (size, 1)).numpy()  # they lie behind each other already
    return torch.stack([wide(tensor) for tensor in tensors]).reshape(len(tensors), -1).numpy()


def added(total: Tensor, tensor: Tensor, factor: float) -> Tensor:
    """total + factor · tensor, in place unless ``tensor`` is wider."""
    return total.add_(tensor, alpha=factor) if tensor.dtype == total.dtype else total + tensor * factor
