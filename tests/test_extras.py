"""What is not installed is named with the command that installs it, before any work; the core names none of it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from merganser.errors import UserError, require
from merganser.lab.grid.config import make_config
from merganser.lab.grid.planning import plan_experiment
from merganser.lab.grid.run import run_experiment
from merganser.lab.report import render_page
from merganser.tasks import TASKS, read_rows
from merganser.training import TrainingSettings, train

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: What `pip install merganser` brings not, by the names of distributions.
NOT_IN_THE_CORE = {
    "datasets",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "matplotlib",
    "jinja2",
    "accelerate",
    "model-signing",
}


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}


def test_the_core_requires_nothing_of_the_extras() -> None:
    assert not names_of(PROJECT["dependencies"]) & NOT_IN_THE_CORE


def test_every_extra_that_the_code_names_is_there_and_has_the_package() -> None:
    extras = PROJECT["optional-dependencies"]

    def all_of(extra: str) -> set[str]:
        inner = [name for one in extras[extra] for name in re.findall(r"merganser\[(.*)\]", one)]
        return names_of(extras[extra]).union(*(all_of(name) for names in inner for name in names.split(",")))

    calls = [
        [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require"
    ]
    assert len(calls) >= 9
    for extra, _, *packages in calls:
        assert packages and {package.replace("_", "-") for package in packages} <= all_of(extra), extra
    texts = [path.read_text(encoding="utf-8") for path in [*(ROOT / "src").rglob("*.py"), *ROOT.glob("docs/*.md")]]
    named = {extra for text in texts for extra in re.findall(r"merganser\[(\w+)\]", text)}
    assert named and named <= set(extras)


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        UserError, match=r"here: the page needs jinja2, matplotlib, which are not installed\n.*\[lab\]'"
    ):
        require("lab", "the page", "jinja2", "numpy", "matplotlib", where="here")
    require("lab", "the page", "numpy")


def test_each_use_says_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("accelerate", "datasets", "jinja2", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n')
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    config = make_config(
        {
            "name": "x",
            "suite": {"name": "text-classification", "root": str(tmp_path)},
            "pretrained": {"model": str(tmp_path), "title": "x"},
            "contributors": ["a", "b"],
            "layout": "all",
            "methods": ["simple"],
        },
        "here",
    )
    rows = read_rows(tmp_path / "a.jsonl")
    folders = {"results": tmp_path / "results", "zoo": tmp_path / "zoo"}
    settings = TrainingSettings()
    for extra, use in (
        ("data", lambda: read_rows(tmp_path / "a.parquet")),
        ("data", lambda: read_rows(tmp_path / "saved")),
        ("data", lambda: read_rows("glue:sst2")),
        ("train", lambda: train(tmp_path, TASKS["seq2seq"], rows, output=tmp_path / "out", settings=settings)),
        ("lab", lambda: run_experiment(config, **folders)),
        ("lab", lambda: render_page([])),
    ):
        with pytest.raises(UserError, match=rf"needs .* not installed\n.*pip install 'merganser\[{extra}\]'"):
            use()
    first, *_ = plan_experiment(config, **folders).problems
    assert first.mend == "pip install 'merganser[lab]'"
    assert not (tmp_path / "results").exists() and not (tmp_path / "out").exists()
