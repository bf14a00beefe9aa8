"""Means on the sphere: Multi-SLERP and the Karcher mean (Karcher 1977; Buss and Fillmore 2001).

Every tensor is a point on the unit sphere. From the normalised weighted mean, each step goes along the weighted mean
of the directions in which the points lie, until it is shorter than a tolerance. The mean is given the weighted mean of
the tensors' lengths. For two tensors the first step already ends at SLERP.

The points are kept as sums of the first tensor and of differences from it (see :mod:`.span`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from merganser.methods.averages.span import Combination, lengths, spanned
from merganser.methods.base import Needs, Options

_OPPOSITE = 1e-3  # radians; also how short a mean of unit vectors has no direction


class KarcherOptions(Options):
    """Options of :data:`KARCHER`."""

    steps: int = Field(10, ge=0, le=1000, description="how many steps at most")
    tolerance: float = Field(1e-5, ge=0, description="radians; a shorter step is the end")


class MultiSLERPOptions(KarcherOptions):
    """Options of :data:`MULTISLERP`."""

    steps: int = Field(1, ge=0, le=1000, description="how many steps at most; mergekit's result is that of 0")
    task_vectors: bool = Field(False, description="the mean of the differences from the base model")


def _mean(gram: np.ndarray, coefficients: Sequence[float], options: KarcherOptions) -> Combination:
    count = len(coefficients)
    shares = np.array(coefficients) / sum(coefficients)
    reference = int(np.argmax(shares))
    # So that the first length is exactly 1, and the mean of equal ones is, too.
    gram = gram / (gram[0, 0] if lengths(gram)[0] > 0 else gram.diagonal().max() or 1.0)
    points = np.eye(count)
    points[:, 0] = 1.0  # each is the first tensor, and its difference from it
    sizes = lengths(gram)
    taken = (sizes > 0) & (shares > 0)
    mean = _direction(gram, points[taken] / sizes[taken, None], shares[taken], options) if taken.any() else None
    if mean is None:
        return Combination(reference, list(shares))
    onto = mean * (1.0 + shares @ (sizes - 1.0))
    return Combination(reference, [onto[0] - onto[1:].sum(), *onto[1:]], onto[0] - 1.0)


def _direction(gram: np.ndarray, points: np.ndarray, shares: np.ndarray, options: KarcherOptions) -> np.ndarray | None:
    """The mean of unit vectors; None where they cancel out.

    Args:
        gram: (T, T).
        points: (n, T), the unit vectors, in the vectors of which ``gram`` has the inner products.
        shares: (n,), their weights.
        options: steps and tolerance.
    """

    def length(vectors: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(np.einsum("...j,jk,...k->...", vectors, gram, vectors), 0.0))

    mean = (shares / shares.sum()) @ points
    size = length(mean)
    if not size > _OPPOSITE:
        return None
    mean = mean / size
    for _ in range(options.steps):
        angles = 2 * np.arctan2(length(points - mean), length(points + mean))
        seen = angles < np.pi - _OPPOSITE  # to what is opposite there is no one way
        rates = np.where(seen, shares / shares.sum() / np.sinc(np.where(seen, angles, 0.0) / np.pi), 0.0)
        step = rates @ (points - np.cos(angles)[:, None] * mean)
        size = length(step)
        if size < options.tolerance or size == 0:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / length(mean)
    return mean


KARCHER = spanned(
    name="karcher",
    title="Karcher mean",
    summary="the mean of the models on the sphere, tensor by tensor",
    formula="the m on the sphere with Σcᵢ·log_m(θᵢ/|θᵢ|) = 0, times Σcᵢ|θᵢ|/Σcᵢ",
    reference="Karcher 1977; Buss & Fillmore 2001",
    needs=Needs(),
    options=KarcherOptions.model_validate({}),
    weigh=_mean,
)

MULTISLERP = spanned(
    name="multislerp",
    title="Multi-SLERP",
    summary="SLERP of any number of models or task vectors: the mean in the tangent space at their normalised mean",
    formula="exp_m(Σcᵢ·log_m(θᵢ/|θᵢ|)/Σcᵢ)·Σcᵢ|θᵢ|/Σcᵢ, m the normalised Σcᵢθᵢ/|θᵢ|; of δᵢ with task_vectors",
    reference="Goddard 2025, Multi-SLERP; Buss & Fillmore 2001",
    needs=Needs(),
    options=MultiSLERPOptions.model_validate({}),
    weigh=_mean,
)
