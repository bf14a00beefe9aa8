"""Task vectors δᵢ = θᵢ − θ₀, transformed before they are added to the base model.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): θ₀ + s Σ cᵢδᵢ.
TIES (Yadav et al. 2023, arXiv 2306.01708): each δᵢ keeps the share of its numbers that are largest in magnitude,
tensor by tensor; a number's sign is that of the weighted sum; θ₀ + s · the weighted mean of the δᵢ that have this sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, prod

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements
from merganser.methods.selection import kth_largest, selection_memory


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
        """Every trimmed task vector, the base, three sums and masks; or what the search for thresholds takes."""
        return max(super().memory(unit, contributors), selection_memory(elements(unit), contributors))

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


def _before(threshold: float, dtype: torch.dtype) -> float:
    """The largest float32 number below a threshold; negative below 0, so that everything is above it."""
    if threshold == 0:
        return -1.0
    return torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()


def _added(total: Tensor, tensor: Tensor, factor: float) -> Tensor:
    """total + factor · tensor, in place unless ``tensor`` is wider."""
    return total.add_(tensor, alpha=factor) if tensor.dtype == total.dtype else total + tensor * factor
