"""A grid's device reaches everything that computes, and pickled models are accepted by flag alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merganser.lab.grid.checks as grid_checks
import merganser.lab.grid.compute as grid_compute
import merganser.lab.grid.models as grid_models
from merganser.errors import UserError
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.models import Models
from merganser.lab.grid.planning import plan_experiment
from merganser.lab.grid.run import run_experiment
from merganser.lab.zoo import Zoo

Trial = Callable[..., ExperimentConfig]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The devices that training, collecting, merging and predicting are told of; they compute on the CPU."""
    told: dict[str, set[str]] = {}

    def listening(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, device: str, **options: Any) -> Any:
            told.setdefault(name, set()).add(device)
            return original(*args, device="cpu", **options)

        monkeypatch.setattr(module, name, call)

    for name in ("train", "train_multitask", "collect"):
        listening(grid_models, name)
    for name in ("train_multitask", "merge"):
        listening(grid_compute, name)
    to = torch.nn.Module.to

    def move(self: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        if args and args[0] == "cuda":
            told.setdefault("predict", set()).add("cuda")
            return self
        return to(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    return told


def test_a_gpu_is_used_for_everything_where_there_is_one(
    tmp_path: Path, trial: Trial, devices: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = {"method": "simple", "title": "tuned", "finetune": {"examples": 4, "training": {"epochs": 1}}}
    config = trial(
        seeds=[1],
        contributors=["one", "two"],
        methods=["simple", "fisher", "regmean", tuned],
        comparators=["individual", "ensemble", "multitask"],
    )
    monkeypatch.setattr(grid_models, "choose_device", lambda wanted: "cuda" if wanted == "auto" else wanted)
    monkeypatch.setattr(grid_checks, "_check_device", lambda models: None)
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    assert devices == {
        "train": {"auto"}, "train_multitask": {"auto"}, "collect": {"cuda"}, "merge": {"cuda"}, "predict": {"cuda"},
    }  # fmt: skip


def test_the_cpu_is_used_where_it_is_asked_for(
    tmp_path: Path, trial: Trial, devices: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trial(seeds=[1], contributors=["one", "two"], resources={"device": "cpu"})
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    assert set().union(*devices.values()) == {"cpu"}


def as_pickle(folder: Path) -> Path:
    """The same model folder with its weights in pytorch_model.bin alone."""
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def test_a_pickled_base_and_a_pickled_model_of_ones_own(
    tmp_path: Path, trial: Trial, save_ready: Callable[..., Path]
) -> None:
    """Refused with a mend that works, or, where they are allowed, the same cells as with safetensors."""
    usual = trial(seeds=[1], contributors=["one", "two"], methods=["simple", "regmean", "actmat"])
    plain = run_experiment(usual, results=tmp_path / "plain", zoo=tmp_path / "zoo-plain")
    models = Models(usual, Zoo(tmp_path / "zoo-plain"))
    own = {e.key["set"]: e.path for e in models.zoo.ls()}["one"]
    copied = tmp_path / "own"
    copied.mkdir()
    for file in own.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    base = as_pickle(Path(usual.pretrained.model))
    people = {"one": {"checkpoint": str(as_pickle(copied))}, "two": {}}
    config = usual.model_copy(update={"contributors": trial(seeds=[1], contributors=people).contributors})
    places: dict[str, Any] = {"results": tmp_path / "pickled", "zoo": tmp_path / "zoo-pickled"}
    with pytest.raises(UserError, match=r"(?s)2 problems.*--allow-pickle"):
        run_experiment(config, **places)
    assert len(plan_experiment(config, **places).problems) == 2
    done = run_experiment(config, **places, allow_pickle=True)
    assert done.failures == () and done.cells == plain.cells
    scores = [
        sorted((row["method"], row["contributors"], json.dumps(row["scores"])) for row in rows)
        for rows in (
            [json.loads(path.read_text()) for path in (one.folder / "cells").iterdir()] for one in (plain, done)
        )
    ]
    assert scores[0] == scores[1]
    for entry in Zoo(tmp_path / "zoo-pickled").ls():  # nothing that needs a pickle is left
        assert (entry.path / "model.safetensors").is_file() and not list(entry.path.glob("*.bin"))
    assert base.is_dir()


def test_weights_in_half_precision_are_trained_in_float32_and_said(
    tmp_path: Path, trial: Trial, caplog: pytest.LogCaptureFixture
) -> None:
    config = trial(seeds=[1], contributors=["one", "two"], methods=["simple"])
    base = Path(config.pretrained.model)
    from safetensors.torch import save_file

    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert any("float16" in remark for remark in plan_experiment(config, results="r", zoo=tmp_path / "z").remarks)
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "z")
    assert done.failures == () and "float16 are trained, and saved, in float32" in caplog.text
    for entry in Zoo(tmp_path / "z").ls():
        assert all(t.dtype == torch.float32 for t in load_file(entry.path / "model.safetensors").values())
        assert json.loads((entry.path / "config.json").read_text())["dtype"] == "float32"
