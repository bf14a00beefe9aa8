"""Task arithmetic, TIES and Arcee Fusion against float64 oracles; the selection of thresholds against a sort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser.methods import METHODS, Facts, Unit
from merganser.methods.task_vectors.arcee_fusion import divergence
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


def changed(shape: tuple[int, ...], change: float) -> tuple[Tensor, Tensor]:
    """A base and one model that differs from it by so much."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return base, base + change * torch.randn(shape, generator=generator)


def oracle_of_divergence(tuned: np.ndarray, base: np.ndarray) -> np.ndarray:
    """By its definition, with 64 bits of mantissa."""
    wide, origin = tuned.astype(np.longdouble), base.astype(np.longdouble)
    logs = []
    for rows in (wide, origin):
        shifted = rows - rows.max(-1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)


@pytest.mark.parametrize("change", [1e-6, 1e-4, 0.1, 3.0, 500.0])
def test_divergences_of_rows_are_right_however_near_they_are(change: float) -> None:
    base, tuned = changed((7, 300), change)
    found = divergence(tuned, base).numpy()
    expected = oracle_of_divergence(*(one.double().numpy() for one in (tuned, base))).astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-3 if change < 1e-5 else 1e-7)
    assert expected.min() > 0


@pytest.mark.parametrize("shape", [(40, 30), (600, 900), (77,), (1, 50)])
def test_arcee_fusion_equals_the_formula(shape: tuple[int, ...]) -> None:
    base, tuned = changed(shape, 0.01)
    origin, moved = base.double().numpy(), tuned.double().numpy()
    importance = np.abs(moved - origin) * oracle_of_divergence(moved, origin)[..., None].astype(np.float64)
    ordered = np.sort(importance.ravel())
    lower, median, upper = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (upper - lower)
    found = merged("arcee_fusion", base, [tuned], (1,))
    certain = np.abs(importance - threshold) > 1e-6 * threshold
    taken = np.where(importance >= threshold, tuned.numpy(), base.numpy())
    assert np.array_equal(found.numpy()[certain], taken[certain])
    assert certain.sum() >= base.numel() - 3 and 0 < (importance >= threshold).mean() < 0.4
