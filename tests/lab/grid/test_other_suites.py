"""Each other suite through a tiny grid: generation (T5, GPT-2), entities, one's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.run import run_experiment

Trial = Callable[..., ExperimentConfig]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]


@pytest.mark.parametrize("architecture", ["t5", "gpt2"])
def test_emotion_as_generation(
    architecture: str, tmp_path: Path, trial: Trial, save_ready: Callable[..., Path]
) -> None:
    usual = trial()
    config = trial(
        suite={
            "name": f"emotion-{architecture}",
            "root": usual.suite.root,
            "limits": {"train": 20, "dev": 6, "test": 8},
        },
        pretrained={"model": str(save_ready(f"base-{architecture}", architecture)), "title": architecture},
        training={"epochs": 1, "max_steps": None, "learning_rate": 1e-3, "max_length": 28},
        contributors=["one", "two"],
        seeds=[1],
        methods=["simple", "regmean"],
        comparators=["individual", "ensemble"],
        statistics={"examples": 8},
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    found = rows_of(done.folder)
    assert {row["method"] for row in found} == {"simple", "regmean", "individual", "ensemble"}
    for row in found:
        assert all(score["metric"] == "macro_f1" for score in row["scores"].values())
    regmean = next(row for row in found if row["method"] == "regmean")
    assert regmean["provenance"]["tensors"]["regmean"] > 0


def test_entities(tmp_path: Path, save_ready: Callable[..., Path]) -> None:
    root = tmp_path / "ner"
    sentences = ["Anna\tB-PER\tx\nsaw\tO\tx\nParis\tB-LOC\tx\n", "Acme\tB-ORG\tx\nwas\tO\tx\ngood\tO\tx\n"]
    for name in ("one", "two", "far"):
        (root / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (root / name / f"{split}.conll").write_text("\n".join(sentences * 6))
    config = ExperimentConfig.model_validate(
        {
            "name": "ner",
            "suite": {"name": "ner", "root": str(root)},
            "pretrained": {"model": str(save_ready("base", "roberta")), "title": "tiny"},
            "training": {"epochs": 8, "learning_rate": 5e-3, "warmup": 0, "batch_size": 2},
            "contributors": ["one", "two"],
            "layout": "all",
            "methods": ["simple", "fisher", "regmean", "mats"],
            "comparators": ["individual", "ensemble", "multitask"],
            "tests": {"out_of_domain": ["far"]},
        }
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    individual = next(row for row in rows_of(done.folder) if row["kind"] == "individual")
    assert individual["scores"]["one"]["value"] > 0.5  # two sentences are learnt
    assert set(individual["scores"]["far"]["per_label"]) == {"PER", "LOC", "ORG"}


def test_ones_own_files_with_different_labels(tmp_path: Path, save_ready: Callable[..., Path]) -> None:
    for name, labels in (("one", ("up", "down")), ("two", ("down", "flat"))):
        (tmp_path / "own" / name).mkdir(parents=True)
        words = {"up": "good", "down": "bad", "flat": "food"}
        lines = [json.dumps({"text": f"the movie was {words[label]}", "label": label}) for label in labels]
        for split in ("train", "dev", "test"):
            (tmp_path / "own" / name / f"{split}.jsonl").write_text("\n".join(lines * 8) + "\n")
    config = ExperimentConfig.model_validate(
        {
            "name": "own",
            "suite": {"name": "text-classification", "root": str(tmp_path / "own")},
            "pretrained": {"model": str(save_ready("base", "distilbert")), "title": "tiny"},
            "training": {"epochs": 4, "learning_rate": 1e-2, "max_length": 16},
            "contributors": ["one", "two"],
            "layout": "pairs",
            "methods": ["simple", "regmean", "actmat", "mats"],
            "comparators": ["individual", "ensemble"],
        }
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    assert len(rows_of(done.folder)) == 7


def test_the_real_corpora_are_read_as_the_small_configurations_say(resources: Path) -> None:
    from merganser.lab.grid.loading import load_config
    from merganser.lab.grid.planning import plan_experiment

    folder = Path(__file__).parents[3] / "experiments" / "small"
    for path in (path for path in sorted(folder.glob("*.yaml")) if "layout:" in path.read_text()):
        config = load_config([path], templates={"resources": str(resources), "base": os.devnull})
        from merganser.lab.grid.data import Data

        data = Data(config.suite)
        for name in config.contributors:
            limit = config.suite.limits.train or 10**9
            assert 0 < len(data.rows(config.set_of(name), "train")) <= limit
            assert len(data.rows(config.set_of(name), "dev")) > 20
        for name in config.tests.out_of_domain:
            assert len(data.rows(name, config.tests.out_split)) > 100
        assert plan_experiment(config, results="none", zoo="none")
