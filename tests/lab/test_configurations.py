"""What the named configurations say, how they are found and combined, and what a dry run tells of them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from merganser.cli import cli
from merganser.errors import DataError, UserError
from merganser.lab.grid.cells import expand, models_of
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.loading import load_config, named_configurations
from merganser.training.settings import PUBLISHED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
NAMED = sorted(name for name, text in named_configurations().items() if text)
EMOTION = ["dailydialog", "crowdflower", "tec", "tales-emotion", "isear"]
THREE_FILES = ["defaults.yaml", "datasets/emotion.yaml", "exps/roberta-base/roberta-base-emotion.yaml"]


def load(name: str) -> ExperimentConfig:
    return load_config([FOLDER / f"{name}.yaml"])


def dry_run(*arguments: str, cwd: Path, catch: bool = False) -> Result:
    command = ["experiment", *arguments, "--dry-run", "--json", "--results", str(cwd / "r"), "--zoo", str(cwd / "z")]
    return CliRunner().invoke(cli, command, catch_exceptions=catch)


def plan_of(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", NAMED)
def test_each_dry_run_shows_the_grid_and_names_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither data nor models are there: the grid is counted all the same, and the run would refuse to start."""
    absent = DataError("pip could not fetch it", mend="try again")
    monkeypatch.setattr("merganser.lab.suites.sentiment._fetched", lambda: absent)
    config = load_config([name])
    assert config.name in (name, name.replace("/", "-"))
    result = dry_run(name, cwd=tmp_path, catch=True)
    assert isinstance(result.exception, UserError) and not (tmp_path / "r").exists()
    plan = plan_of(result)
    cells, models = expand(config), models_of(expand(config))
    assert len(plan["plan"]) == len(cells) + len(models) and not any(line["cached"] for line in plan["plan"])
    counted = {group: numbers["all"] for group, numbers in plan["summary"].items()}
    assert counted["models"] == len(models)
    assert counted["Gram matrices"] == counted["Fisher information"] == len(models)
    trainings = {(c.seed, *(s.name for s in c.contributors)) for c in cells if c.kind == "multitask"}
    assert counted.get("multi-task models", 0) == len(trainings)
    assert sum(counted.values()) == len(cells) + 3 * len(models) + len(trainings)
    assert len(plan["summary"]) < 20  # a listing to be read, whatever the number of pairs
    assert plan["problems"] and plan["estimate"]["seconds"] is None and "mended" in plan["estimate"]["reason"]


def test_every_row_of_the_papers_table_has_its_configurations() -> None:
    """PAPER: the table of experiments × the models that it names."""
    three = ("roberta-base", "t5-v1.1-base", "deberta-v3-large")
    wanted = {
        *(f"emotion-{kind}-{m}" for kind in ("pairwise", "greedy") for m in three),
        *(f"ner-greedy-{test}-{m}" for test in ("conll", "twitter") for m in ("roberta-base", "deberta-v3-large")),
        *(f"glue-{kind}-{m}" for kind in ("pairwise", "partitions") for m in ("distilbert-base", "roberta-base")),
    }  # fmt: skip
    assert wanted <= set(NAMED)


@pytest.mark.parametrize("model", ["roberta-base", "t5-v1.1-base", "deberta-v3-large"])
def test_emotion(model: str) -> None:
    pairwise, greedy = load(f"emotion-pairwise-{model}"), load(f"emotion-greedy-{model}")
    for config in (pairwise, greedy):
        assert [config.set_of(name) for name in config.contributors] == EMOTION
        assert config.seeds == (1, 2, 3, 4, 5) and config.tests.out_split == "all"
        assert [m.method for m in config.methods] == ["simple", "fisher", "regmean"]
        assert config.methods[2].options["alpha"] == 0.1
        head = {"roberta-base": ("classifier.out_proj.*",), "deberta-v3-large": ("classifier.*",)}.get(model, ())
        assert [m.exclude for m in config.methods] == [(), (), head]  # PAPER: the row of a label is the average
        assert config.statistics.examples == config.statistics.fisher_examples == 1000 * 16
        assert (config.pretrained.architecture, config.suite.name) in PUBLISHED
    assert pairwise.heads == (("same",) if "t5" in model else ("same", "different"))
    for config in (pairwise, greedy):
        assert config.comparators == ("individual", "ensemble", "multitask")
    merges = [cell for cell in expand(pairwise) if cell.kind == "merge"]
    assert len(merges) == 10 * 5 * 3 * len(pairwise.heads)


@pytest.mark.parametrize(("model", "alpha"), [("roberta-base", 0.1), ("deberta-v3-large", 0.9)])
def test_ner(model: str, alpha: float) -> None:
    for test, name in (("conll", "conll2003"), ("twitter", "twitter")):
        config = load(f"ner-greedy-{test}-{model}")
        assert [n.removeprefix("onto-") for n in config.contributors] == ["bc", "mz", "tc", "nw", "bn", "wb"]
        assert config.tests.out_of_domain == (name,) and config.methods[2].options["alpha"] == alpha
        assert config.comparators == ("individual", "ensemble", "multitask")


@pytest.mark.parametrize("model", ["distilbert-base", "roberta-base"])
def test_glue(model: str) -> None:
    pairs, parts = load(f"glue-pairwise-{model}"), load(f"glue-partitions-{model}")
    assert len(pairs.contributors) == 9 and pairs.heads == ("separate",)
    assert {m.method for m in pairs.methods} == {"simple", "fisher", "regmean", "ot"}
    assert any(m.search for m in pairs.methods) and pairs.methods[3].options["alpha"] == 1
    assert len(parts.contributors) == 8 and (parts.partitions.parts, parts.partitions.total) == (2, 2000)
    assert parts.heads == ("same",) and not parts.partitions.iid
    assert pairs.comparators == ("individual", "multitask")  # the ensemble of different tasks has no meaning
    assert parts.comparators == ("individual", "ensemble", "multitask")


def test_the_originals_three_files_mean_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_resources: Path, pretrained: Callable[..., Path]
) -> None:
    """PAPER: RegMean, emotion, same head initialisation, dailydialog and crowdflower, of seed 1.

    As its README has it: from the folder of the configurations, with underscores, the base below the resources.
    """
    resources = tmp_path / "resources"
    resources.mkdir()
    for part in tiny_resources.iterdir():
        (resources / part.name).symlink_to(part)
    (resources / "roberta-base").symlink_to(pretrained("roberta"))
    monkeypatch.chdir(FOLDER)
    words = ["--config_files", *THREE_FILES, "--templates", "seed=1", f"resources={resources}"]
    result = dry_run(*words, "--filter_model", "model0", "model1", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    lines = [(line["what"], line["description"]) for line in plan_of(result)["plan"]]
    assert lines == [
        ("model", "model0 (seed 1)"),
        ("model", "model1 (seed 1)"),
        ("individual", "individual: model0 (seed 1, same heads)"),
        ("individual", "individual: model1 (seed 1, same heads)"),
        ("merge", "regmean: model0 + model1 (seed 1, same heads)"),
    ]
    config = load_config(THREE_FILES, templates={"seed": "1"}, keep=["model0", "model1"])
    assert [config.set_of(name) for name in config.contributors] == ["dailydialog", "crowdflower"]
    assert config.methods[0].options == {"alpha": 0.1, "augment_bias": False, "embeddings": False}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("exps/*/*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_has_a_part_that_goes_after_defaults_and_a_data_set(path: Path) -> None:
    data = re.search(r"datasets/(\w+)\.yaml", path.read_text())
    assert data is not None
    config = load_config([FOLDER / "defaults.yaml", FOLDER / data[0], path], templates={"seed": "3"})
    assert config.seeds == (3,) and [m.method for m in config.methods] == ["regmean"] and config.name == path.stem
    assert path.parent.name == path.stem[: len(path.parent.name)]
    assert (config.pretrained.architecture, config.suite.name) in PUBLISHED or "gpt2" in path.stem


def test_every_named_experiment_of_the_paper_is_made_of_its_parts() -> None:
    for path in FOLDER.glob("*-*-*.yaml"):
        if "layout" not in path.read_text() and "name:" in path.read_text():
            parents = yaml.safe_load(path.read_text())["extends"]
            assert parents[0] == "defaults.yaml" and parents[2].startswith("exps/"), path


def test_they_are_in_the_wheel_and_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert settings["force-include"] == {"experiments": "merganser/configurations"}
    monkeypatch.chdir(tmp_path)
    by_name = load_config(["emotion-pairwise-roberta-base"])
    assert by_name == load("emotion-pairwise-roberta-base")
    Path("emotion-pairwise-roberta-base.yaml").write_text("name: mine\n")
    with pytest.raises(Exception, match="missing"):  # a file of one's own goes before
        load_config(["emotion-pairwise-roberta-base.yaml"])


def test_the_list_names_whole_experiments_with_what_they_are() -> None:
    result = CliRunner().invoke(cli, ["experiment", "--list"], catch_exceptions=False)
    assert result.exit_code == 0
    for name in NAMED:
        assert re.search(rf"^{re.escape(name)} +\w", result.stdout, re.MULTILINE), name
    for part in THREE_FILES:
        assert part in result.stdout
    as_json = json.loads(CliRunner().invoke(cli, ["experiment", "--list", "--json"]).stdout)
    assert as_json == named_configurations()


def test_glue_from_the_hub_is_one_key(tmp_path: Path) -> None:
    files = ["glue-pairwise-distilbert-base"]
    assert load_config(files, templates={"glue": "hub"}).suite.root is None
    assert load_config(files, templates={"resources": "r"}).suite.root == "r/glue"
    own = tmp_path / "hub.yaml"
    own.write_text("suite: {root: hub}\n")
    assert load_config([*files, own]).suite.root is None


def test_the_zoo_may_be_named_in_a_file(tmp_path: Path, tiny_resources: Path, pretrained: Callable[..., Path]) -> None:
    own = tmp_path / "own.yaml"
    values = {"local_zoo_dir": str(tmp_path / "mine"), "training": {"max_steps": 1}, "statistics": {"examples": 4}}
    own.write_text(yaml.safe_dump(values))
    words = [*THREE_FILES, str(own), "--templates", "seed=1", f"resources={tiny_resources}"]
    words += [f"base={pretrained('roberta')}", "--filter-model", "model0", "model1", "--results", str(tmp_path / "r")]
    result = CliRunner().invoke(cli, ["experiment", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "mine").glob("*/entry.json"))) == 2
