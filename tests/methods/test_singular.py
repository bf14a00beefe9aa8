"""Polar factors, singular triples and flatter spectra against full SVDs in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merganser.methods.spectral import singular
from merganser.methods.spectral.singular import Imprecise, flattened, polar_factor, singular_triples
from methods.matrices import distance, drawn, fine_tuned, flat, polar, svd


@pytest.mark.parametrize("shape", [(256, 256), (160, 600), (600, 160)])
@pytest.mark.parametrize("kind", ["flat", "decaying", "fine-tuned"])
def test_float32_does_for_what_task_matrices_are_like(kind: str, shape: tuple[int, int]) -> None:
    """Neither function says that it is too narrow, and both are within the bound."""
    (task,) = {
        "flat": lambda: drawn(shape, 1, 12),
        "decaying": lambda: drawn(shape, 1, 12, 0.5),
        "fine-tuned": lambda: fine_tuned(shape, 1, 12),
    }[kind]()
    matrix = torch.from_numpy(task).float()
    left, values, right = svd(matrix.double().numpy())
    assert distance(polar_factor(matrix).double().numpy(), left @ right) < 1e-4
    found = singular_triples(matrix, 40)
    product = (found.left * found.values).double() @ found.right.double().T
    assert distance(product.numpy(), left[:, :40] * values[:40] @ right[:40]) < 1e-4


@pytest.mark.parametrize("kind", ["flat", "decaying", "steep", "fine-tuned"])
@pytest.mark.parametrize("shape", [(160, 160), (140, 300), (300, 140)])
def test_float32_is_flattened_within_the_bound(kind: str, shape: tuple[int, int]) -> None:
    """Or it is said that float32 does not do, as where singular values fall by a factor of millions."""
    (task,) = {
        "flat": lambda: drawn(shape, 1, 12),
        "decaying": lambda: drawn(shape, 1, 12, 0.5),
        "steep": lambda: drawn(shape, 1, 12, 3.0),
        "fine-tuned": lambda: fine_tuned(shape, 1, 12),
    }[kind]()
    matrix = torch.from_numpy(task).float()
    for power in (0.3, 0.6, 1.0):
        expected = flat(matrix.double().numpy(), power)
        try:
            assert distance(flattened(matrix, power).double().numpy(), expected) < 1e-4
        except Imprecise:
            assert kind == "steep"
        assert distance(flattened(matrix.double(), power).numpy(), expected) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_flattened_matrix_is_as_long_as_it_was(size: float) -> None:
    matrix = size * torch.from_numpy(drawn((130, 140), 1, 3)[0]).float()
    found = flattened(matrix, 0.5)
    assert distance(found.double().numpy() / size, flat(matrix.double().numpy() / size, 0.5)) < 1e-4
    assert not flattened(torch.zeros(3, 4), 0.5).any() and flattened(matrix, 1.0) is matrix
    draw = np.random.default_rng(5)
    low = draw.integers(-4, 5, (150, 3)) @ draw.integers(-4, 5, (3, 140)) * 1.0
    assert distance(flattened(torch.from_numpy(low), 0.5).numpy(), flat(low, 0.5)) < 1e-6


def test_float32_is_left_where_it_does_not_do() -> None:
    steep = torch.from_numpy(drawn((150, 150), 1, 2, 3.0)[0]).float()
    with pytest.raises(Imprecise):
        polar_factor(steep)
    factor = polar_factor(steep.double())
    assert distance(factor.numpy(), polar(steep.double().numpy())) < 1e-6
    flat = torch.from_numpy(drawn((150, 150), 1, 2)[0])
    assert distance(polar_factor(flat.float()).double().numpy(), polar(flat.numpy())) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(140, 300), (300, 140)])
def test_singular_triples_are_those_of_lapack(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    (matrix,) = drawn(shape, 1, 3, 0.7)
    found = singular_triples(torch.from_numpy(matrix).to(dtype), 20)
    left, values, right = svd(matrix)
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(found.values.double().numpy(), values[:20], rtol=bound)
    product = (found.left * found.values).double() @ found.right.double().T
    assert distance(product.numpy(), left[:, :20] * values[:20] @ right[:20]) < bound
    for vectors in (found.left, found.right):
        assert float((vectors.T @ vectors - torch.eye(20)).abs().max()) < 1e-4


def test_what_is_cut_between_equal_singular_values_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    left, _, right = svd(drawn((150, 150), 1, 10)[0])
    values = np.linspace(2, 1, 150)
    values[30] = values[29] * (1 - 1e-6)
    matrix = torch.from_numpy(left * values @ right).float()
    with pytest.raises(Imprecise):
        singular_triples(matrix, 30)
    monkeypatch.setattr(singular, "_ALLOWED", np.inf)
    found = singular_triples(matrix, 29)
    product = (found.left * found.values).double() @ found.right.double().T
    assert distance(product.numpy(), left[:, :29] * values[:29] @ right[:29]) < 1e-4
