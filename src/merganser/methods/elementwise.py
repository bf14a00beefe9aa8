"""Elementwise methods: the first shape, θ = θ₀ + f(δ₁, …, δₙ) number by number, with δᵢ = θᵢ − θ₀."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Share, Unit, elements, separately
from merganser.methods.selection import selection_memory

#: Random numbers come in blocks of so many 64-bit words, of which each gives two.
_WORDS, _HALVES = 4, 2

#: Rows start:stop of every contributor's δ, as far as there are so many; the caller's own.
Reader = Callable[[int, int], Sequence[Tensor]]


@dataclass(frozen=True)
class Position:
    """Where the numbers that a function is given lie, so that its result does not depend on how they are cut.

    Attributes:
        name: of the tensor.
        rows: which rows of the whole tensor these are.
        contributors: the number of each, from 0.
        whole: what ``reduce`` found of the whole tensor.
    """

    name: str
    rows: Sequence[int]
    contributors: Sequence[int]
    whole: Any = None

    def uniform(self, delta: Tensor, index: int, seed: int) -> Tensor:
        """Random numbers from [0, 1) in float32 for the δ of this index, shaped like it and on its device.

        They depend on the seed, the tensor's name, the contributor's number and the place in the whole tensor
        (counter-based: Salmon et al. 2011), and so on nothing that a run could choose.
        """
        identity = f"{seed} {self.contributors[index]} {self.name}".encode()
        key = int.from_bytes(hashlib.sha256(identity).digest()[:16], "little")
        width = prod(delta.shape[1:])
        found = [_uniform(key, start * width, stop * width) for start, stop in _runs(self.rows)]
        return torch.from_numpy(np.concatenate(found)).reshape(delta.shape).to(delta.device)


Function = Callable[[Any, Iterator[Tensor], Sequence[float], Any, Position], Tensor]


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """A method that computes each number from the same number of every contributor.

    Attributes:
        function: of θ₀, the δᵢ, the coefficients, the options and the position: what is added to θ₀, times the option
            ``scale`` where there is one. The δᵢ are read one at a time and are the function's own. For a method
            that needs no base model, θ₀ is None, the δᵢ are the θᵢ, and the function gives the merged numbers.
        reduce: where the function depends on the whole tensor, what it has to know of it: a function of a reader of
            rows, the shape, the coefficients and the options.
    """

    function: Function
    reduce: Callable[[Reader, tuple[int, ...], Sequence[float], Any], Any] | None = None

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Every tensor by itself; of those that the base model holds, where it is needed."""

        def treat(fact: Facts) -> str:
            return self.name if fact.in_base or not self.needs.base else "not in the base model"

        return separately(facts, treat, (self.name,))

    def min_slice_rows(self, unit: Unit) -> int | None:
        """Elementwise, once the whole is known."""
        return 1

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """The whole as one slice."""
        return self.prepare(unit, shares)(unit, shares)

    def prepare(self, unit: Unit, shares: Sequence[Share]) -> Callable[[Unit, Sequence[Share]], Merged]:
        """Reduce the whole tensor."""
        whole = None
        if self.reduce is not None:
            (name,), (fact,) = unit.names, unit.facts

            def read(start: int, stop: int) -> list[Tensor]:
                stop = min(stop, fact.shape[0] if fact.shape else 1)
                if not self.needs.base:
                    return [share.rows(name, start, stop) for share in shares]
                base = shares[0].base_rows(name, start, stop)
                return [share.rows(name, start, stop).sub_(base) for share in shares]

            whole = self.reduce(read, fact.shape, [share.coefficient for share in shares], self.options)
        return lambda part, restricted: self._apply(part, restricted, whole)

    def memory(self, unit: Unit, contributors: int) -> int:
        """Every δ, the base, three sums and masks; or what the search for a threshold of the whole takes."""
        work = super().memory(unit, contributors)
        if self.reduce is None:
            return work
        return max(work, selection_memory(elements(unit), contributors))

    def _apply(self, unit: Unit, shares: Sequence[Share], whole: Any) -> Merged:
        (name,), (fact,) = unit.names, unit.facts
        base = shares[0].base(name) if self.needs.base else None

        def deltas() -> Iterator[Tensor]:
            for share in shares:
                tensor = share.tensor(name)
                yield tensor if base is None else tensor.sub_(base)

        rows = range(fact.shape[0] if fact.shape else 1) if fact.rows is None else fact.rows
        position = Position(name, rows, [share.number for share in shares], whole)
        coefficients = [share.coefficient for share in shares]
        found = self.function(base, deltas(), coefficients, self.options, position)
        return Merged({name: found if base is None else added(base, found, getattr(self.options, "scale", 1.0))})


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
    block = _WORDS * _HALVES
    generator = np.random.Philox(key=key)
    generator.advance(start // block)
    words = generator.random_raw(-(-(stop - start // block * block) // _HALVES))
    numbers = (words.view(np.uint32) >> np.uint32(8)) * np.float32(2.0**-24)
    return numbers[start % block :][: stop - start].astype(np.float32, copy=False)
