"""Running sums against the closed form in numpy, and wherever they were put down on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.methods.sums import GramSums


def problem(seed: int, n: int = 4, out: int = 3, width: int = 6):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(out, width)) for _ in range(n)]
    inputs = [rng.normal(size=(50, width)) @ rng.normal(size=(width, width)) for _ in range(n)]
    return weights, [x.T @ x / 50 for x in inputs], rng.uniform(0.1, 2, n)


def summed(weights, grams, c) -> GramSums:  # type: ignore[no-untyped-def]
    sums = GramSums()
    for w, g, ci in zip(weights, grams, c, strict=True):
        sums.add(torch.from_numpy(w), torch.from_numpy(g), float(ci))
    return sums


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 1.0]))
@settings(max_examples=30, deadline=None)
def test_every_prefix_is_the_closed_form(seed: int, ridge: float) -> None:
    """One chain of sums, solved after each contributor, against the formula of each merge by itself."""
    weights, grams, c = problem(seed)
    sums = GramSums()
    for n in range(1, len(weights) + 1):
        sums.add(torch.from_numpy(weights[n - 1]), torch.from_numpy(grams[n - 1]), float(c[n - 1]))
        average = sum(ci * w for ci, w in zip(c[:n], weights[:n], strict=True)) / c[:n].sum()
        total = sum(ci * g for ci, g in zip(c[:n], grams[:n], strict=True))
        lam = ridge * np.trace(total) / len(total)
        top = sum(ci * w @ g for ci, w, g in zip(c[:n], weights[:n], grams[:n], strict=True)) + lam * average
        expected = np.linalg.solve(total + lam * np.eye(len(total)), top.T).T
        np.testing.assert_allclose(sums.solve(ridge).value.numpy(), expected, rtol=1e-8, atol=1e-9)


def test_sums_that_were_put_down_give_the_same_bytes_and_solving_leaves_them_alone() -> None:
    weights, grams, c = problem(1)
    whole = summed(weights, grams, c)
    part = summed(weights[:2], grams[:2], c[:2])
    part.solve(0.1)
    part = GramSums.from_tensors({name: tensor.clone() for name, tensor in part.tensors().items()})
    for w, g, ci in zip(weights[2:], grams[2:], c[2:], strict=True):
        part.add(torch.from_numpy(w), torch.from_numpy(g), float(ci))
    for name, tensor in whole.tensors().items():
        assert torch.equal(part.tensors()[name], tensor), name
    assert torch.equal(part.solve(0.0).value, whole.solve(0.0).value)


def test_arguments_and_sums_stay_as_they_are() -> None:
    weights, grams, c = problem(2)
    given = [*weights, *grams]
    before = [array.copy() for array in given]
    sums = summed(weights, grams, c)
    assert torch.equal(sums.solve(0.3).value, sums.solve(0.3).value)
    assert all(np.array_equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_contributor_with_coefficient_zero_changes_nothing(zero: int) -> None:
    weights, grams, c = problem(3)
    c[zero] = 0
    others = [i for i in range(4) if i != zero]
    expected = summed([weights[i] for i in others], [grams[i] for i in others], c[others]).solve(0.0).value
    np.testing.assert_allclose(summed(weights, grams, c).solve(0.0).value, expected, rtol=1e-9, atol=1e-10)


def test_contributors_that_agree_are_returned_to_the_bit_by_a_singular_system_too() -> None:
    weights, _, _ = problem(4)
    sums = summed([weights[0]] * 3, [np.outer(np.arange(6.0), np.arange(6.0))] * 3, [0.2, 0.3, 0.5])
    solution = sums.solve(0.0)
    assert solution.note and torch.equal(solution.value, torch.from_numpy(weights[0]))


def test_nothing_is_solved_from_nothing() -> None:
    with pytest.raises(ValueError, match="no contributor"):
        GramSums().solve(0.0)


@pytest.mark.parametrize("fault", ["missing", "float32", "narrow", "vector", "rows"])
def test_tensors_that_are_no_sums_are_refused(fault: str) -> None:
    tensors = summed(*problem(5)).tensors()
    if fault == "missing":
        del tensors["offset"]
    elif fault == "float32":
        tensors["right"] = tensors["right"].float()
    elif fault == "narrow":
        tensors["system"] = tensors["system"][:-1, :-1]
    elif fault == "vector":
        tensors["reference"] = tensors["reference"][0]
    else:
        tensors["right"] = tensors["right"][:1]
    with pytest.raises(ValueError):
        GramSums.from_tensors(tensors)


def test_wide_systems_are_solved_in_float32_where_that_loses_nothing() -> None:
    """Correlated inputs, 640 wide, against float64 numpy; a system that is nearly singular is factored in float64."""
    rng = np.random.default_rng(0)
    width, out, n, alpha = 640, 40, 3, 0.9
    mixing = rng.normal(size=(width, width)) * (np.arange(1, width + 1) ** -0.7)[:, None]
    base = rng.normal(size=(out, width)).astype(np.float32)
    weights = [base + 0.1 * rng.normal(size=base.shape).astype(np.float32) for _ in range(n)]
    grams = []
    for _ in range(n):
        inputs = rng.normal(size=(2 * width, width)) @ mixing
        gram = inputs.T @ inputs / len(inputs)
        grams.append((alpha * gram + (1 - alpha) * np.diag(np.diag(gram))).astype(np.float32))
    sums = GramSums(dtype=None)
    for weight, gram in zip(weights, grams, strict=True):
        sums.add(torch.from_numpy(weight), torch.from_numpy(gram), 1.0)
    assert sums.dtype == torch.float32
    factored = sums.factor(0.0)
    assert factored.factor is not None and factored.factor.dtype == torch.float32
    singular = GramSums(dtype=None)
    singular.add(torch.from_numpy(weights[0]), torch.from_numpy(mixing.T @ mixing).float(), 1.0)
    assert singular.dtype == torch.float32
    widened = singular.factor(0.0).factor
    assert widened is not None and widened.dtype == torch.float64
    top = sum(w.astype(np.float64) @ g.astype(np.float64) for w, g in zip(weights, grams, strict=True))
    expected = np.linalg.solve(sum(g.astype(np.float64) for g in grams), top.T).T
    found = factored.solve(sums).double().numpy()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    naive = sum(torch.from_numpy(w) @ torch.from_numpy(g) for w, g in zip(weights, grams, strict=True))
    naive = naive @ torch.inverse(sum(torch.from_numpy(g) for g in grams))
    assert error < np.linalg.norm(naive.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_alpha_is_what_shrinking_each_gram_matrix_first_would_be(alpha: float, dtype: torch.dtype) -> None:
    width, generator = 19, torch.Generator().manual_seed(3)
    plain, shrunk = GramSums(dtype=dtype), GramSums(dtype=dtype)
    for coefficient in (1.0, 0.5, 2.0):
        half = torch.randn(width, 40, generator=generator, dtype=dtype)
        gram, weights = half @ half.T / 40, torch.randn(5, width, generator=generator, dtype=dtype)
        before = gram.clone()
        plain.add(weights, gram, coefficient, alpha)
        assert torch.equal(gram, before)
        shrunk.add(weights, torch.where(torch.eye(width) > 0, gram, alpha * gram), coefficient)
    torch.testing.assert_close(plain.solve(0.01).value, shrunk.solve(0.01).value)


def test_how_a_matrix_lies_in_memory_does_not_change_the_bytes() -> None:
    """A Gram matrix may come with room after its rows or transposed; sums in a file lie in a row."""
    width, generator = 769, torch.Generator().manual_seed(4)
    found = []
    half = torch.randn(width, 900, generator=generator)
    gram, weights = half @ half.T / 900, torch.randn(3, 11, width, generator=generator)
    apart = torch.empty(width, 784)[:, :width].copy_(gram)
    for one in (gram, gram.T, apart, apart[:, :].T):
        sums = GramSums(dtype=torch.float32)
        for contributor in weights:
            sums.add(contributor, one, 1.0, 0.9)
        found.append(sums.solve(0.0).value)
    put_down = GramSums(dtype=torch.float32)
    for contributor in weights:
        put_down.add(contributor, gram, 1.0, 0.9)
        tensors = put_down.tensors()
        assert torch.equal(tensors["system"], tensors["system"].T)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        put_down = GramSums.from_tensors(tensors)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0], put_down.solve(0.0).value)
