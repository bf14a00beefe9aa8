"""Which contributors' changes of a number count is decided number by number, without a share that is kept.

MagMax (Marczak et al. 2024, arXiv 2407.06322) takes the change of largest magnitude. Consensus merging (Wang et al.
2024, arXiv 2405.07813) keeps the sum of all changes where several contributors use it: contributor i does where
|δᵢ| ≥ λ·|Σδⱼ − δᵢ|, which is its TALL mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, PerContributor, of_contributor
from merganser.methods.elementwise import Elementwise, Position, added


class MagMaxOptions(Options):
    """Options of :data:`MAGMAX`."""

    scale: float = Field(0.5, description="multiplier of the chosen task vector")


class ConsensusOptions(Options):
    """Options of :data:`CONSENSUS`."""

    k: int = Field(2, ge=0, description="contributors that have to use a number; never more than there are")
    tall_lambda: PerContributor[Annotated[float, Field(ge=0)]] = Field(
        0.4, description="a contributor uses a number whose change is at least so many times what the others add"
    )
    scale: float = Field(0.4, description="multiplier of the summed task vectors")


def _largest(
    base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: MagMaxOptions, position: Position
) -> Tensor:
    """Of equal magnitudes, the later contributor's."""
    largest = torch.zeros_like(base)
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        delta = delta.mul_(coefficient)
        largest = torch.where(delta.abs() >= largest.abs(), delta, largest)
    return largest


def _agreed(
    base: Tensor, deltas: Iterator[Tensor], coefficients: Sequence[float], options: ConsensusOptions, position: Position
) -> Tensor:
    total = torch.zeros_like(base)
    task_vectors = [delta.mul_(c) for delta, c in zip(deltas, coefficients, strict=True)]
    for delta in task_vectors:
        total = added(total, delta, 1.0)
    users = torch.zeros_like(total)
    for number, delta in zip(position.contributors, task_vectors, strict=True):
        others = (total - delta).abs_().mul_(of_contributor(options.tall_lambda, number))
        users.add_(delta.abs().ge_(others))
    return total.mul_(users.ge_(min(options.k, len(task_vectors))))


_NEEDS = Needs(base=True, signed=True, normalised=False)

MAGMAX = Elementwise(
    name="magmax",
    title="MagMax",
    summary="base model plus, number by number, the largest of the differences from it",
    formula="θ₀ + s·cᵢδᵢ of the i with the largest |cᵢδᵢ|",
    reference="Marczak et al. 2024, arXiv 2407.06322",
    needs=_NEEDS,
    options=MagMaxOptions.model_validate({}),
    function=_largest,
)

CONSENSUS = Elementwise(
    name="consensus",
    title="Consensus (TALL masks)",
    summary="base model plus the summed differences, where several contributors use them",
    formula="θ₀ + s·Σcᵢδᵢ where |cᵢδᵢ| ≥ λ|Σcⱼδⱼ − cᵢδᵢ| for at least k of the i, else θ₀",
    reference="Wang et al. 2024, arXiv 2405.07813",
    needs=_NEEDS,
    options=ConsensusOptions.model_validate({}),
    function=_agreed,
)
