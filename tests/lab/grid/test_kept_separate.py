"""What contributors keep beside their heads, and contributors that are adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.lab.grid.cells import expand
from merganser.lab.grid.compute import cell_id, merge_cell
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.models import Models
from merganser.lab.grid.run import run_experiment
from merganser.lab.zoo import Zoo, id_of

Trial = Callable[..., ExperimentConfig]
SEPARATE: dict[str, Any] = {
    "contributors": ["one", "two"], "layout": "all", "heads": "separate", "seeds": [1], "tests": {}
}  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]


def test_a_pooler_is_kept_beside_the_head(tmp_path: Path, trial: Trial) -> None:
    tuned = {"method": "simple", "finetune": {"examples": 4}}
    config = trial(
        **SEPARATE, separate="*pooler*", methods=["simple", "regmean", tuned], comparators=["individual", "multitask"]
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == () and len(rows_of(done.folder)) == 2 + 1 + 3
    models = Models(config, Zoo(tmp_path / "zoo"))
    merge = next(cell for cell in expand(config) if cell.kind == "merge")
    output = Path(merge_cell(models, merge, [1.0, 1.0], tmp_path / "merged"))
    for spec in merge.contributors:
        own = load_file(models.model(spec).path / "model.safetensors")
        kept = open_checkpoint(output / "heads" / spec.name)
        for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"):
            assert own[name].equal(kept.read(name))
        inside = "bert.encoder.layer.0.output.dense.weight"
        assert not own[inside].equal(kept.read(inside))
    several = models.multitask(next(cell for cell in expand(config) if cell.kind == "multitask")).path
    one, two = (load_file(several / name / "model.safetensors") for name in ("one", "two"))
    assert {name for name in one if not one[name].equal(two[name])} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip


def test_models_keep_their_names_and_merges_have_others(tmp_path: Path, trial: Trial) -> None:
    usual, kept = trial(**SEPARATE), trial(**SEPARATE, separate=["*pooler*"])
    models, others = (Models(config, Zoo(tmp_path / "zoo")) for config in (usual, kept))
    for cell, other in zip(expand(usual), expand(kept), strict=True):
        same = [id_of(models.key(spec)) == id_of(others.key(spec)) for spec in cell.contributors]
        assert all(same) and (cell_id(models, cell) == cell_id(others, other)) == (cell.kind != "merge")


def test_mistakes_in_what_is_kept(tmp_path: Path, trial: Trial) -> None:
    with pytest.raises(ValidationError, match="heads: separate is not"):
        trial(separate=["*pooler*"])
    with pytest.raises(UserError, match=r"separate: no tensor .* called '\*poolar\*'"):
        run_experiment(trial(**SEPARATE, separate=["*poolar*"]), results=tmp_path / "r", zoo=tmp_path / "zoo")


@pytest.mark.parametrize("heads", ["same", "separate"])
def test_adapters_through_a_grid(heads: str, tmp_path: Path, trial: Trial) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'merganser[train]'")
    training = {"epochs": 2, "learning_rate": 1e-2, "max_length": 16, "lora": {"rank": 2, "alpha": 4}}
    methods = ["simple", "task_arithmetic", "ties", "knots", "regmean", "fisher", "actmat", "mats"]
    tuned = {"method": "simple", "finetune": {"examples": 4}}
    comparators = ["individual", "multitask", *(["ensemble"] if heads == "same" else [])]
    values = {**SEPARATE, "heads": heads, "training": training, "comparators": comparators}
    config = trial(**values, methods=[*methods, tuned])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    rows = rows_of(done.folder)
    assert len(rows) == 2 + len(comparators) - 1 + len(methods) + 1
    for row in rows:
        if row["method"] in methods:
            assert row["provenance"]["tensors"][row["method"]] > 0, row["method"]
    models = Models(config, Zoo(tmp_path / "zoo"))
    for spec in expand(config)[0].contributors:
        assert (models.model(spec).path / "adapter_model.safetensors").is_file()
        assert models.key(spec)["training"]["lora"]["rank"] == 2
    assert "lora" not in Models(trial(), Zoo(tmp_path / "zoo")).key(expand(trial())[0].contributors[0])["training"]
