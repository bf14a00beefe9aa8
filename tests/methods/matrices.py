"""Task matrices to try spectral methods on, and what numpy's full decomposition makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def polar(matrix: Array) -> Array:
    left, _, right = svd(matrix)
    return left @ right


def drawn(shape: tuple[int, int], tasks: int, seed: int = 0, decay: float = 0.0) -> list[Array]:
    """Task matrices whose singular values fall like i^-decay; those of Gaussian matrices for 0."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(tasks):
        matrix = draw.standard_normal(shape)
        if decay:
            left, _, right = svd(matrix)
            matrix = left * np.arange(1, min(shape) + 1) ** -decay @ right
        found.append(matrix)
    return found


def fine_tuned(shape: tuple[int, int], tasks: int, seed: int = 0, rank: int = 4, share: float = 0.01) -> list[Array]:
    """Changes of low rank, a share of weights in bfloat16, and the rounding of all of these: exact in float32."""
    draw = np.random.default_rng(seed)
    rounded = [torch.from_numpy(draw.standard_normal(shape) * 0.02).bfloat16()]
    for _ in range(tasks):
        low = draw.standard_normal((shape[0], rank)) / np.arange(1, rank + 1) @ draw.standard_normal((rank, shape[1]))
        low *= share * np.linalg.norm(rounded[0].double()) / np.linalg.norm(low)
        rounded.append((rounded[0].double() + torch.from_numpy(low)).bfloat16())
    return [(one.double() - rounded[0].double()).numpy() for one in rounded[1:]]


def distance(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def flat(matrix: Array, power: float) -> Array:
    """The singular values to a power, and the old length."""
    left, values, right = svd(matrix)
    raised = np.where(values > 1e-12 * values[0], values, 0) ** power
    return float(np.linalg.norm(values) / np.linalg.norm(raised)) * left * raised @ right
