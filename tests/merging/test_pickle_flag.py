"""Pickled weights are read where the person who runs the command says so, and no file can say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merganser.cli import main
from merganser.engines import SerialEngine
from merganser.errors import UserError
from merganser.lab.grid.loading import load_config
from merganser.merging import RunSettings, carry_out, ledger, make_plan, make_recipe, merge, prepare, reproduce, verify

Family = Callable[..., tuple[Path, list[Path]]]


def pickle_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture
def pickled(family: Family) -> tuple[Path, list[Path]]:
    base, models = family("bert", 2, statistics=False)
    pickle_weights(models[1])
    return base, models


def run(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("value", [True, False, "yes", 1, None])
def test_no_recipe_sets_it(
    pickled: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    _, models = pickled
    values = {"contributors": [str(model) for model in models], "method": "simple"}
    for wrong in ({**values, "allow_pickle": value}, {**values, "allow_pickle": value, "methd": 1}):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
        for flags in ([], ["--allow-pickle"]):
            assert run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", *flags) == 2
            assert "--allow-pickle" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    assert run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--allow-pickle") == 0


def test_no_record_sets_it(pickled: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """What was allowed for the merge is not in its record, and an edited record allows nothing."""
    _, models = pickled
    out = tmp_path / "out"
    merge(models, out, method="simple", allow_pickle=True)
    record = out / "provenance.json"
    assert "allow_pickle" not in record.read_text()
    found = json.loads(record.read_text())
    for spoiled in (found, {**found, "recipe": {**found["recipe"], "allow_pickle": True}}):
        record.write_text(json.dumps(spoiled))
        with pytest.raises(UserError, match="pickled"):
            reproduce(out)
    record.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert "pickled" in " ".join(verify(out).absent)
    assert verify(out, allow_pickle=True).absent == () and reproduce(out, allow_pickle=True) == []
    assert run("reproduce", out) == 2 and run("reproduce", out, "--allow-pickle") == 0


def test_the_flag_reaches_every_place(pickled: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = pickled
    recipe = make_recipe({"contributors": [str(model) for model in models], "method": "simple"})
    settings = RunSettings.make(engine=SerialEngine(), allow_pickle=True)
    carry_out(prepare(recipe, tmp_path / "jobs", settings), tmp_path / "jobs")
    plan = make_plan(recipe, allow_pickle=True)
    with pytest.raises(UserError, match="pickled"):
        prepare(plan, tmp_path / "no")
    carry_out(prepare(plan, tmp_path / "plan", RunSettings.make(allow_pickle=True)), tmp_path / "plan")
    pickle_weights(base)
    with pytest.raises(UserError, match="pickled"):
        merge(models[:1], tmp_path / "no", method="ties", base=base)
    merge(models, tmp_path / "ties", method="ties", base=base, allow_pickle=True)
    with pytest.raises(UserError, match="pickled"):
        ledger.init(tmp_path / "ledger", base, method="simple")
    ledger.init(tmp_path / "ledger", base, method="simple", allow_pickle=True)
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be had"):
            ledger.add(tmp_path / "ledger", models[1])
    ledger.add(tmp_path / "ledger", models[1], allow_pickle=True)
    ledger.solve(tmp_path / "ledger", tmp_path / "solved", allow_pickle=True)


@pytest.mark.parametrize("place", ["", "pretrained", "default_model_args", "methods"])
def test_no_experiment_sets_it(tmp_path: Path, place: str) -> None:
    values: dict[str, Any] = {
        "name": "x",
        "suite": {"name": "emotion", "root": str(tmp_path)},
        "pretrained": {"model": "m", "title": "M"},
        "contributors": ["a", "b"],
        "layout": "pairs",
        "methods": [{"method": "simple"}],
    }
    inner = values if not place else values.setdefault(place, {})
    (inner[0] if isinstance(inner, list) else inner)["allow_pickle"] = True
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="allow_pickle"):
        load_config([tmp_path / "grid.yaml"])
