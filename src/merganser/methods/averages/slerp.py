"""SLERP and NuSLERP: two models along the great circle between them (Shoemake 1985).

(sin((1 − t)φ) θ₁ + sin(tφ) θ₂) / sin φ, with φ the angle between the tensors, which are not normalised before.
Where they are parallel, within 1e-8, or opposite to each other, within 1e-3, or one of them is zero, there is no such
circle or any number of them, and the interpolation is linear. (Near to opposite, both weights are large and nearly
cancel out: the numbers of a float32 tensor do not tell the direction.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from merganser.methods.averages.span import Combination, Numbers, Vectors, lengths, spanned
from merganser.methods.base import Needs, Options

_PARALLEL, _OPPOSITE = 1e-8, 1e-3  # radians


class SLERPOptions(Options):
    """Options of :data:`SLERP`."""

    t: float | None = Field(
        None, ge=0, le=1, description="0: the first model, 1: the second; by default c₂ / (c₁ + c₂)"
    )
    linear_above: float = Field(
        1.0, ge=0, le=1, description="interpolate linearly where the cosine's magnitude is larger (mergekit: 0.9995)"
    )


class NuSLERPOptions(Options):
    """Options of :data:`NUSLERP`."""

    task_vectors: bool = Field(False, description="interpolate the differences from the base model")
    flatten: bool = Field(True, description="take each tensor for one vector, not for many")
    row_wise: bool = Field(
        False, description="with flatten off, vectors lie along the first dimension; otherwise each row is one"
    )


def great_circle(gram: np.ndarray, t: float, linear_above: float = 1.0) -> tuple[Numbers, Numbers]:
    """The weight of the second tensor, and by how much both weights together are more than 1.

    Args:
        gram: (2, 2) or (2, 2, vectors), inner products of θ₁ and θ₂ − θ₁.
        t: where on the way from the first to the second.
        linear_above: the magnitude of the cosine above which the interpolation is linear.
    """
    first, second = lengths(gram)
    length = np.where(first > 0, first, 1.0)
    # θ₂ in the plane of both: so much along θ₁, and so much across.
    onward = gram[0, 1] / length
    across = np.sqrt(np.maximum(gram[1, 1] - onward**2, 0.0))
    angle = np.arctan2(across, length + onward)
    linear = (angle < _PARALLEL) | (angle > np.pi - _OPPOSITE) | (first == 0) | (second == 0)
    linear |= np.abs(np.cos(angle)) > linear_above
    angle = np.where(linear, 1.0, angle)
    weight = np.where(linear, t, np.sin(t * angle) / np.sin(angle))
    half = angle / 2
    excess = np.where(linear, 0.0, 2 * np.sin((1 - t) * half) * np.sin(t * half) / np.cos(half))
    return weight, excess


def _between(gram: np.ndarray, t: float, linear_above: float = 1.0) -> Combination:
    weight, excess = great_circle(gram, t, linear_above)
    if t <= 0.5:
        return Combination(0, (0.0, weight), excess)
    # Written from the second, which is then the nearer one: 1 + excess is the sum of both weights.
    return Combination(1, (1 + excess - weight, 0.0), excess)


def _slerp(gram: np.ndarray, coefficients: Sequence[float], options: SLERPOptions) -> Combination:
    t = coefficients[1] / sum(coefficients) if options.t is None else options.t
    return _between(gram, t, options.linear_above)


def _nuslerp(gram: np.ndarray, coefficients: Sequence[float], options: NuSLERPOptions) -> Combination:
    return _between(gram, coefficients[1] / sum(coefficients))


def _vectors(options: NuSLERPOptions) -> Vectors:
    if options.flatten:
        return "whole"
    return "columns" if options.row_wise else "rows"


SLERP = spanned(
    name="slerp",
    title="SLERP",
    summary="two models along the great circle between them, tensor by tensor",
    formula="(sin((1−t)φ)·θ₁ + sin(tφ)·θ₂) / sin φ, φ the angle between them, t = c₂/Σcᵢ",
    reference="Shoemake 1985, SIGGRAPH",
    needs=Needs(models=2),
    options=SLERPOptions.model_validate({}),
    weigh=_slerp,
)

NUSLERP = spanned(
    name="nuslerp",
    title="NuSLERP",
    summary="SLERP of two models or of their task vectors, of whole tensors, rows or columns",
    formula="(sin((1−t)φ)·θ₁ + sin(tφ)·θ₂) / sin φ, φ the angle between them, t = c₂/Σcᵢ; of δᵢ with task_vectors",
    reference="Shoemake 1985, SIGGRAPH; mergekit's nuslerp",
    needs=Needs(models=2, signed=True),
    options=NuSLERPOptions.model_validate({}),
    weigh=_nuslerp,
    vectors=_vectors,
)
