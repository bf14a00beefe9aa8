"""A dry run: every input checked as a run does it, what is there and what is left, and a guess of the time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from merganser.cli import cli
from merganser.errors import UserError
from merganser.lab.grid.cells import expand
from merganser.lab.grid.config import ExperimentConfig, make_config
from merganser.lab.grid.planning import Plan, plan_experiment
from merganser.lab.grid.run import run_experiment

Trial = Callable[..., ExperimentConfig]


def plan(config: ExperimentConfig, folder: Path, **options: Any) -> Plan:
    return plan_experiment(config, results=folder / "r", zoo=folder / "zoo", **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"epochs": "x"}}, "training: epochs: .*number"),
        ({"training": {"epochz": 1}}, "unknown key 'epochz'.*did you mean 'epochs'"),
        ({"contributors": {"one": {"training": {"batch_size": 0}}, "two": {}}}, "contributors.*batch_size"),
        ({"methods": [{"method": "simple", "finetune": {"training": {"warmup": 2}}}]}, "finetune.training: warmup"),
        (
            {"training": {"schedule": "polynomial", "learning_rate": 1e-8}},
            "polynomial schedule falls to 1e-07.*1e-08 cannot fall.*linear",
        ),
        ({"contributors": ["one", "gone", "lost"]}, "no data sets 'gone', 'lost'.*found: far, one, three, two"),
        ({"tests": {"out_of_domain": ["farther"]}}, "no data set 'farther'"),
        ({"pretrained": {"model": "org/none", "title": "x", "architecture": "bert"}}, "hf download org/none"),
        ({"contributors": {"one": {"checkpoint": "/nowhere"}, "two": {}}}, "/nowhere"),
        ({"suite": {"name": "emotion", "root": "/nowhere"}}, "no data sets.*no such folder"),
        ({"suite": {"name": "emotion", "options": {"threshhold": 1}}}, "did you mean 'threshold'"),
        ({"resources": {"device": "cuda"}}, "torch finds no GPU"),
        ({"suite": {"name": "emotion", "options": {"threshold": "abc"}}}, "'threshold' is 'abc'.*a finite number"),
        ({"suite": {"name": "emotion", "options": {"threshold": True}}}, "'threshold' is True"),
        ({"suite": {"name": "text-classification", "options": {"label_names": 5}}}, "label_names is 5"),
        ({"methods": [{"method": "simple", "exclude": ["*.encodr.*"]}]}, "called '\\*\\.encodr"),
        ({"contributors": {"one": {"zoo_filter": {"trainig.epochs": 1}}, "two": {}}}, "did you mean 'training.epochs'"),
    ],
)
def test_what_a_run_refuses_a_dry_run_names_in_the_same_words(
    changes: dict[str, Any], said: str, tmp_path: Path, trial: Trial
) -> None:
    config = trial(seeds=[1], **changes)
    with pytest.raises(UserError, match=rf"(?s){said}") as caught:
        run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    found = plan(config, tmp_path)
    assert len(found.problems) == 1 and str(found.problems[0]) == str(caught.value)  # once, not once a cell
    assert len(found.lines) >= len(expand(config)) and not any(line.cached for line in found.lines)
    assert not (tmp_path / "r").exists() and not (tmp_path / "zoo").exists()


def test_what_a_pattern_may_mean(tmp_path: Path, trial: Trial) -> None:
    """Names of the pretrained model, and those of heads, which it does not have yet."""
    exclude = ["classifier.*", "bert.encoder.*", "*.bias"]
    assert not plan(trial(methods=[{"method": "simple", "exclude": exclude}]), tmp_path).problems


def test_models_of_ones_own_that_do_not_fit(tmp_path: Path, trial: Trial, save_model: Callable[..., Path]) -> None:
    other, few = save_model("other", "roberta"), save_model("few", "bert", num_labels=3)
    people = {"one": {"checkpoint": str(other)}, "two": {"checkpoint": str(few)}, "three": {}}
    text = " ".join(map(str, plan(trial(contributors=people), tmp_path).problems))
    assert "'roberta'" in text and "its head has 3 labels, two has 16" in text


def test_an_architecture_that_is_another(tmp_path: Path, trial: Trial) -> None:
    config = trial()
    pretrained = config.pretrained.model_copy(update={"architecture": "roberta"})
    (problem,) = plan(config.model_copy(update={"pretrained": pretrained}), tmp_path).problems
    assert "of type 'bert', not 'roberta'" in str(problem)


def test_a_zoo_that_is_a_file(tmp_path: Path, trial: Trial) -> None:
    (tmp_path / "zoo").write_text("")
    assert "no folder" in str(plan(trial(), tmp_path).problems[0])


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["simpel"], "did you mean 'simple'"),
        ([{"method": "regmean", "options": {"alhpa": 1}}], "did you mean 'alpha'"),
        ([{"method": "regmean", "options": {"alpha": 3}}], "less than or equal to 1"),
        ([{"method": "ties", "options": {"scale": 1e39}}], "beyond 1e\\+18"),
    ],
)
def test_methods_that_are_not_there(tmp_path: Path, methods: list[Any], said: str) -> None:
    values = {"name": "x", "suite": {"name": "emotion"}, "pretrained": {"model": "m", "title": "m"}}
    with pytest.raises(UserError, match=said) as caught:
        make_config({**values, "contributors": ["a", "b"], "layout": "pairs", "methods": methods}, "x.yaml")
    assert "problems" not in str(caught.value) and "at least 1 item" not in str(caught.value)


def test_several_mistakes_are_named_at_once(tmp_path: Path, trial: Trial) -> None:
    bad = {"one": {"training": {"epochs": -1}}, "two": {"training": {"batch_size": "many"}}, "gone": {}}
    found = plan(trial(contributors=bad, tests={"out_of_domain": ["farther"]}), tmp_path)
    said = [str(problem) for problem in found.problems]
    assert len(said) == 3
    for word in ("epochs", "batch_size", "'farther', 'gone'"):
        assert any(word in one for one in said), word


def test_a_row_with_a_label_that_cannot_be_read_is_found_before_work(tmp_path: Path, trial: Trial) -> None:
    config = trial()
    path = tmp_path / "emotion_splits" / "two" / "dev.jsonl"
    path.write_text(path.read_text() + '{"text": "a", "emotions": {"joy": "much"}}\n')
    assert "dev.jsonl:13" in str(plan(config, tmp_path).problems[0])


def test_what_is_there_and_what_is_left(tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.lab.grid import estimate as estimates

    rates = estimates._Rates(1e-6, 2e-6)  # what a busy machine measures twice may differ by more than the work
    monkeypatch.setattr(estimates, "_calibrate", lambda *arguments: rates)
    config = trial(seeds=[1], methods=["simple", "fisher", "regmean"], comparators=["individual", "multitask"])
    empty = plan(config, tmp_path)
    groups = {line.group: line.verb for line in empty.lines}
    assert groups == {
        "models": "to train", "multi-task models": "to train", "Gram matrices": "to collect",
        "Fisher information": "to collect", "Individual": "to do", "Multi-task": "to do", "Simple": "to do",
        "Fisher": "to do", "RegMean": "to do",
    }  # fmt: skip
    assert empty.problems == () and empty.estimate.seconds is not None and empty.estimate.seconds > 0
    assert "h training" in empty.estimate.reason
    part = config.model_copy(update={"methods": config.methods[:1], "comparators": ("individual",)})
    run_experiment(part, results=tmp_path / "r", zoo=tmp_path / "zoo")
    half = plan(config, tmp_path)
    there = {group for group in groups if all(line.cached for line in half.lines if line.group == group)}
    assert there == {"models", "Individual", "Simple"}
    assert half.estimate.seconds is not None and half.estimate.seconds < empty.estimate.seconds
    run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    whole = plan(config, tmp_path)
    assert all(line.cached for line in whole.lines) and whole.estimate.seconds == 0


def test_models_of_ones_own_are_copied_and_models_that_must_be_there_are_absent(tmp_path: Path, trial: Trial) -> None:
    from merganser.lab.zoo import Zoo

    usual = trial(seeds=[1], contributors=["one", "two"], methods=["simple"])
    run_experiment(usual, results=tmp_path / "x", zoo=tmp_path / "other")
    own = next(entry.path for entry in Zoo(tmp_path / "other").ls() if entry.key["set"] == "one")
    people = {"one": {"checkpoint": str(own)}, "two": {"load_from_zoo": "yes"}}
    config = trial(seeds=[1], contributors=people, methods=["simple"])
    found = plan(config, tmp_path)
    assert [line.verb for line in found.lines if line.what == "model"] == ["to copy", "to train"]
    assert [problem.what for problem in found.problems] == [
        "the zoo holds no model of two (seed 1) with these settings"
    ]
    maybe = trial(seeds=[1], contributors={**people, "two": {}}, methods=["simple"])
    run_experiment(maybe, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert all(line.cached for line in plan(config, tmp_path).lines)


def test_what_cannot_be_timed_is_said(tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    import merganser.lab.grid.estimate as estimates

    monkeypatch.setattr(estimates, "_MOST_PARAMETERS", 10)
    found = plan(trial(seeds=[1]), tmp_path)
    assert found.problems == () and found.estimate.seconds is None
    assert "could not be timed" in found.estimate.reason


def test_the_terminal_shows_a_line_a_group(tmp_path: Path, trial: Trial) -> None:
    config = trial(seeds=[1, 2, 3, 4], comparators=["individual", "ensemble", "multitask"])
    path = tmp_path / "trial.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    words = ["experiment", str(path), "--dry-run", "--zoo", str(tmp_path / "z"), "--results", str(tmp_path / "r")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) < 25
    assert "12 models (12 to train)" in " ".join(result.stdout.split())
    assert f"{len(expand(config))} cells" in " ".join(result.stdout.split())


def test_heads_of_different_tasks_are_neither_merged_nor_averaged(
    tmp_path: Path, save_ready: Callable[..., Path]
) -> None:
    """cola with mrpc would give a number, cola with stsb an error of numpy."""
    for task, label in (("cola", 1), ("mrpc", 0), ("stsb", 2.5)):
        for split in ("train", "validation"):
            pair = {"sentence": "a"} if task == "cola" else {"sentence1": "a", "sentence2": "b"}
            file = tmp_path / "glue" / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{json.dumps({**pair, 'label': label})}\n" * 20)
    for other in ("mrpc", "stsb"):
        config = ExperimentConfig.model_validate(
            {
                "name": "heads", "suite": {"name": "glue", "root": str(tmp_path / "glue")}, "layout": "pairs",
                "pretrained": {"model": str(save_ready(f"base-{other}", "bert")), "title": "tiny"},
                "contributors": ["cola", other], "methods": ["simple"], "comparators": ["ensemble"],
            }
        )  # fmt: skip
        (problem,) = plan(config, tmp_path).problems
        assert "different tasks" in problem.what and "heads: separate" in str(problem.mend)
        with pytest.raises(ValueError, match="leave ensemble out of comparators"):
            ExperimentConfig.model_validate({**config.model_dump(), "heads": "separate"})
