"""Git Re-Basin by weights: permute hidden units and heads before averaging (Ainsworth et al., ICLR 2023, 2209.04836).

Of the permutations of a block's units, the one that makes the sum of inner products with another model largest is a
linear assignment, solved by the Hungarian algorithm's descendants. Between two models it is the permutation that is
nearest, so that it is that of optimal transport between uniform marginals; it needs SciPy, which most have.

More than two models are merged as the paper's MergeMany does: each in turn is matched to the mean of the others, until
none moves. The paper begins with models as they are, draws the turns at random and lets the order of the result drift.
Here each is first matched to the mean of those before it, turns are in the order of the contributors, and the result
has the order of the first: the same inputs give the same bytes, and the first mean is no blur of unlike units.

In a network whose layers feed into each other, the paper's coordinate descent goes on over layers, since the order of
one layer's outputs is that of the next layer's inputs. In a transformer the residual stream lies between them, and its
order is the same in all fine-tunes of a model; so each block is matched by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.alignment.blocks import Aligned, AlignedOptions, features
from merganser.methods.base import Needs, Share, Unit

#: What a permutation has to gain before it moves anything, relative to the sum of magnitudes that it is a sum of.
_GAIN = 1e-10


class RebasinOptions(AlignedOptions):
    """Options of :data:`REBASIN`."""

    reference: Literal["mean", "first"] = Field(
        "mean", description="what models are matched to: the mean of the others, in turns, or the first model, once"
    )
    sweeps: int = Field(100, ge=1, description="rounds over all models at most, where the mean is the reference")


@dataclass(frozen=True, kw_only=True)
class Rebasin(Aligned):
    """Average of permuted hidden units and heads; see the module."""

    def orders(self, unit: Unit, shares: Sequence[Share]) -> list[Tensor]:
        """By the first contributor alone, or by all others."""
        if self.options.reference == "first":
            first = self.features(unit, shares[0])
            straight = torch.arange(len(first))
            rest = (best_order(first @ self.features(unit, share).T, straight) for share in shares[1:])
            return [straight, *rest]
        coefficients = [share.coefficient for share in shares]
        return match_many(lambda number: self.features(unit, shares[number]), coefficients, self.options.sweeps)

    def features(self, unit: Unit, share: Share) -> Tensor:
        """What units are matched by, (units, numbers) in float64: their weights."""
        return features(unit, share)


def best_order(similarity: Tensor, current: Tensor) -> Tensor:
    """The order that makes Σⱼ similarity[j, order[j]] largest; the current one where none is better but for rounding.

    Args:
        similarity: (units, units), of each reference unit (rows) with each unit that is to be ordered.
        current: (units,), an order.

    Returns:
        (units,), a permutation.
    """
    solver: Any = importlib.import_module("scipy.optimize")  # the plan has seen that it is there
    _, columns = solver.linear_sum_assignment(similarity.numpy(), maximize=True)
    order, rows = torch.from_numpy(columns).to(torch.int64), torch.arange(len(similarity))
    best, now = similarity[rows, order], similarity[rows, current]
    least = _GAIN * float(best.abs().sum() + now.abs().sum())
    return order if float(best.sum() - now.sum()) > least else current


def match_many(read: Callable[[int], Tensor], coefficients: Sequence[float], sweeps: int) -> list[Tensor]:
    """The orders of several models' units, each the best one given the mean of the others (the paper's MergeMany).

    Each turn makes ‖Σcᵢ Pᵢθᵢ‖ larger or moves nothing, so that the turns come to an end.

    Args:
        read: the features of a model, (units, numbers), anew each time: one model's lie in memory at once.
        coefficients: one a model.
        sweeps: rounds at most.

    Returns:
        one permutation a model; the first one's is the identity.
    """
    first = read(0)
    straight = torch.arange(len(first))
    orders, total = [straight] * len(coefficients), first * coefficients[0]
    for number in range(1, len(coefficients)):
        own = read(number)
        orders[number] = best_order(total @ own.T, straight)
        total += own[orders[number]] * coefficients[number]
    turns = [*range(1, len(coefficients)), 0] if len(coefficients) > 1 else []
    for _ in range(sweeps):
        moved = False
        for number in turns:
            own, order = read(number), orders[number]
            others = total - own[order] * coefficients[number]
            orders[number] = best_order(others @ own.T, order)
            if not torch.equal(orders[number], order):
                moved = True
                total = others.add_(own[orders[number]] * coefficients[number])
        if not moved:
            break
    back = orders[0].argsort()
    return [order[back] for order in orders]


REBASIN = Rebasin(
    name="rebasin",
    title="Git Re-Basin",
    summary="average of hidden units and attention heads permuted to agree with the other models; needs SciPy",
    formula="Σcᵢ PᵢθᵢQᵢ / Σcᵢ, with the permutations that make ‖Σcᵢ PᵢθᵢQᵢ‖ largest, in turns",
    reference="Ainsworth et al. 2023, arXiv 2209.04836",
    needs=Needs(layers=True, package=("scipy", "scipy")),
    options=RebasinOptions.model_validate({}),
)
