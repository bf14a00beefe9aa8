"""Every named configuration from end to end: tiny models of the true architecture, two contributors, few steps.

A few run in ``make test``; ``make experiments-tiny`` runs all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from merganser.cli import cli
from merganser.lab.grid.cells import expand
from merganser.lab.grid.loading import load_config, named_configurations
from merganser.lab.report import make_sections, read_rows, render_markdown
from merganser.lab.sentiment import SDIST, cache_folder

#: What a published model is like: its name among the tiny ones, and how its files are.
PUBLISHED: dict[str, tuple[str, dict[str, bool]]] = {
    "roberta-base": ("roberta", {}),
    "distilbert-base": ("distilbert", {}),
    "deberta-v3-large": ("deberta-v3", {"pickled": True, "half": True}),
    "t5-v1.1-base": ("t5-v1.1", {"pickled": True}),
    "gpt2": ("gpt2", {}),
}
#: Two contributors of each suite.
PAIRS = {"emotion": ("model0", "model1"), "ner": ("onto-bc", "onto-nw"), "glue": ("cola", "mrpc")}
FAST = {
    "emotion-pairwise-roberta-base", "emotion-greedy-t5-v1.1-base", "ner-greedy-twitter-deberta-v3-large",
    "glue-pairwise-distilbert-base", "glue-partitions-roberta-base",
}  # fmt: skip
NAMED = [name for name, text in sorted(named_configurations().items()) if text and "/" not in name]
SMALL = {
    "training": {"max_steps": 6, "batch_size": 4, "max_length": 32},
    "statistics": {"examples": 12, "fisher_examples": 4},
    "suite": {"limits": {"train": 24, "dev": 8, "test": 8}},
    "partitions": {"total": 24},
}


def run(
    name: str, place: Path, resources: Path, base: Path, extra: dict[str, Any], keep: tuple[str, ...], *more: str
) -> list[dict[str, Any]]:
    """The rows of a named configuration, made small, by the command line."""
    own = place / "small.yaml"
    own.write_text(yaml.safe_dump({**SMALL, **extra}))
    template = "decoder" if name.endswith("/decoder") else "base"
    words = ["experiment", name, str(own), "--templates", f"resources={resources}", f"{template}={base}"]
    words += ["--filter-model", *keep, "--results", str(place / "r"), "--zoo", str(place / "z"), *more]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder,) = (place / "r").iterdir()
    return [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.experiments) for name in NAMED]
)
def test_it_runs_as_it_is_published(
    name: str, tmp_path: Path, tiny_resources: Path, pretrained: Callable[..., Path]
) -> None:
    model = next(known for known in PUBLISHED if name.endswith(known))
    architecture, published = PUBLISHED[model]
    base = pretrained(architecture, **published)
    config = load_config([name])
    keep = PAIRS[name.split("-")[0]]
    seeds = [1, 2] if "different" in config.heads else [1]
    more = ["--allow-pickle"] if published.get("pickled") else []
    rows = run(name, tmp_path, tiny_resources, base, {"seeds": seeds}, keep, *more)
    small = load_config([name, tmp_path / "small.yaml"], templates={"base": str(base)}, keep=keep)
    assert len(rows) == len(expand(small))  # every cell of the grid has its row
    assert {row["kind"] for row in rows} == {"merge", *config.comparators}
    for row in rows:
        assert row["scores"] and all(-1 <= score["value"] <= 1 for score in row["scores"].values())
        if row["kind"] == "merge":
            check_merge(row)
    text = render_markdown(make_sections(read_rows(tmp_path / "r"), "simple"))
    assert "model0" not in text  # tables name corpora
    if "emotion" in name:
        assert "dailydialog + crowdflower" in text or "crowdflower" in text


def check_merge(row: dict[str, Any]) -> None:
    """The named method was used, on most tensors, with statistics of every contributor where it wants some."""
    used = row["provenance"]["tensors"]
    method = {"Simple, searched": "simple", "ot": "ot"}.get(row["method"], row["method"])
    assert used[method] > 0, row["method"]
    if method in ("fisher", "regmean"):
        assert all(one["statistics"] for one in row["provenance"]["contributors"])
    if row["method"] == "Simple, searched":
        assert len(row["chosen"]["candidates"]) == 11 and row["chosen"]["by"] == "dev"


@pytest.mark.parametrize("name", ["emotion-pairwise-deberta-v3-large", "emotion-pairwise-t5-v1.1-base"])
def test_bases_that_are_published_as_pickles_need_the_flag_and_say_so(
    name: str, tmp_path: Path, tiny_resources: Path, pretrained: Callable[..., Path]
) -> None:
    architecture, published = PUBLISHED[next(known for known in PUBLISHED if name.endswith(known))]
    base = pretrained(architecture, **published)
    words = ["experiment", name, "--dry-run", "--templates", f"resources={tiny_resources}", f"base={base}"]
    words += ["--filter-model", "model0", "model1", "--zoo", str(tmp_path / "z")]
    refused = CliRunner().invoke(cli, words)
    assert "pickled" in str(refused.exception) and "--allow-pickle" in str(refused.exception)
    allowed = CliRunner().invoke(cli, [*words, "--allow-pickle"], catch_exceptions=False)
    assert allowed.exit_code == 0
    assert ("float16 are trained, and saved, in float32" in allowed.output) == published.get("half", False)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.experiments)
        for name, text in sorted(named_configurations().items())
        if text and name.startswith(("small/", "leaderboard/"))
    ],
)
def test_the_small_ones_and_those_of_the_leaderboard_run_on_the_real_corpora(
    name: str, tmp_path: Path, resources: Path, save_ready: Callable[..., Path]
) -> None:
    config = load_config([name])
    if config.suite.name == "sentiment" and not (cache_folder() / SDIST).is_file():
        pytest.skip(f"{SDIST} is not in the cache: set MERGANSER_CACHE to run this")
    keep = tuple(list(config.contributors)[:2])
    extra = {"seeds": [1, 2] if "different" in config.heads else [1]}
    architecture = config.pretrained.architecture or "bert"
    rows = run(name, tmp_path, resources, save_ready("base", architecture), extra, keep)
    assert {row["kind"] for row in rows} == {"merge", *config.comparators}
