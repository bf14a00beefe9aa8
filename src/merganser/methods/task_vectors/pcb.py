"""PCB-Merging (Du et al. 2024, arXiv 2410.02396): parameters compete within and between the task vectors.

With Norm the scaling of a tensor's numbers to 0…1, n contributors and sums over a tensor's numbers in each softmax:
the score of a number of δᵢ is softmax(n·Norm(δᵢ²)) · Σⱼ softmax(Norm(δᵢδⱼ)). The share of each δᵢ with the highest
scores is kept; the result is θ₀ + s · the mean of the δᵢ, weighed by the scores that were kept over the highest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import floor, inf, prod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, PerContributor, of_contributor
from merganser.methods.elementwise import Elementwise, Position, Whole
from merganser.methods.selection import kth_largest
from merganser.methods.task_vectors.ties import before

_Pair = tuple[int, int]


class PCBOptions(Options):
    """Options of :data:`PCB`."""

    density: PerContributor[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.1, description="share of each task vector, by score, that is kept"
    )
    scale: float = Field(1.0, description="multiplier of the merged task vector")


@dataclass(frozen=True)
class _Competition:
    """What scores need of the whole tensor.

    Attributes:
        lowest, highest: of δᵢδⱼ, by (i, j) with i ≤ j.
        mass: the mean of exp(Norm(δᵢδⱼ)), likewise.
        thresholds: of each contributor, the lowest score that is kept.
        best: of each contributor, the highest score.
    """

    lowest: dict[_Pair, float]
    highest: dict[_Pair, float]
    mass: dict[_Pair, float] = field(default_factory=dict)
    thresholds: Sequence[float] = ()
    best: Sequence[float] = ()

    def norm(self, product: Tensor, pair: _Pair) -> Tensor:
        """Norm(δᵢδⱼ), in place; 0 where all are the same."""
        span = self.highest[pair] - self.lowest[pair]
        return product.sub_(self.lowest[pair]).div_(span) if span > 0 else product.zero_()

    def scores(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Of each contributor, but for a factor of the whole tensor; all positive."""
        count = len(deltas)
        inter = [torch.zeros_like(delta) for delta in deltas]
        for pair in self.lowest:
            share = self.norm(deltas[pair[0]] * deltas[pair[1]], pair).exp_().div_(self.mass[pair])
            for index in set(pair):
                inter[index] += share
        intra = (self.norm(delta.square(), (i, i)).sub_(1).mul_(count).exp_() for i, delta in enumerate(deltas))
        return [one.mul_(other).to(torch.float32) for one, other in zip(intra, inter, strict=True)]


def _competition(whole: Whole, coefficients: Sequence[float], options: PCBOptions) -> _Competition:
    pairs = list(combinations_with_replacement(range(len(coefficients)), 2))
    lowest, highest, mass = dict.fromkeys(pairs, inf), dict.fromkeys(pairs, -inf), dict.fromkeys(pairs, 0.0)
    for _, _, deltas in whole.blocks():
        for i, j in pairs:
            least, most = torch.aminmax(deltas[i] * deltas[j])
            lowest[i, j], highest[i, j] = min(lowest[i, j], float(least)), max(highest[i, j], float(most))
    found = _Competition(lowest, highest)
    size = prod(whole.shape)
    for _, _, deltas in whole.blocks():
        for i, j in pairs:
            mass[i, j] += float(found.norm(deltas[i] * deltas[j], (i, j)).exp_().sum(dtype=torch.float64)) / size
    found = _Competition(lowest, highest, mass)
    densities = [of_contributor(options.density, number) for number in whole.position(0, 0).contributors]
    keep = [max(1, floor(density * size)) if density else 0 for density in densities]

    def scores(start: int, stop: int) -> list[Tensor]:
        each = found.scores(whole.deltas(start, stop))
        return each + each

    bounds = kth_largest(scores, whole.height, whole.width, keep + [1] * len(keep))
    return _Competition(lowest, highest, mass, bounds[: len(keep)], bounds[len(keep) :])


def _merge(
    base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: PCBOptions, position: Position
) -> Tensor:
    competition: _Competition = position.whole
    task_vectors = list(deltas)
    total, weight = torch.zeros_like(base), torch.zeros_like(base)
    for index, score in enumerate(competition.scores(task_vectors)):
        kept = torch.hardshrink(score, before(competition.thresholds[index])).div_(competition.best[index])
        weight = weight.add_(kept, alpha=abs(coefficients[index]))
        total = total + kept.mul_(coefficients[index]).to(base.dtype) * task_vectors[index]
    return total.div_(weight.clamp_min_(torch.finfo(torch.float32).tiny))


PCB = Elementwise(
    name="pcb",
    title="PCB",
    summary="base model plus the mean of the differences that win a competition within and between contributors",
    formula="θ₀ + s·Σcᵢwᵢδᵢ / Σcᵢwᵢ; wᵢ: the highest of softmax(n·Norm(δᵢ²))·Σⱼsoftmax(Norm(δᵢδⱼ)), over their maximum",
    reference="Du et al. 2024, arXiv 2410.02396",
    needs=Needs(base=True, signed=True, normalised=False),
    options=PCBOptions.model_validate({}),
    function=_merge,
    reduce=_competition,
    thresholds=2,
)
