"""Elementwise methods: the first shape, θ = θ₀ + f(δ₁, …, δₙ) number by number, with δᵢ = θᵢ − θ₀."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import EllipsisType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements, separately
from merganser.methods.selection import PIECE, selection_memory

#: Numbers of a slice that a function is given at once on a processor: few enough for the caches of one core, and enough
#: that threads do not wait for each other between calls.
BLOCK = 1 << 18
_HALVES = 2  # random numbers that a 64-bit word gives


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

        They depend on the seed, the tensor's name, the contributor's number and the place in the whole tensor (PCG
        can be entered anywhere: O'Neill 2014), and so on nothing that a run could choose.
        """
        identity = f"{seed} {self.contributors[index]} {self.name}".encode()
        key = int.from_bytes(hashlib.sha256(identity).digest()[:16], "little")
        width = prod(delta.shape[1:])
        found = [_uniform(key, start * width, stop * width) for start, stop in _runs(self.rows)]
        return torch.from_numpy(np.concatenate(found)).reshape(delta.shape).to(delta.device)


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
        (name,), stop = self.unit.names, min(stop, self.height)
        if not (self.with_base and self.differences):
            return [share.rows(name, start, stop) for share in self.shares]
        base = self.base(start, stop)
        return [share.rows(name, start, stop).sub_(base) for share in self.shares]

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
        differences: False for a function that takes the θᵢ, not the δᵢ, and gives the merged numbers, though it
            reads the base: it can return what is in a model exactly.
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

    def _apply(self, unit: Unit, shares: Sequence[Share], whole: Any) -> Merged:
        (name,), (fact,) = unit.names, unit.facts
        base = shares[0].base(name) if self.needs.base else None
        tensors = [share.tensor(name) for share in shares]
        rows = range(fact.shape[0] if fact.shape else 1) if fact.rows is None else fact.rows
        position = Position(name, rows, [share.number for share in shares], whole)
        coefficients = [share.coefficient for share in shares]
        scale = getattr(self.options, "scale", 1.0)

        def block(here: slice | EllipsisType) -> Tensor:
            theirs = None if base is None else base[here]
            origin = theirs if self.differences else None
            deltas = (tensor[here] if origin is None else tensor[here].sub_(origin) for tensor in tensors)
            there = position if here is ... else replace(position, rows=rows[here])
            found = self.function(theirs, deltas, coefficients, self.options, there)
            return found if origin is None else added(origin, found, scale)

        blocks = blocks_of_rows(tensors[0], self.by_rows)
        merged = block(...) if len(blocks) < 2 else _in_place(map(block, blocks), blocks, tensors[0])
        return Merged({name: merged}, "; ".join(dict.fromkeys(position.notes)) or None)


def _in_place(parts: Iterator[Tensor], blocks: Sequence[slice], used: Tensor) -> Tensor:
    """Parts put together in the place of a tensor whose numbers are used up, block by block; often they are there."""
    merged = used
    for here, part in zip(blocks, parts, strict=True):
        if part.dtype != merged.dtype:
            merged = torch.empty_like(used, dtype=part.dtype)
        if part.data_ptr() != merged[here].data_ptr():
            merged[here] = part
    return merged


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


def added(total: Tensor, tensor: Tensor, factor: float) -> Tensor:
    """total + factor · tensor, in place unless ``tensor`` is wider."""
    return total.add_(tensor, alpha=factor) if tensor.dtype == total.dtype else total + tensor * factor


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Rows that follow each other, as (start, stop)."""
    if isinstance(rows, range):
        return [(rows.start, rows.stop)]
    return [(row, row + 1) for row in rows]


def _uniform(key: int, start: int, stop: int) -> np.ndarray:
    """Numbers start:stop of an endless sequence."""
    bits = np.random.PCG64DXSM(key)
    bits.advance(start // _HALVES)
    count = -(-stop // _HALVES) - start // _HALVES
    # Integers of the whole range are the generator's own; unlike random_raw, other threads can run meanwhile.
    words = np.random.Generator(bits).integers(2**64 - 1, size=count, dtype=np.uint64, endpoint=True)
    halves = words.view(np.uint32)
    halves >>= np.uint32(8)
    numbers = halves.astype(np.float32)
    numbers *= np.float32(2.0**-24)
    return numbers[start % _HALVES :][: stop - start]
