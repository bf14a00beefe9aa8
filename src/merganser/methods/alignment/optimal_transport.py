"""Optimal transport: match the hidden units of each block before averaging (Singh & Jaggi, NeurIPS 2020, 1910.05653).

Contributor i's units are put in the order that is nearest to contributor 1's: an exact transport plan between uniform
marginals is a permutation P, and the cost of a pair is the squared distance of all that belongs to the two units. Which
these are, and what moves with them, is said in :mod:`~merganser.methods.alignment.blocks`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merganser.methods.alignment.blocks import Aligned, AlignedOptions, features, unit_count
from merganser.methods.base import Needs, Share, Unit

#: More than tens of thousands of units need; the solver stops as soon as it is done.
_ITERATIONS = 1_000_000_000


class OptimalTransportOptions(AlignedOptions):
    """Options of :data:`OPTIMAL_TRANSPORT`."""


@dataclass(frozen=True, kw_only=True)
class OptimalTransport(Aligned):
    """Average of matched hidden units and heads; see the module."""

    def orders(self, unit: Unit, shares: Sequence[Share]) -> list[Tensor]:
        """Nearest to the first contributor's."""
        first = features(unit, shares[0])
        return [torch.arange(unit_count(unit)), *(match(first, features(unit, share)) for share in shares[1:])]


def match(reference: Tensor, features: Tensor) -> Tensor:
    """The order in which ``features`` is nearest to ``reference``: minimises Σⱼ ‖referenceⱼ − features_order(j)‖².

    Args:
        reference: (units, numbers), float64.
        features: likewise.

    Returns:
        (units,) a permutation.

    Raises:
        ValueError: the transport did not end in a permutation.
    """
    ot: Any = importlib.import_module("ot")  # the plan has seen that it is there
    count = reference.shape[0]
    cost = reference.square().sum(1)[:, None] + features.square().sum(1)[None, :]
    cost.addmm_(reference, features.T, alpha=-2).clamp_min_(0)
    cost /= cost.max().clamp_min(1e-300)  # the solver's tolerance is absolute
    # Marginals of ones: every flow is a whole number, so the plan is a permutation matrix without rounding.
    ones = torch.ones(count, dtype=torch.float64).numpy()
    plan, log = ot.emd(ones, ones, cost.numpy(), numItermax=_ITERATIONS, log=True)
    order = torch.from_numpy(plan.argmax(axis=1))
    if log["warning"] is not None or not torch.equal(order.sort().values, torch.arange(count)):
        raise ValueError(f"the units could not be matched: {log['warning'] or 'no permutation was found'}")
    return order


OPTIMAL_TRANSPORT = OptimalTransport(
    name="ot",
    title="Optimal transport",
    summary="average of hidden units and attention heads matched by optimal transport; needs POT",
    formula="Σcᵢ PᵢθᵢQᵢ / Σcᵢ, with the permutations nearest to the first contributor",
    reference="Singh & Jaggi 2020, arXiv 1910.05653",
    needs=Needs(layers=True, package=("ot", "POT")),
    options=OptimalTransportOptions.model_validate({}),
)
