"""MaTS against the dense linear system of Kronecker products, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import Layer
from merganser.collection import collect
from merganser.errors import UserError
from merganser.merging import merge
from merganser.methods import METHODS, Facts, Unit, kronecker
from merganser.methods.regression import mats
from merganser.statistics import FILE_NAME, Statistics, write_statistics

LAYER = Layer("m", "linear", "w", "b", False)
WITHOUT_BIAS = Layer("m", "linear", "w", None, False)
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Given:
    """A contributor of one linear layer: W (out, in), b, inputs (n, in) and gradients (n, out)."""

    number: int
    coefficient: float
    weight: Array
    bias: Array
    inputs: Array
    outputs: Array
    transposed: bool = False

    def tensor(self, name: str) -> Tensor:
        value = self.bias if name == "b" else self.weight.T if self.transposed else self.weight
        return torch.from_numpy(np.ascontiguousarray(value))

    def gram(self, weight: str) -> Tensor:
        return torch.from_numpy(self.inputs.T @ self.inputs / len(self.inputs))

    def mean(self, weight: str) -> Tensor:
        return torch.from_numpy(self.inputs.mean(0))

    def gradients(self, weight: str) -> Tensor:
        return torch.from_numpy(self.outputs.T @ self.outputs / len(self.outputs))


def given(height: int, width: int, count: int = 3, seed: int = 0, rows: int = 90, **more: Any) -> list[Given]:
    draw = np.random.default_rng(seed)
    first = draw.standard_normal((height, width))
    people = []
    for number in range(count):
        weight = first + 0.3 * draw.standard_normal((height, width))
        inputs = draw.standard_normal((rows, width)) @ draw.standard_normal((width, width)) + draw.standard_normal(
            width
        )
        outputs = 1e-4 * draw.standard_normal((rows, height)) @ draw.standard_normal((height, height))
        bias = draw.standard_normal(height)
        people.append(Given(number, float(number + 1), weight, bias, inputs, outputs, **more))
    return people


def dense(
    people: Sequence[Given], *, bias: bool, ridge: float = 0.0, damping: float = 0.0, alpha: float = 1.0
) -> Array:
    """The W, or [W, b], with Σc(B ⊗ A)(W − Wᵢ) + λ(W − W̄) = 0, rows of W one after the other."""
    system: Any = 0.0
    right: Any = 0.0
    average: Any = 0.0
    for one in people:
        x = np.column_stack([one.inputs, np.ones(len(one.inputs))]) if bias else one.inputs
        weight = np.column_stack([one.weight, one.bias]) if bias else one.weight
        a, b = x.T @ x / len(x), one.outputs.T @ one.outputs / len(one.outputs)
        a, b = (alpha * m + (1 - alpha) * np.diag(np.diag(m)) for m in (a, b))
        b = b + damping * np.mean(np.diag(b)) * np.eye(len(b))
        metric = one.coefficient * np.kron(b, a)
        system, right = system + metric, right + metric @ weight.reshape(-1)
        average = average + one.coefficient * weight.reshape(-1)
    average = average / sum(one.coefficient for one in people)
    pull = ridge * np.mean(np.diag(system))
    solution = np.linalg.solve(system + pull * np.eye(len(system)), right + pull * average)
    return solution.reshape(weight.shape)


def merged(people: Sequence[Given], layer: Layer = LAYER, **options: Any) -> tuple[Array, str | None]:
    """[W, b], or W where the layer has no bias that is solved with it."""
    method = METHODS["mats"].configured(mats.MaTSOptions(**options))
    count = len(people)
    shape = people[0].weight.T.shape if people[0].transposed else people[0].weight.shape
    facts = [Facts("w", shape, layer, grams=("m",) * count, outputs=(True,) * count)]
    facts += [Facts("b", (len(people[0].bias),), None, layer)] if layer.bias else []
    (unit,), _ = method.units(facts)
    assert unit.kind == "kronecker"
    found = method.merge(unit, people)  # type: ignore[arg-type]
    weight = found.tensors["w"].numpy()
    weight = weight.T if people[0].transposed else weight
    return (np.column_stack([weight, found.tensors["b"].numpy()]) if "b" in unit.names else weight), found.note


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("options", [{}, {"ridge": 0.1}, {"damping": 0.5, "ridge": 0.01}, {"alpha": 0.7}])
def test_it_solves_the_system_of_kronecker_products(kind: Any, options: dict[str, float]) -> None:
    people = given(5, 4, transposed=kind == "conv1d")
    layer = Layer("m", kind, "w", "b", False)
    found, note = merged(people, layer, steps=2000, **options)
    assert note is None
    np.testing.assert_allclose(found, dense(people, bias=True, **options), rtol=1e-6, atol=1e-8)


def test_a_bias_may_stay_out() -> None:
    people = given(3, 6)
    for layer, options in ((WITHOUT_BIAS, {}), (LAYER, {"augment_bias": False})):
        found, _ = merged(people, layer, steps=2000, **options)
        np.testing.assert_allclose(found, dense(people, bias=False), rtol=1e-6, atol=1e-8)


def loss(people: Sequence[Given], merged: Array) -> float:
    """Σc‖B^½ (W − Wᵢ) A^½‖², from the gradients and inputs themselves."""
    total = 0.0
    for one in people:
        x = np.column_stack([one.inputs, np.ones(len(one.inputs))])
        error = merged - np.column_stack([one.weight, one.bias])
        total += one.coefficient * float(np.square(one.outputs @ error @ x.T).sum())
    return total


def test_each_step_comes_nearer_from_either_start() -> None:
    people = given(9, 7, seed=2)
    exact = loss(people, dense(people, bias=True))
    found = {
        start: [loss(people, merged(people, start=start, steps=steps)[0]) for steps in (1, 5, 20)]
        for start in ("average", "regmean")
    }
    for losses in found.values():
        assert losses[0] > losses[1] > losses[2] > exact
    average = np.average([np.column_stack([p.weight, p.bias]) for p in people], 0, weights=[1, 2, 3])
    assert loss(people, average) > found["average"][0] != found["regmean"][0]
    assert "stopped after 5 steps" in str(merged(people, steps=5)[1])


def test_identical_gradients_make_it_regmean() -> None:
    """With one B for all it drops out."""
    people = given(6, 5)
    alike = [Given(p.number, p.coefficient, p.weight, p.bias, p.inputs, people[0].outputs) for p in people]
    x = [np.column_stack([p.inputs, np.ones(len(p.inputs))]) for p in alike]
    grams = [p.coefficient * one.T @ one for p, one in zip(alike, x, strict=True)]
    weights = [np.column_stack([p.weight, p.bias]) for p in alike]
    regmean = sum(w @ g for w, g in zip(weights, grams, strict=True)) @ np.linalg.inv(sum(grams))
    np.testing.assert_allclose(merged(alike, steps=2000)[0], regmean, rtol=1e-6, atol=1e-8)
    at_start, _ = merged(alike, start="regmean", steps=1)
    np.testing.assert_allclose(at_start, regmean, rtol=1e-6, atol=1e-8)


def test_what_wide_layers_do_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    people = given(24, 20, rows=300)
    exact = dense(people, bias=True, ridge=0.01)
    monkeypatch.setattr(kronecker, "_NARROW", 4)
    found, note = merged(people, steps=2000, ridge=0.01)
    assert note is None
    np.testing.assert_allclose(found, exact, atol=1e-3)
    assert np.abs(found - exact).max() > 0  # it was another path


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_the_size_of_gradients_cancels(scale: float) -> None:
    """Of models that are sure of every answer they are tiny; their squares must not vanish."""
    people = given(5, 4)
    other = [Given(p.number, p.coefficient, p.weight, p.bias, p.inputs, p.outputs * scale) for p in people]
    np.testing.assert_allclose(merged(other)[0], merged(people)[0], rtol=1e-9)


def test_no_gradients_are_no_vote() -> None:
    people = given(5, 4, count=2)
    silent = Given(1, 5.0, people[1].weight, people[1].bias, people[1].inputs, 0 * people[1].outputs)
    np.testing.assert_allclose(
        merged([people[0], silent], steps=2000)[0], np.column_stack([people[0].weight, people[0].bias]), rtol=1e-6
    )
    none = [Given(p.number, p.coefficient, p.weight, p.bias, p.inputs, 0 * p.outputs) for p in people]
    found, note = merged(none)
    average = np.average([np.column_stack([p.weight, p.bias]) for p in none], 0, weights=[1, 2])
    np.testing.assert_allclose(found, average, rtol=1e-12)
    assert note == "every metric is zero: the average"


def test_layers_without_factors_are_regmeans() -> None:
    count, method = 2, METHODS["mats"]
    plain = Facts("w", (4, 3), WITHOUT_BIAS, grams=("m", "m"), outputs=(True, False))
    stack = Facts("v", (4, 3), WITHOUT_BIAS, grams=("m", "m"), outputs=(True, True), stack=2)
    table = Facts("e", (9, 3), Layer("e", "embedding", "e", None, False), counts=(True,) * count)
    bare = Facts("u", (4, 3), WITHOUT_BIAS, grams=("m", None), outputs=(True, False))
    units, reasons = method.units([plain, stack, table, bare, Facts("n", (3,))])
    assert {name: unit.kind for unit in units for name in unit.names} == {"w": "gram", "v": "gram", "e": "token counts"}
    assert reasons == {"u": "no Gram matrix in the statistics", "n": "not a linear map"}


def test_options_are_bounded() -> None:
    for options in ({"steps": 0}, {"ridge": -1}, {"damping": -0.1}, {"alpha": 1.5}, {"start": "ties"}):
        with pytest.raises(ValueError):
            mats.MaTSOptions(**options)


def test_memory_is_that_of_the_factors() -> None:
    method, units = METHODS["mats"], []
    for shape in ((100, 300), (300, 100)):
        unit = Unit(("w",), "kronecker", (Facts("w", shape, WITHOUT_BIAS),))
        units.append(method.memory(unit, 4) - method.memory(unit, 3))
        assert method.min_slice_rows(unit) is None
    assert all(8 * (100**2 + 300**2) <= size <= 8 * (101**2 + 301**2) for size in units)


@pytest.fixture
def trained(save_ready: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two classifiers with statistics of different texts."""
    found = []
    for seed, words in ((1, ["good", "very good", "not bad"]), (2, ["bad food", "the movie was bad", "no"])):
        folder = save_ready(f"m{seed}", seed=seed)
        data = tmp_path / f"{seed}.jsonl"
        data.write_text("".join(f'{{"text": "{text}"}}\n' for text in words * 4))
        collect(folder, data, kfac="auto")
        found.append(folder)
    return found


def test_a_merge_of_models_opens(trained: list[Path], tmp_path: Path) -> None:
    """Layer by layer nearer to the contributors, in their own metric, than RegMean and the average are."""
    folders = {
        name: merge(trained, tmp_path / name, method=name, options={"steps": 500} if name == "mats" else {})
        for name in ("mats", "regmean", "simple")
    }
    result = merge(trained, tmp_path / "again", method="mats", options={"steps": 500}, threads=2)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "mats" / "model.safetensors"
    ).read_bytes()
    assert result.coverage.share == 1 and result.influence is not None
    assert {t.kind for t in result.treatments} >= {"kronecker", "token counts"}
    name = "bert.encoder.layer.1.output.dense"
    losses = {}
    for method, folder in folders.items():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder.path)
        ours = model.get_submodule(name).weight.detach().double()
        losses[method] = 0.0
        for one in trained:
            theirs = open_checkpoint(one).read(f"{name}.weight").double()
            statistics = Statistics.open(one)
            layer = statistics.layer(f"{name}.weight")
            assert layer is not None and layer.input is not None and layer.output is not None
            gram, gradients = (statistics.gram(key).double() for key in (layer.input, layer.output))
            error = ours - theirs
            losses[method] += float((error * (gradients @ error @ gram)).sum())
    assert losses["mats"] < losses["regmean"] and losses["mats"] < losses["simple"]


def test_statistics_without_gradients_are_refused(trained: list[Path], tmp_path: Path) -> None:
    collect(trained[1], tmp_path / "2.jsonl", overwrite=True)
    with pytest.raises(UserError, match=r"(?s)publishes no gradients of outputs.*--kfac --overwrite"):
        merge(trained, tmp_path / "out", method="mats")
    assert not (tmp_path / "out").exists()


def test_gradients_of_another_size_are_named_and_those_that_decide_alone_refused(
    trained: list[Path], tmp_path: Path
) -> None:
    """A model that is sure of its answers has small gradients: thousands of times is a note, 10⁸ times an error."""
    own = Statistics.open(trained[1])
    outputs = [layer.output for layer in own.header.layers if layer.output]

    def scaled(factor: float) -> list[Path]:
        tensors = {name: own.packed(name).clone() for name in own.tensors}
        for output in outputs:
            tensors[f"gram.{output}"] *= factor
        return [trained[0] / FILE_NAME, write_statistics(tmp_path / f"{factor:g}.safetensors", own.header, tensors)]

    result = merge(trained, tmp_path / "large", method="mats", statistics=scaled(1e5))
    assert any("m2: the covariances of output gradients of" in note for note in result.notes)
    assert result.influence is not None and result.influence.of == "kfac" and result.influence.overall[1] > 0.9
    with pytest.raises(UserError, match=r"(?s)covariances of output gradients.*--accept-scales"):
        merge(trained, tmp_path / "huge", method="mats", statistics=scaled(1e12))
    assert not (tmp_path / "huge").exists()
