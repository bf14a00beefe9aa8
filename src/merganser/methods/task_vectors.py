"""Task vectors δᵢ = θᵢ − θ₀, transformed before they are added to the base model.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): θ₀ + s Σ cᵢδᵢ.
TIES (Yadav et al. 2023, arXiv 2306.01708): each δᵢ keeps the share of its numbers that are largest in magnitude,
tensor by tensor; a number's sign is that of the weighted sum; θ₀ + s · the weighted mean of the δᵢ that have this sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import floor, prod

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements

_BINS = 1 << 16  # the upper and the lower half of a float32's bits


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
        keep = floor(self.options.density * prod(unit.facts[0].shape))

        def magnitudes() -> Iterator[list[Tensor]]:
            everyone = [share.pieces(name) for share in shares]
            for base, *tuned in zip(shares[0].base_pieces(name), *everyone, strict=True):
                yield [_magnitude(tensor.sub_(base)) for tensor in tuned]

        thresholds = kth_largest(magnitudes, keep, len(shares))
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
            delta.mul_(_magnitude(delta) >= threshold)
            elected = _added(elected, delta, share.coefficient)
            trimmed.append(delta)
        positive = elected >= 0  # where they cancel out, the positive ones
        agreed = torch.zeros_like(base)
        weight = torch.zeros_like(base)
        for share, delta in zip(shares, trimmed, strict=True):
            agrees = (delta > 0).eq_(positive).logical_and_(delta != 0)
            agreed = _added(agreed, delta.mul_(agrees), share.coefficient)
            weight.add_(agrees, alpha=share.coefficient)
        agreed.div_(weight.masked_fill_(weight == 0, 1.0))
        return Merged({name: _added(base, agreed, self.options.scale)})


def kth_largest(magnitudes: Callable[[], Iterator[Sequence[Tensor]]], k: int, count: int) -> list[float]:
    """The k-th largest of each of several streams of numbers, exactly, without keeping or sorting them.

    The bits of non-negative float32 numbers are in the order of the numbers. So a histogram of their upper halves
    tells the upper half of the answer, and one of the lower halves of the numbers that share it tells the rest.

    Args:
        magnitudes: starts the streams anew; yields a piece of each, non-negative float32. Called twice.
        k: from 1; for 0 the answer is infinity.
        count: the number of streams.
    """
    if k == 0:
        return [float("inf")] * count
    histograms = torch.zeros(2, count, _BINS, dtype=torch.int64)
    upper, ranks = [0] * count, [k] * count
    for half in range(2):
        for pieces in magnitudes():
            for stream, piece in enumerate(pieces):
                bits = piece.flatten().view(torch.int32)
                if half == 0:
                    bits = bits >> 16
                else:
                    bits = bits[(bits >> 16) == upper[stream]] & (_BINS - 1)
                histograms[half, stream] += torch.bincount(bits, minlength=_BINS).cpu()
        for stream in range(count):
            found, above = _bin_of(histograms[half, stream], ranks[stream])
            ranks[stream] -= above
            upper[stream] = upper[stream] << 16 | found
    return [torch.tensor(bits, dtype=torch.int32).view(torch.float32).item() for bits in upper]


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest, and how many are in bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(histogram) - 1 - place, int(from_top[place - 1]) if place else 0


def _magnitude(delta: Tensor) -> Tensor:
    return delta.abs().to(torch.float32)


def _added(total: Tensor, tensor: Tensor, factor: float) -> Tensor:
    """total + factor · tensor, in place unless ``tensor`` is wider."""
    return total.add_(tensor, alpha=factor) if tensor.dtype == total.dtype else total + tensor * factor
