"""Task vectors δᵢ = θᵢ − θ₀, transformed before they are added to the base model.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): θ₀ + s Σ cᵢδᵢ.
TIES (Yadav et al. 2023, arXiv 2306.01708): each δᵢ keeps the share of its numbers that are largest in magnitude,
tensor by tensor; a number's sign is that of the weighted sum; θ₀ + s · the weighted mean of the δᵢ that have this sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, inf, prod

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements

_BINS = 1 << 16  # the upper and the lower half of a float32's bits
_PIECE = 1 << 19  # numbers of a tensor that are looked at at once
_SAMPLE, _PLACES = 1 << 15, 16  # numbers of a sample, and at how many places of a tensor they are taken
_MARGIN = 0.015  # of the share of numbers that are larger, on both sides of the sample's
_SPAN = 1 << 20  # float32 numbers between two that are told apart in one pass


class TaskVectors(Method):
    """What both have in common: every tensor that the base model holds in the same shape, elementwise."""

    needs_base = True

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """Every tensor by itself."""
        units = [Unit((fact.name,), self.name, (fact,)) for fact in facts if fact.in_base]
        return units, {fact.name: "not in the base model" for fact in facts if not fact.in_base}

    def grain(self, unit: Unit) -> int | None:
        """Elementwise, once the thresholds are known."""
        return 1


class TaskArithmeticOptions(Options):
    """Options of :class:`TaskArithmetic`."""

    scale: float = Field(0.4, description="multiplier of the summed task vectors")


class TaskArithmetic(TaskVectors):
    """θ₀ + s Σ cᵢδᵢ; coefficients are not normalised."""

    name = "task_arithmetic"
    summary = "base model plus a multiple of the summed differences from it"
    Options = TaskArithmeticOptions
    signed = True

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """One pass."""
        (name,) = unit.names
        base = shares[0].base(name)
        total = torch.zeros_like(base)
        for share in shares:
            total = _added(total, share.tensor(name).sub_(base), share.coefficient)
        return Merged({name: _added(base, total, self.options.scale)})


class TIESOptions(Options):
    """Options of :class:`TIES`."""

    density: float = Field(0.2, gt=0, le=1, description="share of each task vector that is kept")
    scale: float = Field(1.0, description="multiplier of the merged task vector")


class TIES(TaskVectors):
    """Trim, elect signs, and average what agrees."""

    name = "ties"
    summary = "base model plus the mean of the large differences that agree in sign"
    Options = TIESOptions

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """Thresholds of the whole tensors, then everything else in one pass."""
        return self.prepare(unit, shares)(unit, shares)

    def prepare(self, unit: Unit, shares: Sequence[Share]) -> Callable[[Unit, Sequence[Share]], Merged]:
        """Find each contributor's threshold: the smallest magnitude that is kept."""
        (name,) = unit.names
        shape = unit.facts[0].shape
        keep = floor(self.options.density * prod(shape))

        def magnitudes(start: int, stop: int) -> list[Tensor]:
            base = shares[0].base_rows(name, start, stop)
            return [share.rows(name, start, stop).sub_(base).abs_().to(torch.float32) for share in shares]

        height = shape[0] if shape else 1
        thresholds = kth_largest(magnitudes, height, prod(shape) // max(height, 1), keep, len(shares))
        return lambda part, restricted: self._elect(part, restricted, thresholds)

    def memory(self, unit: Unit, contributors: int) -> int:
        """Every trimmed task vector, the base, three sums and masks."""
        return elements(unit) * 4 * (contributors + 7)

    def _elect(self, unit: Unit, shares: Sequence[Share], thresholds: Sequence[float]) -> Merged:
        (name,) = unit.names
        base = shares[0].base(name)
        trimmed = []
        elected = torch.zeros_like(base)
        for share, threshold in zip(shares, thresholds, strict=True):
            delta = share.tensor(name).sub_(base)
            # What is above the number before the threshold is at least the threshold.
            delta = torch.hardshrink(delta, _before(threshold, delta.dtype))
            elected = _added(elected, delta, share.coefficient)
            trimmed.append(delta)
        sign = torch.copysign(torch.ones_like(elected), elected)  # positive where they cancel out
        agreed, weight = torch.zeros_like(elected), torch.zeros_like(elected)
        for share, delta in zip(shares, trimmed, strict=True):
            delta = delta.mul(sign) if delta.dtype != sign.dtype else delta.mul_(sign)
            agreed.add_(delta.clamp_min_(0), alpha=share.coefficient)
            weight.add_(delta.sign_(), alpha=share.coefficient)
        agreed.div_(weight.clamp_min_(torch.finfo(weight.dtype).tiny)).mul_(sign)
        return Merged({name: _added(base, agreed, self.options.scale)})


def kth_largest(
    magnitudes: Callable[[int, int], Sequence[Tensor]], height: int, width: int, k: int, count: int
) -> list[float]:
    """The k-th largest of each of several tensors, exactly, without keeping or sorting them.

    A sample tells between which two numbers it must be. One pass counts what is above them, and how often each float32
    number between them occurs: a few hundredths do. Where the sample was wrong, or the two lie far apart, two
    histograms of all numbers' bits tell.

    Args:
        magnitudes: non-negative float32 numbers of rows start:stop of each tensor.
        height, width: of the tensors, in rows and numbers a row.
        k: from 1; for 0 the answer is infinity.
        count: the number of tensors.
    """
    if k == 0:
        return [float("inf")] * count
    step = max(1, _PIECE // max(width, 1))
    pieces = [(start, min(start + step, height)) for start in range(0, height, step)]
    if len(pieces) == 1:
        return [_kth(numbers.flatten(), k) for numbers in magnitudes(*pieces[0])]
    counts = [
        _Between(*bracket) for bracket in _brackets(magnitudes, height, width, k / (height * width), count)
    ]
    if any(one.narrow for one in counts):
        for start, stop in pieces:
            for one, values in zip(counts, magnitudes(start, stop), strict=True):
                one.count(values)
    found = [one.ranked(k) for one in counts]
    return [
        _by_bits(lambda a, b, n=number: magnitudes(a, b)[n], pieces, k) if value is None else value  # type: ignore[misc]
        for number, value in enumerate(found)
    ]


class _Between:
    """How many numbers lie above ``high``, and how often each float32 number from ``low`` to ``high`` occurs.

    The bits of non-negative float32 numbers, read as integers, are in the order of the numbers.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high, self.above = low, high, 0
        self._first, self._last = _bits(low), _bits(high)
        self.narrow = self._last - self._first < _SPAN
        self._counts = torch.zeros(self._last - self._first + 1 if self.narrow else 0, dtype=torch.int64)

    def count(self, values: Tensor) -> None:
        """Look at some more numbers."""
        if not self.narrow:
            return
        self.above += int(torch.count_nonzero(values > self.high))
        chosen = _chosen(values, (values >= self.low).logical_and_(values <= self.high)).cpu()
        place = chosen.view(torch.int32).to(torch.int64).sub_(self._first)
        self._counts.scatter_add_(0, place, torch.ones_like(place))

    def ranked(self, k: int) -> float | None:
        """The k-th largest of all numbers; None if it is not among those that were counted."""
        from_top, rank = self._counts.flip(0).cumsum(0), k - self.above
        if not self.narrow or not 1 <= rank <= int(from_top[-1]):
            return None
        bits = self._last - int(torch.searchsorted(from_top, rank))
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _brackets(
    magnitudes: Callable[[int, int], Sequence[Tensor]], height: int, width: int, share: float, count: int
) -> list[tuple[float, float]]:
    """Two numbers of each tensor between which the one that ``share`` of all numbers reach very likely is."""
    rows = max(1, _SAMPLE // _PLACES // max(width, 1))
    places = max(1, min(_PLACES, height // rows))
    starts = [place * (height - rows) // max(places - 1, 1) for place in range(places)]
    samples = [magnitudes(start, start + rows) for start in starts]
    brackets = []
    for number in range(count):
        values = torch.cat([sample[number].flatten() for sample in samples])
        more, fewer = (round((share + margin) * len(values)) for margin in (_MARGIN, -_MARGIN))
        low = _kth(values, max(more, 1)) if more < len(values) else 0.0
        brackets.append((low, _kth(values, fewer) if fewer > 0 else inf))
    return brackets


def _kth(values: Tensor, k: int) -> float:
    """The k-th largest of a few numbers."""
    return float(values.kthvalue(len(values) - k + 1).values)


def _by_bits(magnitudes: Callable[[int, int], Tensor], pieces: Sequence[tuple[int, int]], k: int) -> float:
    """The k-th largest by the bits of non-negative float32 numbers, which are in the order of the numbers.

    A histogram of their upper halves tells the upper half of the answer, one of the lower halves of those numbers that
    share it the rest.
    """
    upper, rank = 0, k
    for half in range(2):
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for start, stop in pieces:
            bits = magnitudes(start, stop).flatten().view(torch.int32)
            chosen = bits >> 16 if half == 0 else _chosen(bits, (bits >> 16) == upper) & (_BINS - 1)
            histogram += torch.bincount(chosen, minlength=_BINS).cpu()
        from_top = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, rank))
        rank -= int(from_top[place - 1]) if place else 0
        upper = upper << 16 | (_BINS - 1 - place)
    return torch.tensor(upper, dtype=torch.int32).view(torch.float32).item()


def _chosen(values: Tensor, mask: Tensor) -> Tensor:
    """The few numbers that a mask chooses; NumPy passes over the others fastest."""
    if values.device.type != "cpu":
        return values[mask]
    return torch.from_numpy(values.numpy().reshape(-1)[np.flatnonzero(mask.numpy())])


def _before(threshold: float, dtype: torch.dtype) -> float:
    """The largest float32 number below a threshold; negative below 0, so that everything is above it."""
    if threshold == 0:
        return -1.0
    return torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()


def _added(total: Tensor, tensor: Tensor, factor: float) -> Tensor:
    """total + factor · tensor, in place unless ``tensor`` is wider."""
    return total.add_(tensor, alpha=factor) if tensor.dtype == total.dtype else total + tensor * factor
