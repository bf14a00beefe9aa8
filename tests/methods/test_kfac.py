"""Damped K-FAC against the dense linear system of Kronecker products in float64, and what its preconditioner does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from merganser.checkpoints.layers import Layer
from merganser.methods import METHODS, Facts
from merganser.methods.kronecker import Kronecker, joint_eigenbases
from merganser.methods.metrics import solve_iteratively
from merganser.methods.regression.kfac import KfacOptions
from methods.test_mats import Array, Given, given


def dense(people: Sequence[Given], *, damping: float, ridge: float, alpha: float = 1.0) -> Array:
    """[W, b] with Σc(B ⊗ A)(W − Wᵢ) + λ(W − W̄) = 0, every factor with a mean diagonal of 1, B with its damping."""
    system: Any = 0.0
    right: Any = 0.0
    total = sum(one.coefficient for one in people)
    average = sum(one.coefficient * np.column_stack([one.weight, one.bias]) for one in people) / total
    for one in people:
        x = np.column_stack([one.inputs, np.ones(len(one.inputs))])
        a, b = x.T @ x / len(x), one.outputs.T @ one.outputs / len(one.outputs)
        a, b = (alpha * m + (1 - alpha) * np.diag(np.diag(m)) for m in (a, b))
        a, b = a / np.mean(np.diag(a)), b / np.mean(np.diag(b))
        b = (b + damping * np.eye(len(b))) / (1 + damping)
        metric = one.coefficient / total * np.kron(b, a)
        system, right = system + metric, right + metric @ np.column_stack([one.weight, one.bias]).reshape(-1)
    pull = ridge * np.eye(len(system))
    return np.linalg.solve(system + pull, right + pull @ average.reshape(-1)).reshape(average.shape)


def merged(people: Sequence[Given], **options: Any) -> tuple[Array, str | None]:
    """[W, b] and the note."""
    method, count = METHODS["kfac"].configured(KfacOptions(**options)), len(people)
    shape = people[0].weight.T.shape if people[0].transposed else people[0].weight.shape
    layer = Layer("m", "conv1d" if people[0].transposed else "linear", "w", "b", False)
    facts = [Facts("w", shape, layer, grams=("m",) * count, outputs=(True,) * count, in_base=True)]
    facts.append(Facts("b", (len(people[0].bias),), None, layer, in_base=True))
    (unit,), _ = method.units(facts)
    found = method.merge(unit, people)  # type: ignore[arg-type]
    weight = found.tensors["w"].numpy()
    weight = weight.T if people[0].transposed else weight
    return np.column_stack([weight, found.tensors["b"].numpy()]), found.note


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"damping": 0.1, "ridge": 0.03}, {"damping": 0.0, "ridge": 0.3}, {"damping": 1.0, "ridge": 0.01, "alpha": 0.7}],
)
def test_it_solves_the_damped_system(options: dict[str, float], transposed: bool) -> None:
    people = given(6, 5, transposed=transposed)
    found, note = merged(people, steps=500, **options)
    assert note is None
    np.testing.assert_allclose(found, dense(people, **options), rtol=1e-6, atol=1e-8)


def test_by_default_it_is_at_the_solution_after_few_steps() -> None:
    """The defaults of damping, ridge and steps; conjugate gradients without the preconditioner are far from it."""
    people = given(30, 20, count=4, rows=400)
    exact = dense(people, damping=0.3, ridge=0.01)
    moved = np.abs(
        exact - np.average([np.column_stack([p.weight, p.bias]) for p in people], 0, weights=[1, 2, 3, 4])
    ).max()
    found, _ = merged(people)
    assert np.abs(found - exact).max() < 0.01 * moved
    metrics = [Kronecker(*_factors(one)) for one in people]
    weights = [torch.from_numpy(np.column_stack([p.weight, p.bias])) for p in people]
    coefficients = [p.coefficient for p in people]
    plain = solve_iteratively(weights, coefficients, metrics, 0.01, steps=10).value.numpy()
    assert np.abs(plain - exact).max() > 3 * np.abs(found - exact).max()


def test_what_layers_change_is_lengthened_or_flattened_and_needs_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    people = given(6, 5)
    draw = np.random.default_rng(3)
    base = {"w": draw.standard_normal(people[0].weight.shape), "b": draw.standard_normal(people[0].bias.shape)}
    monkeypatch.setattr(Given, "base", lambda _, name: torch.from_numpy(base[name]), raising=False)
    plain, _ = merged(people, steps=500)
    scaled, _ = merged(people, steps=500, scale=1.25)
    origin = np.column_stack([base["w"], base["b"]])
    np.testing.assert_allclose(scaled - origin, 1.25 * (plain - origin), rtol=1e-6, atol=1e-8)
    flat, _ = merged(people, steps=500, scale=1.25, spectrum=9.0)
    left, values, right = np.linalg.svd((plain - origin)[:, :-1], full_matrices=False)
    tasks = [one.coefficient * (one.weight - base["w"]) for one in people]
    power = (sum(np.linalg.norm(task) for task in tasks) / np.linalg.norm(sum(tasks))) ** -9.0
    assert power < 0.9
    change = 1.25 * left * values**power @ right * np.linalg.norm(values) / np.linalg.norm(values**power)
    np.testing.assert_allclose((flat - origin)[:, :-1], change, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(flat[:, -1], scaled[:, -1], rtol=1e-12)
    assert METHODS["kfac"].configured(KfacOptions(spectrum=0.7)).needs.base
    assert METHODS["kfac"].configured(KfacOptions(scale=1.25)).needs.base
    assert not METHODS["kfac"].configured(KfacOptions()).needs.base


def _factors(one: Given) -> tuple[torch.Tensor, torch.Tensor]:
    x = np.column_stack([one.inputs, np.ones(len(one.inputs))])
    a, b = x.T @ x, one.outputs.T @ one.outputs
    b = b / np.mean(np.diag(b)) + 0.3 * np.eye(len(b))
    return torch.from_numpy(b / 1.3), torch.from_numpy(a / np.mean(np.diag(a)))


def test_the_preconditioner_is_the_inverse_where_factors_commute() -> None:
    draw = np.random.default_rng(1)
    left, right = (np.linalg.qr(draw.standard_normal((n, n)))[0] for n in (6, 4))
    terms, system = [], 0.25 * np.eye(24)
    for weight in (0.2, 0.8):
        b, a = (basis * draw.uniform(0.01, 2, len(basis)) @ basis.T for basis in (left, right))
        terms.append((weight, Kronecker(torch.from_numpy(b), torch.from_numpy(a))))
        system = system + weight * np.kron(b, a)
    residual = draw.standard_normal((6, 4))
    found = joint_eigenbases(terms, 0.25)(torch.from_numpy(residual)).numpy()
    np.testing.assert_allclose(found.reshape(-1), np.linalg.solve(system, residual.reshape(-1)), rtol=1e-9)


def test_the_size_of_one_contributors_statistics_is_no_vote() -> None:
    """A model that is sure of its answers has tiny gradients, and counts as much as the others."""
    people = given(5, 4)
    sure = [
        *people[:2],
        Given(2, people[2].coefficient, people[2].weight, people[2].bias, people[2].inputs, people[2].outputs * 1e-9),
    ]
    np.testing.assert_allclose(merged(sure)[0], merged(people)[0], rtol=1e-9)


def test_no_gradients_are_no_vote() -> None:
    people = given(5, 4, count=2)
    silent = Given(1, 5.0, people[1].weight, people[1].bias, people[1].inputs, 0 * people[1].outputs)
    found, _ = merged([people[0], silent], ridge=0.0, damping=0.0, steps=500)
    np.testing.assert_allclose(found, np.column_stack([people[0].weight, people[0].bias]), rtol=1e-6)


def test_options_are_bounded() -> None:
    for options in ({"steps": 0}, {"ridge": -1}, {"damping": -0.1}, {"alpha": 1.5}):
        with pytest.raises(ValueError):
            KfacOptions(**options)
