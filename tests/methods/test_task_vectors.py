"""Task arithmetic and TIES against float64 oracles; the selection of thresholds against a sort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser.methods import METHODS, Facts, Unit
from methods.in_memory import InMemory


def merged(method: str, base: Tensor, tuned: Sequence[Tensor], c: Sequence[float], **options: float) -> Tensor:
    chosen = METHODS[method]
    unit = Unit(("w",), method, (Facts("w", tuple(base.shape), in_base=True),))
    shares = [InMemory(0, one, tensor, base) for tensor, one in zip(tuned, c, strict=True)]
    return chosen.configured(chosen.options_type(**options)).merge(unit, shares).tensors["w"]  # type: ignore[arg-type]


def oracle_of_ties(
    base: Tensor, tuned: Sequence[Tensor], c: Sequence[float], density: float, scale: float
) -> np.ndarray:
    origin = base.double().numpy()
    deltas = [tensor.double().numpy() - origin for tensor in tuned]
    kept = []
    for delta in deltas:
        k = int(np.floor(density * delta.size))
        threshold = np.sort(np.abs(delta).ravel())[::-1][k - 1] if k else np.inf
        kept.append(np.where(np.abs(delta) >= threshold, delta, 0.0))
    sign = np.where(sum(ci * d for ci, d in zip(c, kept, strict=True)) >= 0, 1.0, -1.0)
    top, bottom = np.zeros_like(origin), np.zeros_like(origin)
    for ci, delta in zip(c, kept, strict=True):
        agrees = np.sign(delta) == sign
        top += ci * delta * agrees
        bottom += ci * agrees
    return origin + scale * np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def family(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    # Differences that float32 holds exactly, many of them equal in magnitude: ties of both kinds.
    return base, [base + torch.randint(-8, 9, shape, generator=generator) * 2.0**-9 * base.sign() for _ in range(count)]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_equals_the_oracle(density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(17, 11, generator=generator)
    tuned = [base + 0.1 * torch.randn(17, 11, generator=generator) for _ in range(3)]
    found = merged("ties", base, tuned, [1.0, 2.0, 0.5], density=density, scale=0.7)
    expected = oracle_of_ties(base, tuned, [1.0, 2.0, 0.5], density, 0.7)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-7)
    assert not np.allclose(expected, base.numpy(), atol=1e-3)


def test_ties_keeps_all_of_equal_magnitude_and_lets_the_positive_win_a_draw() -> None:
    base = torch.zeros(2, 2)
    tuned = [torch.tensor([[1.0, 1.0], [1.0, 0.5]]), torch.tensor([[-1.0, 1.0], [-1.0, -0.25]])]
    found = merged("ties", base, tuned, [1.0, 1.0], density=0.5)
    assert found.tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_ties_with_many_equal_magnitudes_equals_the_oracle() -> None:
    base, tuned = family((13, 7), 4)
    found = merged("ties", base, tuned, [1.0] * 4, density=0.3)
    expected = oracle_of_ties(base, tuned, [1.0] * 4, 0.3, 1.0)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_task_arithmetic_equals_the_formula_and_takes_negative_coefficients() -> None:
    base, tuned = family((5, 4), 3)
    c = [1.0, -2.0, 0.5]
    found = merged("task_arithmetic", base, tuned, c, scale=0.3)
    expected = base.double() + 0.3 * sum(ci * (t.double() - base.double()) for ci, t in zip(c, tuned, strict=True))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
