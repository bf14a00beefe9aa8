"""Whole tiny grids from end to end: resumed, failing in part, reported on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from merganser.engines import Job, Outcome, SerialEngine
from merganser.errors import DataError, UserError
from merganser.lab.grid.cells import expand
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.jobs import is_there, unique_needs
from merganser.lab.grid.models import Models
from merganser.lab.grid.planning import plan_experiment
from merganser.lab.grid.run import run_experiment
from merganser.lab.zoo import Zoo
from merganser.tasks.models import load_model, load_tokenizer, open_model

Trial = Callable[..., ExperimentConfig]


class Stopping(SerialEngine):
    """Dies after some jobs, as a killed process does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def run(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        for outcome in super().run(jobs, function):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield outcome


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what may differ between two runs."""
    kept = {k: v for k, v in row["provenance"].items() if k not in ("seconds", "finished")}
    merged = {"merged": {**row["merged"], "seconds": 0}} if "merged" in row else {}
    return {**row, **merged, "provenance": kept}


def test_a_grid_of_pairs_killed_and_resumed_ends_with_the_same_rows(tmp_path: Path, trial: Trial) -> None:
    config = trial(heads=["same", "different"], comparators=["individual", "ensemble"])
    whole = run_experiment(config, results=tmp_path / "a", zoo=tmp_path / "zoo-a")
    assert whole.failures == () and whole.cells == whole.done == len(expand(config))
    for after in (3, 9):  # while models are made, while cells are
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, results=tmp_path / "b", zoo=tmp_path / "zoo-b", engine=Stopping(after))
    before = set(rows_of(tmp_path / "b" / "trial"))
    again = run_experiment(config, results=tmp_path / "b", zoo=tmp_path / "zoo-b")
    assert again.done == again.cells - len(before)
    first, second = rows_of(whole.folder), rows_of(again.folder)
    assert {k: timeless(v) for k, v in first.items()} == {k: timeless(v) for k, v in second.items()}
    nothing = run_experiment(config, results=tmp_path / "b", zoo=tmp_path / "zoo-b")
    assert nothing.done == 0 and nothing.cells == again.cells
    check_rows(config, first)


def check_rows(config: ExperimentConfig, rows: Mapping[str, dict[str, Any]]) -> None:
    names = [(tuple(r["contributors"]), r["method"], r["seed"], r["heads"]) for r in rows.values()]
    assert len(set(names)) == len(names)
    for row in rows.values():
        used = row["provenance"]["tensors"]
        if row["kind"] == "merge":  # mistake 1: the method that was asked for was really used
            wanted = {"simple": "simple", "regmean": "regmean"}[row["method"]]
            assert used[wanted] > 0
            if row["method"] == "regmean":
                assert used["regmean"] > used.get("average", 0)
                assert all(one["statistics"] for one in row["provenance"]["contributors"])
        for score in row["scores"].values():
            assert 0 <= score["value"] <= 1
        inside = [s["value"] for s in row["scores"].values() if s["domain"] == "in"]
        assert row["average"]["in"] == pytest.approx(np.mean(inside))


def test_scores_are_those_of_an_independent_computation(tmp_path: Path, trial: Trial) -> None:
    """An individual model's row against transformers and scikit-learn alone."""
    config = trial(seeds=[1], methods=["simple"])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    row = next(
        r for r in rows_of(done.folder).values() if r["method"] == "individual" and r["contributors"] == ["three"]
    )
    zoo = Zoo(tmp_path / "zoo")
    entry = zoo.get(Models(config, zoo).key(expand(config)[0].contributors[0].__class__("three", "three", 1)))
    assert entry is not None and row["provenance"]["contributors"][0]["zoo"] == entry.id
    opened = open_model(entry.path)
    tokenizer, model = load_tokenizer(opened), load_model(opened, "AutoModelForSequenceClassification")
    lines = (tmp_path / "emotion_splits" / "three" / "test.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = list(model.config.id2label.values())
    found = []
    for label in ("anger", "fear", "sadness"):
        column = names.index(label)
        said = [
            float(model(**tokenizer(r["text"], return_tensors="pt")).logits[0, column].sigmoid()) > 0.5 for r in records
        ]
        found.append(f1_score([r["emotions"][label] for r in records], said, zero_division=0))
    assert row["scores"]["three"]["value"] == pytest.approx(np.mean(found))
    assert row["scores"]["three"]["per_label"]["fear"] == pytest.approx(found[1])


def test_prepared_a_grid_has_what_it_needs_and_no_rows(tmp_path: Path, trial: Trial) -> None:
    config = trial(seeds=[1], methods=["simple", "fisher"])
    places = {"results": tmp_path / "results", "zoo": tmp_path / "zoo"}
    done = run_experiment(config, only_prepare=True, **places)
    assert (done.done, done.cells, done.failures) == (0, 0, ())
    models = Models(config, Zoo(tmp_path / "zoo"))
    assert all(is_there(models, need) for need in unique_needs(config, expand(config)))


def test_a_greedy_grid_computes_its_order_on_development_data(tmp_path: Path, trial: Trial) -> None:
    config = trial(layout="greedy", seeds=[1], comparators=["individual", "ensemble", "multitask"])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    order = json.loads((done.folder / "order.json").read_text())
    rows = rows_of(done.folder).values()
    merged = sorted((r for r in rows if r["method"] == "regmean"), key=lambda r: len(r["contributors"]))
    assert [r["contributors"] for r in merged] == [order["order"][:2], order["order"]]
    assert order["scores"][order["order"][0]] == max(order["scores"].values())
    assert next(r for r in rows if r["kind"] == "multitask")["scores"].keys() == {"one", "two", "three", "far"}
    assert not (done.folder / "sums").exists()
    plan = plan_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert all(line.cached for line in plan.lines)


def test_search_chooses_on_development_data_only(tmp_path: Path, trial: Trial) -> None:
    """Mistake 7: coefficients selected on the set that is reported."""
    methods = ["simple", {"method": "simple", "title": "searched", "search": {"grid": 3}}]
    config = trial(seeds=[1], contributors=["one", "two"], methods=methods, comparators=[])
    first = run_experiment(config, results=tmp_path / "a", zoo=tmp_path / "zoo")
    assert first.failures == ()
    chosen = next(r["chosen"] for r in rows_of(first.folder).values() if r["method"] == "searched")
    assert len(chosen["candidates"]) == 3 and chosen["by"] == "dev"
    assert chosen["candidates"][chosen["best"]]["dev"] == max(c["dev"] for c in chosen["candidates"])
    for name in ("one", "two"):  # other test sets must not change the choice
        path = tmp_path / "emotion_splits" / name / "test.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    from merganser.lab.grid.data import data_of

    data_of.cache_clear()
    second = run_experiment(config, results=tmp_path / "b", zoo=tmp_path / "zoo")
    again = next(r["chosen"] for r in rows_of(second.folder).values() if r["method"] == "searched")
    assert again == chosen


def test_a_job_that_fails_leaves_the_others(tmp_path: Path, trial: Trial) -> None:
    """Damaged statistics: the cells that need none are there all the same, and the others are errors."""
    config = trial(seeds=[1], contributors=["one", "two"], comparators=[], methods=["simple", "regmean"])
    zoo = Zoo(tmp_path / "zoo")
    run_experiment(
        trial(seeds=[1], contributors=["one", "two"], comparators=[], methods=["simple"]),
        results=tmp_path / "x",
        zoo=tmp_path / "zoo",
    )
    for entry in zoo.ls():  # weights that differ from what the statistics will be of
        for file in entry.path.glob("statistics/*"):
            file.unlink()
    models = Models(config, zoo)
    path = models.statistics(expand(config)[0].contributors[0], "gram")
    path.write_bytes(path.read_bytes()[:100])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.done == 1 and any("regmean" in failure.job for failure in done.failures)
    assert all("statistics" in failure.error for failure in done.failures)
    assert [r["method"] for r in rows_of(done.folder).values()] == ["simple"]


def test_missing_data_and_models_are_said_before_any_work(tmp_path: Path, trial: Trial) -> None:
    config = trial(
        contributors=["one", "gone"], pretrained={"model": "org/nowhere", "title": "x", "architecture": "bert"}
    )
    with pytest.raises(UserError) as caught:
        run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    said = str(caught.value)
    assert "gone" in said and "train.jsonl" in said
    assert "hf download org/nowhere" in said
    assert not (tmp_path / "r").exists()


def test_a_results_folder_of_another_version_is_left_alone(tmp_path: Path, trial: Trial) -> None:
    folder = tmp_path / "r" / "trial"
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        run_experiment(trial(), results=tmp_path / "r", zoo=tmp_path / "zoo")
    (folder / "experiment.json").unlink()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="something else"):
        run_experiment(trial(), results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_rows_of_pairs_do_not_overwrite_each_other(trial: Trial, tmp_path: Path) -> None:
    """Mistake 7, second half: every cell has a name of its own."""
    from merganser.lab.grid.compute import cell_id

    config = trial(heads=["same", "different"], layout="pairs")
    models = Models(config, Zoo(tmp_path / "zoo"))
    cells = expand(config)
    assert len({cell_id(models, cell) for cell in cells}) == len(cells)


def test_glue_pairs_keep_their_heads(tmp_path: Path, save_ready: Callable[..., Path]) -> None:
    root = tmp_path / "glue"
    for task, rows in {
        "cola": [{"sentence": f"the movie was {w}", "label": int(w == "good")} for w in ("good", "bad")],
        "stsb": [
            {"sentence1": "the food", "sentence2": w, "label": s} for w, s in (("the food", 5.0), ("Anna no", 0.4))
        ],
    }.items():
        (root / task).mkdir(parents=True)
        for split, times in (("train", 20), ("validation", 6)):
            (root / task / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * times))
    config = ExperimentConfig.model_validate(
        {
            "name": "pairs",
            "suite": {"name": "glue", "root": str(root)},
            "pretrained": {"model": str(save_ready("base", "bert")), "title": "tiny"},
            "training": {"epochs": 1, "learning_rate": 1e-3, "max_length": 16},
            "statistics": {"examples": 8, "fisher_examples": 4},
            "contributors": ["cola", "stsb"],
            "layout": "pairs",
            "heads": "separate",
            "methods": [
                "simple",
                "fisher",
                "regmean",
                "ot",
                {"method": "simple", "title": "tuned", "finetune": {"examples": 4, "training": {"epochs": 1}}},
            ],
            "comparators": ["individual", "multitask"],
        }
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    rows = {row["method"]: row for row in rows_of(done.folder).values() if row["kind"] != "individual"}
    assert set(rows) == {"simple", "fisher", "regmean", "ot", "tuned", "multitask"}
    for row in rows.values():
        assert row["scores"]["cola"]["metric"] == "matthews" and row["scores"]["stsb"]["metric"] == "pearson"
    assert rows["regmean"]["provenance"]["tensors"]["kept separate"] == 4


def test_every_test_of_a_fine_tuned_merge_is_of_the_fine_tuned_model(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[tuple[str, str], str] = {}
    predict_all = Models.predict_all

    def listening(models: Models, reference: str | Path, tests: list[tuple[str, str]]) -> Any:
        asked.update(dict.fromkeys(tests, Path(reference).name))
        return predict_all(models, reference, tests)

    monkeypatch.setattr(Models, "predict_all", listening)
    methods = [{"method": "simple", "finetune": {"examples": 4}}]
    config = trial(contributors=["one", "two"], methods=methods, comparators=[], seeds=[1])
    assert run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo").failures == ()
    assert asked == dict.fromkeys([("one", "test"), ("two", "test"), ("far", "all")], "finetuned")


def test_an_option_that_asks_for_the_base_gets_it(tmp_path: Path, trial: Trial) -> None:
    methods = [{"method": "nuslerp", "options": {"task_vectors": True}}]
    config = trial(contributors=["one", "two"], methods=methods, comparators=[], seeds=[1])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    assert [row["merged"]["base"] for row in rows_of(done.folder).values()] == [True]


def test_partitions(tmp_path: Path, save_ready: Callable[..., Path]) -> None:
    root = tmp_path / "glue"
    (root / "sst2").mkdir(parents=True)
    rows = [{"sentence": f"the movie was {w}", "label": int(w == "good")} for w in ("good", "bad")] * 40
    for split in ("train", "validation"):
        (root / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = ExperimentConfig.model_validate(
        {
            "name": "parts",
            "suite": {"name": "glue", "root": str(root)},
            "pretrained": {"model": str(save_ready("base", "bert")), "title": "tiny"},
            "training": {"epochs": 1, "learning_rate": 1e-3, "max_length": 16, "best_epoch": False},
            "statistics": {"examples": 8},
            "contributors": ["sst2"],
            "layout": "partitions",
            "partitions": {"parts": 2, "total": 40},
            "methods": ["simple", "regmean"],
            "comparators": ["individual", "ensemble"],
        }
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    found = rows_of(done.folder).values()
    assert sorted(r["method"] for r in found) == ["ensemble", "individual", "individual", "regmean", "simple"]
    assert {tuple(r["contributors"]) for r in found if r["method"] == "simple"} == {("sst2/1", "sst2/2")}
