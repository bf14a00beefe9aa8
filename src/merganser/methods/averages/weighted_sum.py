"""Weighted sum: Σcᵢθᵢ with the coefficients as they are, whatever their sum; mergekit's linear without ``normalize``.

A sum of coefficients other than 1 scales the whole model. Most models are not invariant to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, Position, added


def _sum(
    base: None, tensors: Iterator[Tensor], coefficients: Sequence[float], options: Options, position: Position
) -> Tensor:
    first, *others = tensors
    total = torch.mul(first, coefficients[0])
    for tensor, coefficient in zip(others, coefficients[1:], strict=True):
        total = added(total, tensor, coefficient)
    return total


WEIGHTED_SUM = Elementwise(
    name="weighted_sum",
    title="Weighted sum",
    summary="the parameters times their coefficients, added; not divided by the coefficients' sum",
    formula="Σcᵢθᵢ",
    reference="mergekit's linear with normalize: false",
    needs=Needs(signed=True, normalised=False),
    options=Options.model_validate({}),
    function=_sum,
)
