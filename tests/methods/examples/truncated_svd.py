"""The summed task vectors of each linear layer, without all but their largest singular values."""

import torch
from pydantic import Field

from merganser.methods.base import Needs, Options
from merganser.methods.matrix import Matrix


class TruncatedSVDOptions(Options):
    rank: int = Field(2, ge=1, description="how many singular values are kept")
    scale: float = Field(1.0, description="multiplier of the summed task vectors")


def _largest(base, weights, coefficients, options):  # type: ignore[no-untyped-def]
    origin = base.double()
    change = sum((w.double() - origin) * c for w, c in zip(weights, coefficients, strict=True))
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept = slice(options.rank)
    return origin + options.scale * (left[:, kept] * values[kept]) @ right[kept]


TRUNCATED_SVD = Matrix(
    name="truncated_svd",
    title="Truncated SVD",
    summary="base model plus the largest singular values of the summed differences",
    needs=Needs(base=True, layers=True, signed=True),
    options=TruncatedSVDOptions.model_validate({}),
    function=_largest,
)
