"""Cells, models and failures are known once: filtered runs add to a full one, and nothing is made twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import merganser.lab.grid.models as grid_models
from merganser.lab.grid.cells import expand
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.loading import load_config
from merganser.lab.grid.models import Models
from merganser.lab.grid.planning import plan_experiment
from merganser.lab.grid.run import Finished, run_experiment
from merganser.lab.zoo import Zoo

Trial = Callable[..., ExperimentConfig]
ALL = ["individual", "ensemble", "multitask"]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts trainings by their output's folder and collections by their label."""
    counts: Counter[str] = Counter()

    def counted(name: str, key: Callable[[dict[str, Any]], str]) -> None:
        original = getattr(grid_models, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[key(options)] += 1
            return original(*args, **options)

        monkeypatch.setattr(grid_models, name, call)

    counted("train", lambda options: f"train {options['seed']}")
    counted("train_multitask", lambda options: "multitask")
    counted("collect", lambda options: f"{'gram' if options['grams'] else 'fisher'} {options['label']}")
    return counts


def filtered(config: ExperimentConfig, folder: Path, *keep: str) -> ExperimentConfig:
    """The configuration with some contributors only, as --filter-model makes it."""
    path = folder / "whole.yaml"
    values = config.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config([path], keep=keep)


def cells_of(done: Finished) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (done.folder / "cells").iterdir()}


@pytest.mark.parametrize("layout", ["pairs", "greedy"])
def test_filtered_runs_add_to_a_full_one_and_evict_nothing(
    layout: str, tmp_path: Path, trial: Trial, work: Counter[str]
) -> None:
    config = trial(layout=layout, heads=["same", "different"], comparators=["individual", "ensemble"])
    places = {"results": tmp_path / "r", "zoo": tmp_path / "zoo"}
    full = run_experiment(config, **places)
    before, trained = cells_of(full), dict(work)
    pair = run_experiment(filtered(config, tmp_path, "three", "one"), **places)
    assert pair.failures == () and before.items() <= cells_of(pair).items()
    if layout == "pairs":
        assert pair.done == 0 and cells_of(pair) == before  # found by content, in whatever order they are named
    again = run_experiment(config, **places)
    assert again.done == 0 and again.cells == full.cells == len(expand(config))
    assert dict(work) == trained


def test_pair_by_pair_and_seed_by_seed_is_the_full_run(tmp_path: Path, trial: Trial, work: Counter[str]) -> None:
    config = trial(heads=["same", "different"], comparators=ALL)
    places = {"results": tmp_path / "r", "zoo": tmp_path / "zoo"}
    done = 0
    for pair in (("one", "two"), ("three", "one"), ("two", "three")):
        done += run_experiment(filtered(config, tmp_path, *pair), **places).done
    whole = run_experiment(config, **places)
    assert whole.failures == () and whole.done == 0 and done == whole.cells == len(expand(config))
    assert sum(n for name, n in work.items() if name.startswith("train")) == 6  # three models, two seeds
    assert work["multitask"] == 6  # three pairs, two seeds, whatever their heads
    one = trial(seeds=[1], comparators=ALL)
    assert run_experiment(one, **places).done == 0  # the same cells with another list of seeds


def test_a_training_that_diverges_is_tried_once_and_named_once(
    tmp_path: Path, trial: Trial, work: Counter[str]
) -> None:
    bad = {"training": {"learning_rate": 1e30}}
    config = trial(seeds=[7], contributors={"one": {}, "two": bad, "three": {}}, comparators=["individual"])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert work["train 7"] == 3
    (failure,) = done.failures
    assert failure.job == "model two (seed 7)" and "diverged" in failure.error
    assert failure.cells == 1 + 2 * 2  # its own, and two pairs by two methods
    assert done.cells == done.done == len(expand(config)) - failure.cells
    assert work["gram emotion/two"] == 0


def test_a_greedy_grid_without_one_of_its_models_scores_the_others(
    tmp_path: Path, trial: Trial, work: Counter[str]
) -> None:
    bad = {"training": {"learning_rate": 1e30}}
    config = trial(layout="greedy", seeds=[7], contributors={"one": {}, "two": bad, "three": {}})
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert work["train 7"] == 3 and len(done.failures) == 1
    rows = [json.loads(text) for text in cells_of(done).values()]
    assert sorted(row["contributors"][0] for row in rows) == ["one", "three"]
    assert done.failures[0].cells == 5  # its own, and two numbers of models by two methods


def test_statistics_that_cannot_be_collected_are_tried_once(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merganser.errors import StatisticsError

    tried: Counter[str] = Counter()

    def fail(*args: Any, **options: Any) -> None:
        tried[options["label"]] += 1
        raise StatisticsError("the gradient is infinite")

    monkeypatch.setattr(grid_models, "collect", fail)
    config = trial(seeds=[1], methods=["simple", "fisher"], comparators=["individual"])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert set(tried.values()) == {1} and len(tried) == 3
    assert [f.job for f in done.failures] == [
        f"Fisher information of {name} (seed 1), for fisher" for name in ("one", "two", "three")
    ]
    assert sum(failure.cells for failure in done.failures) == 3
    assert done.cells == 3 + 3  # individuals and averages


def test_options_of_scoring_alone_train_nothing_again(tmp_path: Path, trial: Trial, work: Counter[str]) -> None:
    """Also where the best epoch is chosen: it is chosen by the suite's own rule."""
    usual = trial(seeds=[1], contributors=["one", "two"], methods=["simple"])
    training = {**usual.training, "best_epoch": True}
    places = {"results": tmp_path / "r", "zoo": tmp_path / "zoo"}
    found: list[dict[str, Any]] = []
    for options in ({}, {"threshold": 0.01}, {"threshold_on": "logit"}):
        config = trial(
            seeds=[1],
            contributors=["one", "two"],
            methods=["simple"],
            suite={**usual.suite.model_dump(), "options": options},
            training=training,
        )
        folder = tmp_path / "r" / "trial" / "cells"
        before = {path.name for path in folder.glob("*")}
        done = run_experiment(config, **places)
        assert done.done == done.cells == 3  # each way of scoring has rows of its own
        new = [json.loads(text) for name, text in cells_of(done).items() if name not in before]
        found.append({row["method"] + "+".join(row["contributors"]): row["scores"] for row in new})
    assert work["train 1"] == 2
    assert found[0] != found[1]


def test_another_limit_of_the_training_data_is_another_partition(
    tmp_path: Path, trial: Trial, save_ready: Callable[..., Path]
) -> None:
    """What rows record is what was done: limits.train counts for parts of a data set as well."""
    config = trial(
        layout="partitions",
        partitions={"parts": 2, "total": 1000, "iid": True},
        suite={"name": "text-classification", "root": str(write_texts(tmp_path)), "limits": {"train": 30}},
        contributors=["one"],
        seeds=[3],
        methods=["simple"],
        tests={},
    )
    models = Models(config, Zoo(tmp_path / "zoo"))
    first, second = (models.rows(spec) for spec in expand(config)[-1].contributors)
    assert len(first) + len(second) == 30
    limited = {row["text"] for row in models.data.rows("one", "train")}
    assert {row["text"] for row in (*first, *second)} == limited
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    rows = [json.loads(text) for text in cells_of(done).values()]
    merge = next(row for row in rows if row["kind"] == "merge")
    assert [person["examples"] for person in merge["provenance"]["contributors"]] == [15, 15]
    assert merge["sets"] == ["one", "one"] and merge["contributors"] == ["one/1", "one/2"]


def write_texts(folder: Path) -> Path:
    for split, count in (("train", 60), ("dev", 8), ("test", 8)):
        rows = [{"text": f"the movie {n} was {('good', 'bad')[n % 2]}", "label": "ab"[n % 2]} for n in range(count)]
        path = folder / "own" / "one" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own"


def test_models_that_are_not_loaded_are_trained_anew_once_for_these_results(
    tmp_path: Path, trial: Trial, work: Counter[str]
) -> None:
    usual = {"seeds": [1], "contributors": ["one", "two"], "methods": ["simple"]}
    zoo = tmp_path / "zoo"
    run_experiment(trial(**usual), results=tmp_path / "a", zoo=zoo)
    assert work["train 1"] == 2
    anew = trial(**usual, default_model_args={"load_from_zoo": "no"})
    plan = plan_experiment(anew, results=tmp_path / "b", zoo=zoo)
    assert [line.verb for line in plan.lines if line.what == "model" and not line.cached] == ["to train"] * 2
    first = run_experiment(anew, results=tmp_path / "b", zoo=zoo)
    assert work["train 1"] == 4 and first.failures == ()
    more = trial(**{**usual, "methods": ["simple", "regmean"]}, default_model_args={"load_from_zoo": "no"})
    assert all(line.cached for line in plan_experiment(anew, results=tmp_path / "b", zoo=zoo).lines)
    again = run_experiment(more, results=tmp_path / "b", zoo=zoo)
    assert again.done == 1 and work["train 1"] == 4  # the same results go on with the same models
    run_experiment(anew, results=tmp_path / "c", zoo=zoo)
    assert work["train 1"] == 6
    run_experiment(trial(**usual), results=tmp_path / "d", zoo=zoo)
    assert work["train 1"] == 6  # what others trained anew is not what everybody else loads
