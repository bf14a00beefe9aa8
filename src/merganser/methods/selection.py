"""The k-th largest magnitude of large tensors, exactly, without keeping or sorting their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, sqrt

import numpy as np
import torch
from torch import Tensor

from merganser.methods import devices

#: Numbers of a tensor that are looked at at once.
PIECE = 1 << 19
_SAMPLE, _PLACES = 1 << 15, 16  # numbers of a sample, and at how many places of a tensor they are taken
_MARGIN, _LEAST = 0.03, 0.002  # of the share s of larger numbers, on both sides: so much times √(s·(1 − s)), and more
_BINS = 1 << 20  # of the histogram between two bounds

Bounds = tuple[float, float]
#: Which of the largest numbers, from 1; or that as a function of how many numbers are not 0.
Place = int | Callable[[int], int]


def kth_largest(
    read: Callable[[int, int], Sequence[Tensor]], height: int, width: int, ks: Sequence[Place]
) -> list[float]:
    """The k-th largest magnitude of each of several tensors, each with a k of its own.

    A sample tells between which two numbers it very likely is. A pass counts what is above and at these two, and how
    often each number between them occurs: a few hundredths of all. That is the end of it but where the sample was
    wrong, or where so many different numbers lie between that some have to be counted together: then the same is done
    with closer bounds.

    Args:
        read: the float32 numbers of rows start:stop of each tensor.
        height, width: of the tensors, in rows and numbers a row.
        ks: of each tensor, from 1, or a function of how many of its numbers are not 0; for 0 the answer is infinity.
    """
    pieces = _pieces(height, width, PIECE)
    if len(pieces) == 1:
        tensors = read(*pieces[0])
        places = [_place(k, _varying(numbers) if callable(k) else 0) for numbers, k in zip(tensors, ks, strict=True)]
        return [_kth_largest(numbers, k)[0] if k else inf for numbers, k in zip(tensors, places, strict=True)]
    bounds, device = _sampled(read, height, width, ks)
    if device.type != "cpu":
        pieces = _pieces(height, width, devices.PIECE)
    found: list[float | None] = [None if k else inf for k in ks]
    while None in found:
        counts = {i: Between(*bounds[i], device) for i in range(len(ks)) if found[i] is None}
        varying = dict.fromkeys(counts, 0)
        for start, stop in pieces:
            numbers = read(start, stop)
            for i, one in counts.items():
                one.count(numbers[i])
                varying[i] += _varying(numbers[i]) if callable(ks[i]) else 0
            del numbers  # before the next piece is read
        for i, one in counts.items():
            if not (k := _place(ks[i], varying[i])):
                found[i] = inf
                continue
            bounds[i] = one.closer(k)
            found[i] = bounds[i][0] if bounds[i][0] == bounds[i][1] else None
    return [value for value in found if value is not None]


def _pieces(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Rows start:stop of about so many numbers each."""
    step = max(1, size // max(width, 1))
    return [(start, min(start + step, height)) for start in range(0, height, step)]


def _place(k: Place, varying: int) -> int:
    return k(varying) if callable(k) else k


def _varying(numbers: Tensor) -> int:
    if devices.elsewhere(numbers):
        return int(torch.count_nonzero(numbers))
    return int(np.count_nonzero(numbers.numpy()))


def selection_memory(numbers: int, tensors: int, places: int) -> int:
    """Estimate of the bytes of the processor's memory that :func:`kth_largest` takes.

    Args:
        numbers: of each tensor, at least.
        tensors: how many there are.
        places: how many k-th largest are looked for; 0 for a pass that looks for none.
    """
    piece = min(numbers, PIECE) * 4 * (tensors + 3 + tensors // 2)
    cut = places and numbers > PIECE // 2  # a slice may be of fewer numbers than a piece
    return piece + (_BINS * (9 * places + 16) if cut else 0)


class Between:
    """How many magnitudes of some float32 numbers lie above two bounds, at them, and where between them.

    The bits of magnitudes, read as integers, are in their order. Numbers between the bounds are counted by their
    upper bits: a count is of one number where the bounds are close, or the lower bits zero, as they mostly are in
    differences of bfloat16 numbers.

    Args:
        low, high: the bounds.
        device: where the numbers are, and are counted.
    """

    def __init__(self, low: float, high: float, device: torch.device | str = "cpu") -> None:
        self.low, self.high = np.float32(low), np.float32(high)
        # Above high, from high, above low, from low.
        self._beside = torch.zeros(4, dtype=torch.int64, device=device)
        first, last = _bits(low), _bits(high)
        self._shift = max(0, (last - first).bit_length() - _BINS.bit_length() + 1)
        self._first = first >> self._shift
        self._counts = torch.zeros((last >> self._shift) - self._first + 1, dtype=torch.int64, device=device)
        self._mixed = torch.zeros_like(self._counts, dtype=torch.bool)  # which counts are of several numbers

    def count(self, numbers: Tensor) -> None:
        """Look at some more numbers."""
        if devices.elsewhere(numbers):
            bits = _bits(float(self.low)), _bits(float(self.high))
            self._beside += devices.count_between(numbers, *bits, self._shift, self._first, self._counts, self._mixed)
            return
        from merganser.methods import kernels

        values, counts, mixed = kernels.flat(numbers.contiguous()), self._counts.numpy(), self._mixed.numpy()
        found = kernels.count_between(values, self.low, self.high, self._shift, self._first, counts, mixed)
        self._beside += torch.tensor(found)

    def closer(self, k: int) -> Bounds:
        """Bounds of the k-th largest of all numbers that were looked at; where it is known, both are it."""
        low, high = float(self.low), float(self.high)
        above, from_high, above_low, from_low = self._beside.tolist()
        if k <= above:
            return high, inf
        if k <= from_high:
            return high, high
        if k > from_low:
            return 0.0, low
        if k > above_low:
            return low, low
        from_top = self._counts.flip(0).cumsum(0)
        place = len(from_top) - 1 - int(torch.searchsorted(from_top, k - from_high))
        first = (self._first + place) << self._shift
        last = first + (1 << self._shift) - 1 if self._shift and self._mixed[place] else first
        return _number(first), _number(last)


def _sampled(
    read: Callable[[int, int], Sequence[Tensor]], height: int, width: int, ks: Sequence[Place]
) -> tuple[list[Bounds], torch.device]:
    """Two numbers of each tensor between which the k-th largest very likely is, and where the tensors lie."""
    rows = max(1, _SAMPLE // _PLACES // max(width, 1))
    places = max(1, min(_PLACES, height // rows))
    starts = [place * (height - rows) // max(places - 1, 1) for place in range(places)]
    samples = [read(start, start + rows) for start in starts]
    bounds = []
    for number, k in enumerate(ks):
        values = torch.cat([sample[number].flatten() for sample in samples])
        share = k(_varying(values)) / len(values) if callable(k) else k / (height * width)
        margin = _MARGIN * sqrt(max(share * (1 - share), 0.0)) + _LEAST  # as wide as chance makes a sample's share
        more, fewer = (round((share + side) * len(values)) for side in (margin, -margin))
        inner = [k for k in (more, fewer) if 0 < k < len(values)]
        found = dict(zip(inner, _kth_largest(values, *inner), strict=True))
        bounds.append((found.get(more, 0.0), found.get(fewer, inf)))
    return bounds, samples[0][0].device


def _kth_largest(numbers: Tensor, *ks: int) -> list[float]:
    """The k-th largest magnitude of a few numbers, for each k."""
    if devices.elsewhere(numbers):
        return devices.largest(numbers, ks)
    values = np.abs(numbers.numpy().reshape(-1))
    places = np.array([len(values) - k for k in ks], dtype=np.int64)
    return [float(value) for value in np.partition(values, places)[places]]


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.int32))


def _number(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))
