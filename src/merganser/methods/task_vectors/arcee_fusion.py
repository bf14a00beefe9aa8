"""Arcee Fusion (Arcee AI 2025): the base, with those numbers of one model that changed most and matter most.

A number's importance is the magnitude of its change times the Kullback-Leibler divergence of the softmax of its row
from that of the base's row. Those at or above median + 1.5 · (upper quartile − lower quartile) are taken over.

The divergence of nearly equal rows is a small difference of large terms. It is computed in float64, from the change
and not from two logarithms: in float32 what fine-tuning changes drowns in rounding. Quartiles are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, wide
from merganser.methods.elementwise import Elementwise, Position, Whole
from merganser.methods.selection import kth_largest

_BLOCK = 1 << 16  # numbers of which divergences are computed at once


class ArceeFusionOptions(Options):
    """Options of :data:`ARCEE_FUSION`."""

    spread: float = Field(1.5, ge=0, description="multiplier of the distance of the quartiles in the threshold")


@dataclass(frozen=True)
class _Important:
    """What is known of a whole tensor.

    Attributes:
        threshold: the least importance that is taken over.
        divergences: of each row in float32, or of the only one there is.
        rows: (rows,), which rows these are, in ascending order.
    """

    threshold: float
    divergences: Tensor
    rows: np.ndarray

    def of(self, rows: Sequence[int]) -> Tensor:
        """The divergences of some rows, or of the only one there is."""
        if len(self.divergences) == 1:
            return self.divergences
        places = np.searchsorted(self.rows, np.asarray(rows))
        return self.divergences[torch.from_numpy(places).to(self.divergences.device)]


def divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """KL(softmax(tuned) ‖ softmax(base)) of each row of (rows, n), as (rows,) in float64."""
    base, tuned = base.to(torch.float64), tuned.to(torch.float64)
    expected = torch.softmax(base, 1)
    change = tuned - base
    change -= (expected * change).sum(1, keepdim=True)  # a shift of a row changes nothing
    top = change.amax(1, keepdim=True)
    growth = torch.expm1(change - top)  # exp(change − top) − 1, which is small where changes are
    total = (expected * growth).sum(1)
    found = growth.add_(1).mul_(expected).mul_(change).sum(1) / (1 + total) - (top[:, 0] + torch.log1p(total))
    large = total <= -0.5
    if bool(large.any()):
        after, before = torch.log_softmax(tuned[large], 1), torch.log_softmax(base[large], 1)
        found[large] = (after.exp() * (after - before)).sum(1)
    return found.clamp_min_(0)


def _importance(tuned: Tensor, base: Tensor, divergences: Tensor) -> Tensor:
    """|θ₁ − θ₀| times the divergence of the row, in float32; of a tensor of less than two dimensions, of the whole."""
    change = (tuned - base).abs_().to(torch.float32)
    return change.mul_(divergences.reshape(-1, *[1] * (change.dim() - 1)) if change.dim() else divergences[0])


def _important(whole: Whole, coefficients: Sequence[float], options: ArceeFusionOptions) -> _Important:
    """Two passes or more: divergences, and then the quartiles of importance."""
    matrix = len(whole.shape) > 1
    step = max(1, _BLOCK // max(whole.width, 1)) if matrix else whole.height
    found = []
    for start in range(0, whole.height, step):
        (tuned,), base = whole.deltas(start, start + step), whole.base(start, start + step)
        flat = (len(tuned), -1) if matrix else (1, -1)
        found.append(divergence(tuned.reshape(flat), base.reshape(flat)))
    divergences = torch.cat(found).to(torch.float32)

    def importance(start: int, stop: int) -> list[Tensor]:
        (tuned,), base = whole.deltas(start, stop), whole.base(start, stop)
        return [_importance(tuned, base, divergences[start:stop] if matrix else divergences)] * 3

    size = whole.height * whole.width
    ks = [size - int(quarter / 4 * (size - 1)) for quarter in (1, 2, 3)]
    lower, median, upper = kth_largest(importance, whole.height, whole.width, ks)
    threshold = median + options.spread * (upper - lower)
    return _Important(threshold, divergences, np.asarray(whole.position(0, whole.height).rows))


def _fused(
    base: Tensor, tensors: Iterator[Tensor], coefficients: Sequence[float], options: Options, position: Position
) -> Tensor:
    tuned, known = wide(next(tensors)), position.whole
    return torch.where(_importance(tuned, base, known.of(position.rows)) >= known.threshold, tuned, base)


ARCEE_FUSION = Elementwise(
    name="arcee_fusion",
    title="Arcee Fusion",
    summary="the base model with those numbers of one model that changed most and matter most",
    formula="θ₁ where |δ₁|·KL(softmax θ₁ ‖ softmax θ₀) ≥ median + 1.5·(upper − lower quartile), else θ₀; KL by rows",
    reference="Arcee AI 2025; mergekit's arcee_fusion",
    needs=Needs(base=True, models=1, weighted=False),
    options=ArceeFusionOptions.model_validate({}),
    function=_fused,
    reduce=_important,
    by_rows=True,
    differences=False,
)
