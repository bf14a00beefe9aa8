"""KnOTS and core space against numpy in float64, from the papers; by factors and by spectrum it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.checkpoints.layers import Layer
from merganser.errors import UserError
from merganser.merging import make_recipe
from merganser.merging.recipe import method_options
from merganser.methods import METHODS, Facts, Unit
from merganser.methods.products import Product, column_basis, combined, factored
from merganser.methods.spectral.low_rank import INNER

NAME = "layer.weight"
METHODS_OF_ADAPTERS = ("knots", "core_space")


@dataclass(frozen=True)
class Adapter:
    """A contributor with factors, on its base."""

    base_: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    number: int
    coefficient: float

    def tensor(self, name: str) -> torch.Tensor:
        return self.base_ + self.left @ self.right

    def base(self, name: str) -> torch.Tensor:
        return self.base_.clone()

    def product(self, name: str) -> Product:
        return Product(self.left, self.right)


@dataclass(frozen=True)
class Tuned:
    """The same without the factors."""

    adapter: Adapter

    def __getattr__(self, name: str) -> Any:
        if name == "product":
            raise AttributeError(name)
        return getattr(self.adapter, name)


def contributors(ranks: Sequence[int], out: int = 10, width: int = 14, seed: int = 0) -> list[Adapter]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = draw(out, width)
    return [Adapter(base, draw(out, r), draw(r, width), number, 1.0 + number) for number, r in enumerate(ranks)]


def unit(out: int, width: int, kind: Any = "linear") -> Unit:
    fact = Facts(NAME, (out, width), Layer("layer", kind, NAME, None, False), in_base=True)
    return Unit((NAME,), "matrix", (fact,))


def merged(method: str, shares: Sequence[Any], **options: Any) -> np.ndarray:
    made = METHODS[method]
    base = shares[0].base(NAME)
    configured = made.configured(made.options_type.model_validate(options))
    return (configured.merge(unit(*base.shape), shares).tensors[NAME] - base).numpy()


def ties(parts: Sequence[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    """Trim, elect, disjoint mean, as Yadav et al. have it."""
    trimmed = []
    for part in parts:
        keep = max(1, int(density * part.size))
        threshold = np.sort(np.abs(part).ravel())[-keep]
        trimmed.append(np.where(np.abs(part) >= threshold, part, 0))
    sign = np.sign(sum(w * part for w, part in zip(weights, trimmed, strict=True)))
    agree = [(np.sign(part) == sign) & (part != 0) for part in trimmed]
    total = sum(w * part * a for w, part, a in zip(weights, trimmed, agree, strict=True))
    return total / np.maximum(sum(w * a for w, a in zip(weights, agree, strict=True)), 1e-300)


def knots(adapters: Sequence[Adapter], density: float, weighted: bool) -> np.ndarray:
    changes = [(one.left @ one.right).numpy() for one in adapters]
    u, s, v = np.linalg.svd(np.hstack(changes), full_matrices=False)
    kept = s > 1e-9 * s[0]
    u, s, v = u[:, kept], s[kept], v[kept]
    width, weights = changes[0].shape[1], [one.coefficient for one in adapters]
    parts = [v[:, i * width : (i + 1) * width] for i in range(len(changes))]
    if weighted:
        return u @ ties([s[:, None] * part for part in parts], weights, density)
    return (u * s) @ ties(parts, weights, density)


def core_space(adapters: Sequence[Adapter], density: float) -> np.ndarray:
    u = np.linalg.svd(np.hstack([one.left.numpy() for one in adapters]), full_matrices=False)[0]
    v = np.linalg.svd(np.vstack([one.right.numpy() for one in adapters]), full_matrices=False)[2]
    cores = [u.T @ one.left.numpy() @ one.right.numpy() @ v.T for one in adapters]
    return u @ ties(cores, [one.coefficient for one in adapters], density) @ v


@pytest.mark.parametrize("ranks", [(2, 2), (3, 1, 2), (4,)])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_they_are_what_the_papers_say(ranks: tuple[int, ...], density: float) -> None:
    shares = contributors(ranks)
    options = {"merge_options": {"density": density}}
    for weighted in (False, True):
        found = merged("knots", shares, weighted=weighted, **options)
        np.testing.assert_allclose(found, knots(shares, density, weighted), atol=1e-8)
    np.testing.assert_allclose(merged("core_space", shares, **options), core_space(shares, density), atol=1e-8)


@pytest.mark.parametrize("method", METHODS_OF_ADAPTERS)
def test_the_mean_and_the_sum_lose_nothing(method: str) -> None:
    shares = contributors((3, 1, 2))
    changes = [(one.left @ one.right).numpy() for one in shares]
    mean = sum(one.coefficient * change for one, change in zip(shares, changes, strict=True)) / 6
    for models in (shares, [Tuned(one) for one in shares]):  # by factors, and by the spectrum
        np.testing.assert_allclose(merged(method, models, merge="mean"), mean, atol=1e-10)
        summed = merged(method, models, merge="task_arithmetic", scale=0.5)
        np.testing.assert_allclose(summed, 3 * mean, atol=1e-10)
        options = {"normalize": True, "scale": 2.0}
        np.testing.assert_allclose(
            merged(method, models, merge="task_arithmetic", merge_options=options), 2 * mean, atol=1e-10
        )


def test_knots_of_the_spectrum_is_that_of_the_factors() -> None:
    shares = contributors((3, 1, 2))
    by_factors, by_spectrum = (merged("knots", models) for models in (shares, [Tuned(one) for one in shares]))
    np.testing.assert_allclose(by_factors, by_spectrum, atol=1e-8)


@pytest.mark.parametrize("method", METHODS_OF_ADAPTERS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 5)])
def test_degenerate_contributors(method: str, shape: tuple[int, int]) -> None:
    one, two = contributors((1, 1), *shape)
    nothing = Adapter(one.base_, one.left[:, :0], one.right[:0], 1, 1.0)
    zeros = Adapter(one.base_, one.left * 0, one.right, 1, 1.0)
    for models in ([nothing], [zeros], [nothing, zeros], [Tuned(nothing)]):
        assert np.array_equal(merged(method, models), np.zeros(shape))
    for models in ([one], [one, one], [one, nothing], [one, zeros], [one, two], [Tuned(one), two]):
        assert np.isfinite(merged(method, models)).all()
    alone = merged(method, [one, nothing], merge_options={"density": 1.0})
    np.testing.assert_allclose(alone, (one.left @ one.right).numpy(), atol=1e-10)


def test_a_rank_bounds_what_comes_without_factors() -> None:
    shares = contributors((5, 5))
    models = [Tuned(one) for one in shares]
    found = merged("core_space", models, merge="task_arithmetic", rank=2)
    wanted = np.zeros_like(found)
    for one in shares:
        u, s, v = np.linalg.svd((one.left @ one.right).numpy(), full_matrices=False)
        wanted += one.coefficient * (u[:, :2] * s[:2]) @ v[:2]
    np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_impossible_options_are_refused() -> None:
    for options, word in (
        ({"merge": "slerp"}, "it can be mean, task_arithmetic, ties"),
        ({"merge_options": {"density": 2}}, "density"),
        ({"merge": "mean", "merge_options": {"density": 0.2}}, "no options"),
        ({"rank": 0}, "rank"),
    ):
        recipe = make_recipe({"contributors": ["a", "b"], "method": "knots", "options": options})
        with pytest.raises(UserError, match=word):
            method_options(recipe, "knots")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**31))
def test_factors_are_the_matrix_at_its_rank(out: int, width: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
    matrix = left.double() @ right.double()
    found = factored(matrix)
    assert found.rank == np.linalg.matrix_rank(matrix.numpy(), tol=1e-5 * max(1e-30, float(matrix.norm())))
    torch.testing.assert_close(found.dense(), matrix, atol=1e-5, rtol=1e-5)
    basis = column_basis(matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    both = combined([found, Product(left.double(), right.double())], [2.0, -0.5])
    torch.testing.assert_close(both.dense(), 1.5 * matrix, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("method", METHODS_OF_ADAPTERS)
def test_any_elementwise_method_merges_them(method: str, inner: str) -> None:
    shares = contributors((3, 1, 2))
    options = {"density": 0.6} if "density" in INNER[inner].options_type.model_fields else {}
    found = merged(method, shares, merge=inner, merge_options=options)
    assert np.isfinite(found).all() and found.any()
    assert np.linalg.matrix_rank(found, tol=1e-9) <= 6
    assert np.array_equal(found, merged(method, shares, merge=inner, merge_options=options))
