"""A few kills of each kind of command, as ``make kill`` does hundreds of; and the judge sees what is lost or half."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kill.cases import BUCKET, Case, folder, objects
from kill.judge import Judge
from kill.trees import Tree

Files = dict[str, str]
OLD, NEW = {"config.json": "old", "a.bin": "old"}, {"config.json": "new", "b.bin": "new"}


@pytest.mark.slow
def test_a_few_kills_lose_nothing() -> None:
    command = [sys.executable, "-m", "kill", "--kills", "4", "--only", "merge over an old one", "merge to a URL"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0 and done.stdout.count("2 kills, 0 faults") == 2, done.stdout + done.stderr


def make(root: Path, files: Files) -> Tree:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(root)


def below(name: str, files: Files) -> Files:
    return {f"{name}/{file}": text for file, text in files.items()}


def stored(prefix: str, files: Files) -> Files:
    return {f"store/{BUCKET}%2F{prefix}%2F{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("left", "state", "kinds"),
    [
        (OLD, "old", []),
        (NEW, "new", []),
        ({}, "half", ["old result lost"]),
        ({"a.bin": "old"}, "half", ["old result lost"]),
        ({**OLD, "config.json": "new"}, "half", ["half a result"]),
        ({**NEW, "a.bin": "old"}, "half", ["half a result"]),
        ({**NEW, "b.bin": "ne"}, "half", ["half a result"]),
    ],
)
def test_the_judge_of_folders(tmp_path: Path, left: Files, state: str, kinds: list[str]) -> None:
    inputs = {"model/config.json": "a"}
    before = make(tmp_path / "before", {**inputs, **below("out", OLD)})
    after = make(tmp_path / "after", {**inputs, **below("out", NEW)})
    judge = Judge(Case("merge", ["merge", "-o", "out"], folder("out")), before, after, frozenset())
    found, faults = judge.state(make(tmp_path / "left", {**inputs, **below("out", left)}))
    assert found == state and [kind for kind, _ in faults] == kinds
    littered = make(tmp_path / "littered", {"model/config.json": "b", ".out.partial-1/x": "", **below("out", NEW)})
    assert [kind for kind, _ in judge.state(littered)[1]] == ["other"]
    assert "litter" in [kind for kind, _ in judge.litter(littered)]
    assert {kind for kind, _ in judge.rerun(littered)} == {"litter", "rerun failed"}


@pytest.mark.parametrize(
    ("left", "state", "kinds"),
    [
        (OLD, "beside", []),
        (NEW, "new", []),
        ({"a.bin": "old"}, "beside", []),
        ({"a.bin": "old", "b.bin": "new"}, "beside", []),
        ({"b.bin": "new"}, "beside", []),
        ({"config.json": "new"}, "beside", ["half a result"]),
        ({**NEW, "a.bin": "old"}, "beside", ["half a result"]),
        ({**OLD, "b.bin": "new"}, "beside", ["half a result"]),
    ],
)
def test_the_judge_of_urls(tmp_path: Path, left: Files, state: str, kinds: list[str]) -> None:
    before = make(tmp_path / "before", stored("out", OLD))
    after = make(tmp_path / "after", stored("out", NEW))
    judge = Judge(Case("merge", ["merge", "-o", f"kept://{BUCKET}/out"], objects("out")), before, after, frozenset())
    beside = {**stored("out.partial-1%2Ffiles", NEW), **stored("out.partial-1", {"manifest.json": "{}"})}
    found, faults = judge.state(make(tmp_path / "left", {**stored("out", left), **beside}))
    assert found == state and [kind for kind, _ in faults] == kinds
    found, faults = judge.state(make(tmp_path / "alone", stored("out", left)))
    assert found == {str(OLD): "old", str(NEW): "new"}.get(str(left), "half") and bool(faults) == (found == "half")
