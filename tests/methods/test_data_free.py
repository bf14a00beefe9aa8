"""LOT, TACT, ACTMat's other choices, ACE, WUDI and balanced against their formulas, in float64 and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from merganser.checkpoints.layers import Layer
from merganser.merging import ledger, merge
from merganser.methods import METHODS, SUMMED, Facts
from merganser.methods.regression.ace import heterogeneity
from merganser.statistics import FILE_NAME, Statistics
from merging.test_bytes import write_family

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Given:
    """A contributor of one linear layer, whose inputs are known."""

    number: int
    coefficient: float
    weight: Array
    origin: Array
    inputs: Array

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.weight.copy())

    stored = tensor

    def base(self, name: str) -> Tensor:
        return torch.from_numpy(self.origin.copy())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop]

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.base(name)[start:stop]

    def gram(self, weight: str) -> Tensor:
        return torch.from_numpy(self.inputs.T @ self.inputs / len(self.inputs))


def drawn(height: int, width: int, count: int = 3, seed: int = 0, inputs: int = 50, size: float = 0.1) -> list[Given]:
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((height, width))
    return [
        Given(
            number,
            1.0 + number,
            base + size * (1 + number) * draw.standard_normal((height, width)),
            base,
            draw.standard_normal((inputs, width)),
        )
        for number in range(count)
    ]


def merged(method: str, people: Sequence[Any], *, stored: bool = False, **options: Any) -> Array:
    shape = people[0].weight.shape
    layer = Layer("m", "conv1d" if stored else "linear", "w", None, False)
    fact = Facts("w", shape, layer, grams=("m",) * len(people), in_base=True)
    chosen = METHODS[method].configured(METHODS[method].options_type.model_validate(options))
    (unit,), _ = chosen.units([fact])
    found: Array = chosen.merge(unit, people).tensors["w"].double().numpy()
    return found


def tasks(people: Sequence[Given]) -> list[Array]:
    return [one.weight - one.origin for one in people]


def solved(people: Sequence[Given], grams: Sequence[Array]) -> Array:
    """W₀ + (ΣcδG)(ΣcG)⁺, with numpy's pseudo-inverse."""
    system = sum(one.coefficient * gram for one, gram in zip(people, grams, strict=True))
    right = sum(one.coefficient * task @ gram for one, task, gram in zip(people, tasks(people), grams, strict=True))
    return people[0].origin + right @ np.linalg.pinv(system, rcond=1e-9)  # type: ignore[no-any-return]


def distance(found: Array, expected: Array, origin: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - origin))


def test_lot_is_the_pseudo_inverse_on_task_vectors() -> None:
    people = drawn(7, 12)
    grams = [one.inputs.T @ one.inputs for one in people]
    assert distance(merged("lot", people), solved(people, grams), people[0].origin) < 1e-9
    # With inputs in all directions it is RegMean without shrinking.
    assert distance(merged("lot", people), merged("regmean", people, alpha=1.0), people[0].origin) < 1e-9


def test_lot_leaves_the_base_model_where_no_inputs_lie() -> None:
    """Three inputs of each contributor span nine of twelve directions."""
    people = drawn(7, 12, inputs=3)
    grams = [one.inputs.T @ one.inputs for one in people]
    origin, expected = people[0].origin, solved(people, grams)
    assert distance(merged("lot", people), expected, origin) < 1e-9
    beside = np.eye(12) - np.linalg.pinv(sum(grams), rcond=1e-9) @ sum(grams)
    assert np.linalg.norm((merged("lot", people) - origin) @ beside) < 1e-9
    assert np.linalg.norm((merged("regmean", people, alpha=1.0) - origin) @ beside) > 0.1
    toward_average = merged("lot", people, toward="average")
    assert distance(toward_average, merged("regmean", people, alpha=1.0), origin) < 1e-12


def test_without_any_input_there_is_the_base_model_or_the_average() -> None:
    people = [Given(n, 1.0, one.weight, one.origin, 0 * one.inputs) for n, one in enumerate(drawn(4, 5))]
    np.testing.assert_array_equal(merged("lot", people), people[0].origin)
    average = np.mean([one.weight for one in people], axis=0)
    np.testing.assert_allclose(merged("lot", people, toward="average"), average, atol=1e-12)


def test_a_ledger_of_lot_solves_to_the_merge(tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")
    whole = Path(merge(models[:2], tmp_path / "whole", method="lot", base=base))
    assert "lot" in SUMMED
    book = ledger.init(tmp_path / "book", base, method="lot")
    for model in models[:2]:
        ledger.add(book, model)
    out = Path(ledger.solve(book, tmp_path / "solved"))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, out))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_lot_of_a_model_with_biases(tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")
    out = Path(merge(models, tmp_path / "out", method="lot", base=base, options={"ridge": 0.1}))
    found, origin = (load_file(folder / "model.safetensors") for folder in (out, base))
    weight = next(name for name in origin if "attention.output.dense.weight" in name)
    bias = weight.replace("weight", "bias")
    system: Any = 0.0
    right: Any = 0.0
    for model in models:
        tuned, statistics = load_file(model / "model.safetensors"), Statistics.open(model / FILE_NAME)
        entry = statistics.layer(weight)
        assert entry is not None and entry.input is not None
        gram, mean = statistics.gram(entry.input).double().numpy(), statistics.mean(entry.input).double().numpy()
        whole = np.block([[gram, mean[:, None]], [mean[None], np.ones((1, 1))]])
        change = [(tuned[name] - origin[name]).double().numpy() for name in (weight, bias)]
        system, right = system + whole, right + np.column_stack(change) @ whole
    system += 0.1 * np.trace(system) / len(system) * np.eye(len(system))
    expected = right @ np.linalg.inv(system)
    np.testing.assert_allclose((found[weight] - origin[weight]).numpy(), expected[:, :-1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose((found[bias] - origin[bias]).numpy(), expected[:, -1], rtol=1e-3, atol=1e-5)


def trimmed(task: Array, density: float) -> Array:
    kept = max(1, int(density * task.size))
    return np.where(np.abs(task) >= np.sort(np.abs(task).ravel())[-kept], task, 0.0)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_tact_estimates_inputs_from_the_large_changes(density: float) -> None:
    people = drawn(20, 6)
    grams = [trimmed(task, density).T @ trimmed(task, density) for task in tasks(people)]
    found = merged("tact", people, ridge=0, toward="base", density=density)
    assert distance(found, solved(people, grams), people[0].origin) < 1e-8
    turned = [Given(p.number, p.coefficient, p.weight.T, p.origin.T, p.inputs) for p in people]
    stored = merged("tact", turned, stored=True, ridge=0, toward="base", density=density)
    np.testing.assert_allclose(stored.T, found, rtol=1e-9, atol=1e-12)
    if density == 1:
        np.testing.assert_array_equal(merged("tact", people, density=1), merged("actmat", people))


def test_densities_may_differ_between_contributors() -> None:
    people = drawn(20, 6)
    grams = [
        trimmed(task, share).T @ trimmed(task, share) for task, share in zip(tasks(people), (0.2, 1, 0.6), strict=True)
    ]
    found = merged("tact", people, ridge=0, density=(0.2, 1.0, 0.6))
    assert distance(found, solved(people, grams), people[0].origin) < 1e-8


def test_actmat_with_the_authors_choices(tmp_path: Path) -> None:
    people = drawn(4, 9, 2)  # eight rows for nine inputs: the pseudo-inverse of a singular matrix
    grams = [task.T @ task for task in tasks(people)]
    found = merged("actmat", people, ridge=0, toward="base")
    assert distance(found, solved(people, grams), people[0].origin) < 1e-9
    base, models = write_family(tmp_path, "bert", "F32")
    options = {"biases": False, "embeddings": False}
    out = Path(merge(models, tmp_path / "out", method="actmat", base=base, options=options))
    tuned = [load_file(model / "model.safetensors") for model in models]
    for name, tensor in load_file(out / "model.safetensors").items():
        if name.endswith("bias") or "embeddings" in name:
            average = torch.stack([one[name].double() for one in tuned]).mean(0)
            torch.testing.assert_close(tensor.double(), average, rtol=1e-6, atol=1e-6)


def ace(
    people: Sequence[Given], *, epsilon: float, threshold: float = 0.3, share: float = 0.3, centred: bool = False
) -> Array:
    """Xu et al. 2026, with the dense system of the paper; coefficients of mean 1."""
    deltas = tasks(people)
    weights = np.array([one.coefficient for one in people])
    weights = weights * len(people) / weights.sum()
    width = deltas[0].shape[1]
    logs = np.log([np.sum(delta**2) for delta in deltas])
    mixed = logs.var(ddof=1) / logs.mean() ** 2 > threshold
    covariances, epsilons = [], []
    for delta in deltas:
        rows = delta - delta.mean(axis=0)
        covariance = rows.T @ rows
        trace = np.trace(covariance)
        covariances.append(covariance / trace if mixed else covariance)
        epsilons.append(epsilon / trace if mixed else epsilon)
    prior = np.ones((width, 1)) @ (sum(w * c for w, c in zip(weights, covariances, strict=True)).mean(axis=0)[None])
    regular = [c + e * np.eye(width) for c, e in zip(covariances, epsilons, strict=True)]
    numerators = [delta - delta.mean(axis=0) if centred else delta for delta in deltas]
    right = sum(w * n @ r for w, n, r in zip(weights, numerators, regular, strict=True))
    found = right @ np.linalg.inv(sum(w * r for w, r in zip(weights, regular, strict=True)) + prior)
    if mixed:
        mean = sum(w * c for w, c in zip(weights, covariances, strict=True)) / len(people)
        residual = sum(w * d @ (c - mean) for w, d, c in zip(weights, deltas, covariances, strict=True))
        left, values, rights = np.linalg.svd(found + residual, full_matrices=False)
        top = int(len(values) * share)
        found = found + values[:top].mean() * left[:, :top] @ rights[:top]
    return people[0].origin + found  # type: ignore[no-any-return]


def of_sizes(*sizes: float, shape: tuple[int, int] = (14, 10)) -> list[Given]:
    return [
        Given(n, 1.0 + n, one.origin + size * (one.weight - one.origin), one.origin, one.inputs)
        for n, (size, one) in enumerate(zip(sizes, drawn(*shape, len(sizes)), strict=True))
    ]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("sizes", "mixed"), [((0.1, 0.05, 0.03), False), ((0.01, 3.0, 40.0), True)])
def test_ace_is_the_papers_closed_form(sizes: tuple[float, ...], mixed: bool, centred: bool) -> None:
    people = of_sizes(*sizes)
    assert (heterogeneity([float((task**2).sum()) for task in tasks(people)]) > 0.3) == mixed
    expected = ace(people, epsilon=1e-3, centred=centred)
    assert distance(merged("ace", people, epsilon=1e-3, centred=centred), expected, people[0].origin) < 1e-8
    unmixed = ace(people, epsilon=1e-3, threshold=1e9, centred=centred)
    found = merged("ace", people, epsilon=1e-3, threshold=1e9, centred=centred)
    assert distance(found, unmixed, people[0].origin) < 1e-8
    assert mixed == (distance(expected, unmixed, people[0].origin) > 1e-6)


def test_ace_scales_the_change_and_not_by_the_sum_of_coefficients() -> None:
    people = of_sizes(1.0, 2.0)
    plain = merged("ace", people)
    for options, factor in (({"scale": 2.0}, 2.0), ({}, 1.0)):
        more = [Given(p.number, 7 * p.coefficient, p.weight, p.origin, p.inputs) for p in people]
        found = merged("ace", more, **options) - people[0].origin
        np.testing.assert_allclose(found, factor * (plain - people[0].origin), rtol=1e-6, atol=1e-9)


def wudi(people: Sequence[Given], steps: int, lr: float) -> Array:
    """Cheng et al. 2025: torch's own Adam on the loss as it is written, whose gradient autograd finds."""
    deltas = [torch.from_numpy(task) for task in tasks(people)]
    start = sum(one.coefficient * delta for one, delta in zip(people, deltas, strict=True))
    task = torch.nn.Parameter(torch.as_tensor(start).clone())
    optimiser = torch.optim.Adam([task], lr=lr)
    for _ in range(steps):
        losses = [
            one.coefficient * ((task - delta) @ delta.T).square().sum() / delta.square().sum()
            for one, delta in zip(people, deltas, strict=True)
        ]
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return people[0].origin + task.detach().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-5), (1, 1e-3), (40, 1e-3), (300, 1e-5)])
def test_wudi_takes_the_papers_steps(steps: int, lr: float) -> None:
    people = drawn(9, 6)
    assert distance(merged("wudi", people, steps=steps, lr=lr), wudi(people, steps, lr), people[0].origin) < 1e-9


def test_the_exact_solution_is_where_the_steps_lead() -> None:
    people = drawn(30, 6)
    exact = merged("wudi", people, solution="exact", ridge=0)
    grams = [task.T @ task / (task**2).sum() for task in tasks(people)]
    assert distance(exact, solved(people, grams), people[0].origin) < 1e-8
    left = [distance(merged("wudi", people, steps=n, lr=1e-3), exact, people[0].origin) for n in (0, 600, 3000)]
    assert left[0] > left[1] > left[2] and left[2] < 0.1 * left[0]


def test_wudi_leaves_everything_else_as_the_base_model_has_it(tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")
    origin = load_file(base / "model.safetensors")
    kept = Path(merge(models, tmp_path / "kept", method="wudi", base=base, options={"steps": 2}))
    averaged = Path(merge(models, tmp_path / "rest", method="wudi", base=base, options={"steps": 2, "rest": 1.0}))
    tuned = [load_file(model / "model.safetensors") for model in models]
    rest = {name for name in origin if name.endswith("bias") or "LayerNorm" in name}
    for name in rest:
        assert torch.equal(load_file(kept / "model.safetensors")[name], origin[name])
        average = torch.stack([one[name].double() for one in tuned]).mean(0)
        torch.testing.assert_close(
            load_file(averaged / "model.safetensors")[name].double(), average, rtol=1e-6, atol=1e-6
        )


def balanced(people: Sequence[Given], ridge: float, factor: float) -> Array:
    """The minimum of Σcᵢ‖τ − δᵢ‖²_Gᵢ + λΣcᵢ‖τ − kδ̄‖², each Gᵢ with a mean of 1 on its diagonal."""
    deltas, total = tasks(people), sum(one.coefficient for one in people)
    grams = [len(delta.T) * delta.T @ delta / (delta**2).sum() for delta in deltas]
    mean = sum(one.coefficient * delta for one, delta in zip(people, deltas, strict=True)) / total
    pull = ridge * total
    right = sum(one.coefficient * d @ gram for one, d, gram in zip(people, deltas, grams, strict=True))
    system = sum(one.coefficient * gram for one, gram in zip(people, grams, strict=True)) + pull * np.eye(mean.shape[1])
    return people[0].origin + (right + pull * factor * mean) @ np.linalg.inv(system)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ridge", "lengthen"), [(1.0, 1.0), (0.1, 0.0), (3.0, 0.5)])
@pytest.mark.parametrize("shape", [(9, 6), (5, 11)])
def test_balanced_is_its_closed_form(shape: tuple[int, int], ridge: float, lengthen: float) -> None:
    people = drawn(*shape)
    deltas, shares = tasks(people), np.array([one.coefficient for one in people]) / 6
    mean = sum(share * delta for share, delta in zip(shares, deltas, strict=True))
    lengths = sum(share * np.linalg.norm(delta) for share, delta in zip(shares, deltas, strict=True))
    factor = float(lengths / np.linalg.norm(mean))
    assert 1.05 < factor < 3**0.5  # the limit is not what is tried here
    expected = balanced(people, ridge, factor**lengthen)
    found = merged("balanced", people, ridge=ridge, lengthen=lengthen)
    assert distance(found, expected, people[0].origin) < 1e-9


@pytest.mark.parametrize(("spectrum", "shape"), [(0.7, (9, 6)), (1.0, (5, 11)), (3.0, (140, 150))])
def test_balanced_of_a_flatter_spectrum(spectrum: float, shape: tuple[int, int]) -> None:
    """The singular values of what it changes to the power k^-spectrum, and the length of it as it was."""
    people = drawn(*shape)
    weighted = [one.coefficient * delta for one, delta in zip(people, tasks(people), strict=True)]
    k = sum(np.linalg.norm(delta) for delta in weighted) / np.linalg.norm(sum(weighted))
    left, values, right = np.linalg.svd(merged("balanced", people) - people[0].origin, full_matrices=False)
    change = left * values**k**-spectrum @ right
    expected = people[0].origin + change * np.linalg.norm(values) / np.linalg.norm(change)
    assert 1.05 < k < 3**0.5
    assert distance(merged("balanced", people, spectrum=spectrum), expected, people[0].origin) < 1e-7


def test_balanced_gives_orthogonal_changes_the_length_that_they_have() -> None:
    base = np.zeros((4, 4))
    people = [Given(n, 1.0, 3.0 * np.eye(4)[[n]].T @ np.eye(4)[[n]], base, base) for n in range(4)]
    found = merged("balanced", people, ridge=1e6)
    np.testing.assert_allclose(found, 1.5 * np.eye(4), rtol=1e-4)  # of length 3, and the average is of length 1.5
    alone = merged("balanced", people, ridge=1e6, lengthen=0.0)
    np.testing.assert_allclose(alone, 0.75 * np.eye(4), rtol=1e-4)


def test_balanced_does_not_lengthen_what_contradicts() -> None:
    """The length of the average says nothing where changes cancel: k is √2 at most for two, and 1 where they agree."""
    (one, other) = drawn(5, 5, 2)
    change = one.weight - one.origin
    apart = [
        Given(n, 1.0, one.origin + sign * change + 1e-3 * (other.weight - one.origin), one.origin, one.inputs)
        for n, sign in enumerate((1, -1))
    ]
    found = merged("balanced", apart, ridge=1.0)
    assert distance(found, balanced(apart, 1.0, 2**0.5), one.origin) < 1e-9
    alike = [Given(n, 1.0, one.weight, one.origin, one.inputs) for n in range(3)]
    for options in ({}, {"spectrum": 1.0}):
        np.testing.assert_allclose(merged("balanced", alike, **options), one.weight, atol=1e-12)


def test_a_contributor_that_moved_further_has_no_more_say() -> None:
    """Where inputs are known by both, ten times the change counts as often as the other, and not a hundred times."""
    base = np.zeros((1, 2))
    people = [Given(n, 1.0, np.array([[size, 0.0]]), base, base) for n, size in enumerate((1.0, 10.0))]
    assert merged("balanced", people, ridge=0.0)[0, 0] == pytest.approx(5.5)
    assert merged("actmat", people, ridge=0.0)[0, 0] == pytest.approx((1 + 1000) / 101)


DATA_FREE = ("tact", "actmat", "ace", "wudi", "balanced")


@settings(max_examples=20, deadline=None)
@given(method=st.sampled_from(DATA_FREE), seed=st.integers(0, 1000), height=st.integers(1, 9), width=st.integers(1, 9))
def test_order_does_not_matter(method: str, seed: int, height: int, width: int) -> None:
    people = drawn(height, width, 3, seed)
    options: dict[str, Any] = {"steps": 5} if method == "wudi" else {"epsilon": 1e-3} if method == "ace" else {}
    turned = [Given(n, p.coefficient, p.weight, p.origin, p.inputs) for n, p in enumerate(reversed(people))]
    assert distance(merged(method, turned, **options), merged(method, people, **options), people[0].origin) < 1e-6


@settings(max_examples=20, deadline=None)
@given(method=st.sampled_from(("actmat", "exact", "balanced")), seed=st.integers(0, 1000))
def test_turned_inputs_and_outputs_give_a_turned_merge(method: str, seed: int) -> None:
    people = drawn(8, 5, 3, seed)
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((size, size)))[0] for size in (8, 5))
    turned = [
        Given(p.number, p.coefficient, left @ p.weight @ right, left @ p.origin @ right, p.inputs) for p in people
    ]
    name, options = ("wudi", {"solution": "exact"}) if method == "exact" else (method, {})
    expected = left @ merged(name, people, **options) @ right
    assert distance(merged(name, turned, **options), expected, turned[0].origin) < 1e-6


@pytest.mark.parametrize("method", [*DATA_FREE, "lot"])
@pytest.mark.parametrize("options", [{}, {"solution": "exact"}, {"toward": "base"}, {"ridge": 0.0, "toward": "base"}])
def test_identical_models_are_returned_and_degenerate_ones_are_finite(method: str, options: dict[str, Any]) -> None:
    if not set(options) <= set(METHODS[method].options_type.model_fields):
        return
    (one,) = drawn(6, 4, 1)
    for height in (6, 1):
        person = Given(0, 1.0, one.weight[:height], one.origin[:height], one.inputs)
        untrained = Given(1, 1.0, one.origin[:height], one.origin[:height], one.inputs)
        for people in ([person], [person] * 3, [untrained] * 2, [untrained, person]):
            found = merged(method, people, **options)
            assert np.isfinite(found).all()
            if people[0] is untrained and people[-1] is untrained:
                np.testing.assert_allclose(found, one.origin[:height], atol=1e-9)
    same = merged(
        method,
        [Given(n, 1.0, one.weight, one.origin, one.inputs) for n in range(3)],
        **{"ridge": 0.0, **options} if "ridge" in METHODS[method].options_type.model_fields else options,
    )
    if method in ("tact", "actmat", "lot") or options.get("solution") == "exact":
        np.testing.assert_allclose(same, one.weight, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tact", {"density": 0}), ("tact", {"density": 1.5}), ("lot", {"toward": "zero"}), ("lot", {"alpha": 2}),
        ("ace", {"epsilon": 0}), ("ace", {"refined": 2}), ("wudi", {"steps": -1}), ("wudi", {"solution": "sgd"}),
        ("balanced", {"ridge": -1}), ("balanced", {"lengthen": 1.1}),
        ("balanced", {"spectrum": -1}),
        ("iso_cts", {"common": 1.1}), ("tsv_m", {"scale": float("inf")}),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        METHODS[method].options_type.model_validate(options)
