"""Every named configuration is valid, expands, and is what the paper says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from merganser.cli import cli
from merganser.experiments.grid.cells import expand, models_of
from merganser.experiments.grid.config import ExperimentConfig
from merganser.experiments.grid.loading import load_config
from merganser.training.settings import PUBLISHED

FOLDER = Path(__file__).parents[3] / "experiments"
NAMED = sorted(
    p for p in [*FOLDER.glob("*.yaml"), *FOLDER.glob("small/*.yaml")] if "layout:" in p.read_text()
)
EMOTION = ["dailydialog", "crowdflower", "tec", "tales-emotion", "isear"]


def load(name: str) -> ExperimentConfig:
    return load_config([FOLDER / f"{name}.yaml"])


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_each_is_listed_by_a_dry_run(path: Path, tmp_path: Path) -> None:
    config = load_config([path])
    assert config.name.removeprefix("small-") == path.stem
    arguments = ["experiment", str(path), "--dry-run", "--json", "--results", str(tmp_path / "r")]
    result = CliRunner().invoke(cli, [*arguments, "--zoo", str(tmp_path / "zoo")], catch_exceptions=False)
    assert result.exit_code == 0
    plan = json.loads(result.stdout)["plan"]
    assert len(plan) == len(expand(config)) + len(models_of(expand(config)))
    assert not any(line["cached"] for line in plan) and not (tmp_path / "r").exists()


def test_every_row_of_the_papers_table_has_its_configurations() -> None:
    """PAPER: the table of experiments × the models that it names."""
    three = ("roberta-base", "t5-v1.1-base", "deberta-v3-large")
    wanted = {
        *(f"emotion-{kind}-{m}" for kind in ("pairwise", "greedy") for m in three),
        *(f"ner-greedy-{test}-{m}" for test in ("conll", "twitter") for m in ("roberta-base", "deberta-v3-large")),
        *(f"glue-{kind}-{m}" for kind in ("pairwise", "partitions") for m in ("distilbert-base", "roberta-base")),
    }  # fmt: skip
    assert wanted <= {path.stem for path in NAMED}


@pytest.mark.parametrize("model", ["roberta-base", "t5-v1.1-base", "deberta-v3-large"])
def test_emotion(model: str) -> None:
    pairwise, greedy = load(f"emotion-pairwise-{model}"), load(f"emotion-greedy-{model}")
    for config in (pairwise, greedy):
        assert [config.set_of(name) for name in config.contributors] == EMOTION
        assert config.seeds == (1, 2, 3, 4, 5) and config.tests.out_split == "all"
        assert [m.method for m in config.methods] == ["simple", "fisher", "regmean"]
        assert config.methods[2].options["alpha"] == 0.1
        assert config.statistics.examples == config.statistics.fisher_examples == 1000 * 16
        assert (config.pretrained.architecture, config.suite.name) in PUBLISHED
    assert pairwise.heads == (("same",) if "t5" in model else ("same", "different"))
    assert greedy.comparators == ("individual", "ensemble", "multitask")
    merges = [cell for cell in expand(pairwise) if cell.kind == "merge"]
    assert len(merges) == 10 * 5 * 3 * len(pairwise.heads)


@pytest.mark.parametrize(("model", "alpha"), [("roberta-base", 0.1), ("deberta-v3-large", 0.9)])
def test_ner(model: str, alpha: float) -> None:
    for test, name in (("conll", "conll2003"), ("twitter", "twitter")):
        config = load(f"ner-greedy-{test}-{model}")
        assert [n.removeprefix("onto-") for n in config.contributors] == ["bc", "mz", "tc", "nw", "bn", "wb"]
        assert config.tests.out_of_domain == (name,) and config.methods[2].options["alpha"] == alpha


@pytest.mark.parametrize("model", ["distilbert-base", "roberta-base"])
def test_glue(model: str) -> None:
    pairs, parts = load(f"glue-pairwise-{model}"), load(f"glue-partitions-{model}")
    assert len(pairs.contributors) == 9 and pairs.heads == ("separate",)
    assert {m.method for m in pairs.methods} == {"simple", "fisher", "regmean", "ot"}
    assert any(m.search for m in pairs.methods) and pairs.methods[3].options["alpha"] == 1
    assert len(parts.contributors) == 8 and (parts.partitions.parts, parts.partitions.total) == (2, 2000)
    assert parts.heads == ("same",) and not parts.partitions.iid


def test_the_originals_command_line_is_understood(tmp_path: Path) -> None:
    """PAPER: several --config files, --templates, --filter_model; one merge of dailydialog and crowdflower."""
    one = tmp_path / "one-seed.yaml"
    one.write_text('seeds: ["{seed}"]\nheads: same\n')
    files = [FOLDER / "emotion-pairwise-roberta-base.yaml", one]
    arguments = ["experiment", "--config", *map(str, files), "--templates", "seed=1", "resources=x"]
    arguments += [
        "--filter_model",
        "model0",
        "model1",
        "--dry-run",
        "--json",
        "--results",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = [(line["what"], line["description"]) for line in json.loads(result.stdout)["plan"]]
    assert lines == [
        ("model", "model0 (seed 1)"),
        ("model", "model1 (seed 1)"),
        ("individual", "individual: model0 (seed 1, same heads)"),
        ("individual", "individual: model1 (seed 1, same heads)"),
        ("merge", "simple: model0 + model1 (seed 1, same heads)"),
        ("merge", "fisher: model0 + model1 (seed 1, same heads)"),
        ("merge", "regmean: model0 + model1 (seed 1, same heads)"),
    ]
