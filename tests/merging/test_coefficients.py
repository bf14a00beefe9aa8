"""Coefficients of every sign and size: what they mean where they have a meaning, and what is said where not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.errors import UserError
from merganser.merging import ledger, make_recipe, merge
from merganser.methods import METHODS

Family = Callable[..., tuple[Path, list[Path]]]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("coefficients", [(1, -1), (2, -0.5), (0, -1), (0.1, 0.2, -0.3)])
def test_task_vectors_are_added_and_taken_away(family: Family, tmp_path: Path, coefficients: tuple[float, ...]) -> None:
    base, models = family("bert", len(coefficients), statistics=False)
    options = {"scale": 0.7}
    merge(models, tmp_path / "out", method="task_arithmetic", base=base, coefficients=coefficients, options=options)
    origin, tuned, found = state(base), [state(model) for model in models], state(tmp_path / "out")
    for name, start in origin.items():
        expected = start + 0.7 * sum(c * (one[name] - start) for c, one in zip(coefficients, tuned, strict=True))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[name], start, atol=1e-3)


def test_ties_takes_a_negative_coefficient_as_the_negated_task_vector(family: Family, tmp_path: Path) -> None:
    """The oracle is the merge of a model that lies on the other side of the base, with a positive coefficient."""
    base, models = family("bert", 2, statistics=False)
    origin = state(base)
    mirrored = {name: (2 * origin[name] - tensor).float() for name, tensor in state(models[1]).items()}
    settings: dict[str, Any] = {"method": "ties", "base": base, "options": {"density": 0.5}}
    merge(models, tmp_path / "negative", coefficients=[1, -2], **settings)
    save_file(mirrored, models[1] / "model.safetensors", metadata={"format": "pt"})
    merge(models, tmp_path / "mirrored", coefficients=[1, 2], **settings)
    expected, found = state(tmp_path / "mirrored"), state(tmp_path / "negative")
    for name, tensor in expected.items():
        # Rounding of the mirrored model moves a threshold past a number now and then.
        assert (found[name] - tensor).abs().gt(1e-5).double().mean() < 0.02, name
        assert not torch.allclose(tensor, origin[name], atol=1e-3)


#: In others coefficients have no meaning; those that look at texts are averages of what they align.
WEIGHING = {name: method for name, method in METHODS.items() if method.needs.weighted and not method.needs.data}
WRONG: list[tuple[list[Any], str]] = [
    ([1e39, 1], "not between"),
    ([1e308, 1e308], "not between"),
    ([1e-320, 1], "not between"),
    ([float("inf"), 1], "not finite"),
    ([float("nan"), 1], "not finite"),
    ([10**400, 1], "coefficient"),
    ([0, 0], "every coefficient is zero"),
]


def test_no_method_takes_what_its_sums_cannot_hold(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, fisher="expected", kfac="expected")
    for method in METHODS:
        for coefficients, message in WRONG:
            with pytest.raises(UserError, match=message) as caught:
                merge(models, tmp_path / "out", method=method, base=base, coefficients=coefficients)
            assert "to mend" in str(caught.value) and len(str(caught.value)) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("coefficients", [[1e18, 1e17], [1e-18, 3e-18], [1e18, 1e-18]])
def test_every_method_is_finite_at_the_ends_of_the_range(
    family: Family, tmp_path: Path, coefficients: list[float]
) -> None:
    base, models = family("bert", 2, fisher="expected", kfac="expected")
    largest = max(coefficients)
    ratios = [c / largest if c / largest > 1e-18 else 0.0 for c in coefficients]
    for name, method in WEIGHING.items():
        if method.needs.package and importlib.util.find_spec(method.needs.package[0]) is None:
            continue
        place = tmp_path / name
        merge(models, place, method=name, base=base, coefficients=coefficients)
        if not method.needs.normalised:
            continue
        merge(models, tmp_path / f"{name} by ratios", method=name, base=base, coefficients=ratios)
        expected, found = state(tmp_path / f"{name} by ratios"), state(place)
        for tensor in expected:
            assert torch.allclose(found[tensor], expected[tensor], rtol=1e-3, atol=1e-4), (name, tensor)


def test_who_cannot_take_negative_coefficients_says_who_can(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, fisher="expected", kfac="expected")
    for name, method in WEIGHING.items():
        if method.needs.signed and not method.needs.normalised:
            try:
                merge(models, tmp_path / name, method=name, base=base, coefficients=[1, -1])
            except UserError as error:  # it treats the weights of layers alone
                assert "no average" in str(error) and "--keep-separate" in str(error)
            continue
        with pytest.raises(UserError, match="sum to zero" if method.needs.normalised else "negative") as caught:
            merge(models, tmp_path / name, method=name, base=base, coefficients=[1, -1])
        assert "task_arithmetic" in str(caught.value)


def test_what_task_vectors_leave_to_the_average_is_refused_where_there_is_none(family: Family, tmp_path: Path) -> None:
    """The base has no such head; the mend that is offered works."""
    base, models = family("bert", 2, statistics=False)
    stored = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith("classifier")}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"method": "task_arithmetic", "base": base, "coefficients": [1, -1]}
    with pytest.raises(UserError, match="classifier") as caught:
        merge(models, tmp_path / "out", **settings)
    assert "--keep-separate" in str(caught.value)
    with pytest.raises(UserError, match="sum to zero"):
        merge(models, tmp_path / "out", exclude=["*pooler*"], keep_separate=["classifier*"], **settings)
    merge(models, tmp_path / "out", keep_separate=["classifier*"], **settings)


def test_rows_of_one_contributor_need_its_coefficient(
    tmp_path: Path, save_model: Callable[..., Path], family: Family
) -> None:
    models = []
    for seed, labels in enumerate((["sad", "glad", "angry"], ["glad", "sad", "calm"])):
        model = save_model(f"m{seed}", "bert", seed, num_labels=3)
        config = json.loads((model / "config.json").read_text())
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        (model / "config.json").write_text(json.dumps(config))
        models.append(model)
    with pytest.raises(UserError, match="belong to m1 alone"):
        merge(models, tmp_path / "out", method="simple", labels="union", coefficients=[1, 0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"scale": 1e39}, {"scale": float("inf")}, {"scale": float("nan")}])
def test_options_that_overflow(family: Family, tmp_path: Path, options: dict[str, float]) -> None:
    base, models = family("bert", 2, statistics=False)
    with pytest.raises(UserError, match="scale"):
        merge(models, tmp_path / "out", method="task_arithmetic", base=base, options=options)


def test_a_ridge_is_a_number(family: Family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    for ridge in (float("inf"), 1e300):
        with pytest.raises(UserError, match="ridge"):
            merge(models, tmp_path / "out", method="regmean", options={"ridge": ridge})


def test_ledgers_and_recipes(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, statistics=False)
    ledger.init(tmp_path / "ledger", base, method="simple")
    for wrong in (1e39, 1e-320, 0.0, float("inf")):
        with pytest.raises(UserError, match="coefficient"):
            ledger.add(tmp_path / "ledger", models[0], coefficient=wrong)
    ledger.add(tmp_path / "ledger", models[0], coefficient=0.3)
    ledger.add(tmp_path / "ledger", models[1], coefficient=-0.3)
    with pytest.raises(UserError, match="sum to zero"):
        ledger.solve(tmp_path / "ledger", tmp_path / "out")
    with pytest.raises(UserError, match=r"contributors\.0\.coefficient"):
        make_recipe({"contributors": [{"model": "a", "coefficient": "1" * 400 + "x"}]})
