"""``merganser ledger``: data on standard output, everything else on standard error, 2 for the user's mistakes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conftest import make_model
from merganser.cli.ledger import ledger_command
from merganser.errors import UserError
from merganser.merging import reproduce, verify


def run(*arguments: str) -> Result:
    return CliRunner().invoke(ledger_command, arguments, catch_exceptions=False)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of a base and two others, relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for seed, name in enumerate(("base", "one", "two")):
        make_model("bert", seed).save_pretrained(tmp_path / name)
    return ["base", "one", "two"]


def test_a_ledger_from_start_to_model(models: list[str], tmp_path: Path) -> None:
    assert run("init", "sums", "--base", "base", "--method", "simple", "--exclude", "classifier*").stdout == "sums\n"
    assert "0 contributors to simple" in run("show", "sums").stdout
    added = [run("add", "sums", "one"), run("add", "sums", "two", "--coefficient", "2")]
    assert "two added, coefficient 2" in added[1].stderr
    first, second = (result.stdout.strip() for result in added)
    assert len(first) == 64 and first != second
    shown = run("show", "sums").stdout
    for text in ("2 contributors to simple", first[:12], second[:12], "two", "averaged: classifier*", "base base"):
        assert text in shown
    listed = json.loads(run("show", "sums", "--json").stdout)
    assert [c["coefficient"] for c in listed["contributors"]] == [1, 2] and listed["total"] == 3
    assert listed["bytes"] == (tmp_path / "sums" / listed["file"]).stat().st_size
    assert run("solve", "sums", "-o", "merged", "--dtype", "F32").stdout == "merged\n"
    assert (tmp_path / "merged" / "config.json").is_file()
    removed = run("remove", "sums", first[:12])
    assert removed.stdout.strip() == first and "one removed" in removed.stderr
    assert run("init", "site", "--base", "base", "--method", "simple", "--exclude", "classifier*").exit_code == 0
    run("add", "site", "one")
    assert run("sum", "sums", "site", "-o", "total").stdout == "total\n"
    assert [c["name"] for c in json.loads(run("show", "total", "--json").stdout)["contributors"]] == ["two", "one"]


def test_options_are_settled_at_the_start(models: list[str]) -> None:
    run("init", "sums", "--base", "base", "--alpha", "0.5", "--option", "embeddings=false", "--keep-separate", "x*")
    listed = json.loads(run("show", "sums", "--json").stdout)
    assert listed["options"]["alpha"] == 0.5 and listed["options"]["embeddings"] is False
    assert listed["keep_separate"] == ["x*"] and listed["method"] == "regmean"
    with pytest.raises(UserError, match="collect one"):
        run("add", "sums", "one")


def test_mistakes_exit_with_2(models: list[str], tmp_path: Path) -> None:
    for arguments in (["show", "nowhere"], ["add", "sums"], ["init", "sums"]):
        done = subprocess.run(
            [sys.executable, "-m", "merganser", "ledger", *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2 and done.stderr and not done.stdout and "Traceback" not in done.stderr


def test_a_ledger_is_made_in_a_folder_of_this_machine(models: list[str], tmp_path: Path) -> None:
    for work in (["init", "s3://bucket/sums", "--base", "base"], ["sum", "one", "two", "-o", "s3://bucket/sums"]):
        with pytest.raises(UserError, match="looks like a URL"):
            run(*work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


def test_help_imports_nothing_heavy() -> None:
    spec = importlib.util.find_spec("merganser.cli.ledger")
    assert spec is not None
    code = "import sys, merganser.cli.ledger; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_ledger_was_solved_to_is_verified_and_repeated_from_the_ledger(models: list[str]) -> None:
    run("init", "sums", "--base", "base", "--method", "simple")
    run("add", "sums", "one")
    run("solve", "sums", "-o", "merged")
    verify("merged")
    with pytest.raises(UserError, match="merganser ledger solve"):
        reproduce("merged")
