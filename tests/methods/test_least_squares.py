"""The solver against float64 oracles in numpy, written from the formulas and sharing no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.methods.least_squares import solve_diagonal, weighted_average
from merganser.methods.sums import GramSums, Solution

SEEDS = st.integers(0, 10_000)


def problem(seed: int, n: int = 3, out: int = 4, width: int = 5, samples: int = 40):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(out, width)) for _ in range(n)]
    inputs = [rng.normal(size=(samples, width)) @ rng.normal(size=(width, width)) for _ in range(n)]
    return weights, [x.T @ x / samples for x in inputs], rng.uniform(0.1, 2, n), inputs


def tensors(arrays):  # type: ignore[no-untyped-def]
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


def solve_gram(weights, coefficients, grams, ridge: float) -> Solution:  # type: ignore[no-untyped-def]
    sums = GramSums()
    for one, coefficient, gram in zip(weights, coefficients, grams, strict=True):
        sums.add(one, gram, coefficient)
    return sums.solve(ridge)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_gram_solution_is_the_regression_on_the_contributors_outputs(seed: int) -> None:
    """An independent road to the same answer: ordinary least squares on stacked inputs and outputs."""
    weights, grams, c, inputs = problem(seed)
    scaled = [np.sqrt(ci / len(x)) * x for ci, x in zip(c, inputs, strict=True)]
    targets = [x @ w.T for x, w in zip(scaled, weights, strict=True)]
    expected = np.linalg.lstsq(np.vstack(scaled), np.vstack(targets), rcond=None)[0].T
    found = solve_gram(tensors(weights), c, tensors(grams), 0.0)
    assert found.note is None
    np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-7, atol=1e-8)


@given(SEEDS, st.floats(1e-3, 10))
@settings(max_examples=30, deadline=None)
def test_ridge_pulls_toward_the_average(seed: int, ridge: float) -> None:
    weights, grams, c, _ = problem(seed)
    average = sum(ci * w for ci, w in zip(c, weights, strict=True)) / c.sum()
    total = sum(ci * g for ci, g in zip(c, grams, strict=True))
    lam = ridge * np.trace(total) / len(total)
    numerator = sum(ci * w @ g for ci, w, g in zip(c, weights, grams, strict=True)) + lam * average
    expected = numerator @ np.linalg.inv(total + lam * np.eye(len(total)))
    found = solve_gram(tensors(weights), c, tensors(grams), ridge).value.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    near = solve_gram(tensors(weights), c, tensors(grams), 1e9).value.numpy()
    np.testing.assert_allclose(near, average, rtol=1e-6, atol=1e-6)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_no_perturbation_has_a_smaller_objective(seed: int) -> None:
    weights, grams, c, _ = problem(seed)

    def objective(w: np.ndarray) -> float:
        return sum(ci * np.trace((w - wi) @ g @ (w - wi).T) for ci, wi, g in zip(c, weights, grams, strict=True))

    found = solve_gram(tensors(weights), c, tensors(grams), 0.0).value.numpy()
    best = objective(found)
    rng = np.random.default_rng(seed + 1)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(10):
            assert objective(found + size * rng.normal(size=found.shape)) > best


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_identity_metric_is_the_average_and_order_is_irrelevant(seed: int) -> None:
    weights, grams, c, _ = problem(seed)
    eye = [np.eye(5)] * 3
    expected = sum(ci * w for ci, w in zip(c, weights, strict=True)) / c.sum()
    np.testing.assert_allclose(solve_gram(tensors(weights), c, tensors(eye), 0.0).value, expected, rtol=1e-10)
    np.testing.assert_allclose(weighted_average(tensors(weights), c), expected, rtol=1e-12, atol=1e-15)
    forward = solve_gram(tensors(weights), c, tensors(grams), 0.0).value
    backward = solve_gram(tensors(weights[::-1]), c[::-1], tensors(grams[::-1]), 0.0).value
    np.testing.assert_allclose(forward, backward, rtol=1e-8, atol=1e-10)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_diagonal_solution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=(3, 4)) for _ in range(3)]
    metrics = [rng.uniform(0.1, 1, size=(3, 4)) for _ in range(3)]
    c = rng.uniform(0.1, 2, 3)
    expected = sum(ci * f * v for ci, f, v in zip(c, metrics, values, strict=True)) / sum(
        ci * f for ci, f in zip(c, metrics, strict=True)
    )
    np.testing.assert_allclose(solve_diagonal(tensors(values), c, tensors(metrics), 0.0).value, expected, rtol=1e-10)


def test_without_information_the_average() -> None:
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 4.0, 5.0])]
    metrics = [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 3.0, 2.0])]
    found = solve_diagonal(values, [1.0, 1.0], metrics, 0.0).value
    assert found.tolist() == [2.0, 3.5, 5.0]
    zero = [torch.zeros(3, 3)] * 2
    weights = [torch.zeros(2, 3), torch.ones(2, 3)]
    solution = solve_gram(weights, [1.0, 3.0], zero, 0.0)
    assert torch.equal(solution.value, torch.full((2, 3), 0.75, dtype=torch.float64))
    assert solution.note and "zero" in solution.note


def test_an_input_that_is_always_zero_gets_the_average() -> None:
    weights, grams, c, _ = problem(1)
    for gram in grams:
        gram[2, :] = gram[:, 2] = 0
    found = solve_gram(tensors(weights), c, tensors(grams), 0.0).value.numpy()
    average = sum(ci * w for ci, w in zip(c, weights, strict=True)) / c.sum()
    np.testing.assert_allclose(found[:, 2], average[:, 2], rtol=1e-12)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("rank", [3, 30, 63])
def test_a_nearly_singular_gram_is_said_and_does_no_harm(rank: int) -> None:
    """Public code inverts this in float32, with a relative error of 20 to 44 and no warning."""
    rng = np.random.default_rng(rank)
    width, out = 64, 8
    weights = [rng.normal(size=(out, width)) for _ in range(2)]
    # A shared span, as fewer tokens than inputs would leave; values spread over orders of magnitude.
    scale = np.logspace(0, 2, width)
    span = rng.normal(size=(rank, width)) * scale
    inputs = [rng.normal(size=(200, rank)) @ span for _ in range(2)]
    grams = [(x.T @ x / 200).astype(np.float32) for x in inputs]
    found = solve_gram(tensors(weights), [1.0, 1.0], tensors(grams), 0.0)
    assert found.note and "nearly singular" in found.note
    merged = found.value.numpy()
    # What can be asked of any solution: it predicts as well as the exact least-squares one.
    stacked, targets = np.vstack(inputs), np.vstack([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    exact = np.linalg.lstsq(stacked, targets, rcond=1e-10)[0].T
    assert np.abs(merged * scale).max() < 3 * np.abs([exact * scale, *[w * scale for w in weights]]).max()
    error = np.square(stacked @ merged.T - targets).mean()
    assert error < 1.02 * np.square(stacked @ exact.T - targets).mean()


def test_an_indefinite_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive semi-definite"):
        solve_gram([torch.ones(1, 2)], [1.0], [torch.tensor([[1.0, 5.0], [5.0, 1.0]])], 0.0)


def test_merging_a_model_with_itself_returns_it() -> None:
    weights, grams, _, _ = problem(5)
    same = [torch.from_numpy(weights[0]).float()] * 3
    found = solve_gram(same, [0.3, 0.3, 0.4], tensors(grams), 0.0).value.float()
    assert torch.allclose(found, same[0], rtol=1e-6, atol=0)
