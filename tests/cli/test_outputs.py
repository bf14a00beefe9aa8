"""Every command that writes, from end to end: nothing that is not its own is replaced, whatever --overwrite says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from merganser.cli import main
from merganser.files import atomic


@pytest.fixture
def place(save_ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of two checkpoints, a base, data, a recipe and a thesis, as the current one."""
    for number, name in enumerate(("run/checkpoint-1", "run/checkpoint-2", "base", "foreign")):
        save_ready(name, "bert", seed=number)
    rows = [{"text": f"a b {word} d", "label": n % 2} for n, word in enumerate("efghijkl")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"contributors": ["run/checkpoint-1", "run/checkpoint-2"], "method": "simple"}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run" / "config.json").write_text("{}")  # a training that was published as it lay there
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text('{"thesis": "mine"}')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "alias").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refuse(place: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that exits with 2 and leaves everything as it was; with --overwrite and without."""
    before = snapshot(place)
    for more in ((), ("--overwrite",)):
        assert run(*arguments, *more) == 2, (arguments, more, capsys.readouterr())
        said = capsys.readouterr().err
        assert snapshot(place) == before and "Traceback" not in said and "to mend" in said
    return said


TWO = ("run/checkpoint-1", "run/checkpoint-2")
NOWHERE = ["dangling", "dangling/out", "file/out", "x" * 256, "x" * 256 + "/out", "a\nb", "file"]


def test_merge(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = ["run", ".", "alias", "recipes/../run", "run/.", place, place.parent, "/"]
    for output in (
        *held,
        *TWO,
        *NOWHERE,
        "foreign",
        "thesis",
        "data",
        "run/checkpoint-1/merged",
        "alias/checkpoint-2/a",
    ):
        refuse(place, capsys, "merge", *TWO, "-o", output)
    for output in ("base", "base/merged"):
        for method in ("simple", "task-arithmetic"):
            refuse(place, capsys, "merge", *TWO, "--method", method, "--base", "base", "-o", output)
    assert "which is read" in refuse(place, capsys, "merge", "recipes/recipe.yaml", "-o", "recipes")
    assert run("merge", *TWO, "-o", "run/merged", "--method", "simple") == 0  # beside what is read
    assert run("merge", *TWO, "-o", "run/merged", "--method", "simple", "--dtype", "BF16", "--overwrite") == 0
    (place / "run" / "merged" / "README.md").write_text("my own words")
    capsys.readouterr()
    assert "README.md" in refuse(place, capsys, "merge", *TWO, "-o", "run/merged")
    assert run("merge", *TWO, "-o", "with", "--method", "simple") == 0
    assert run("collect", "with", "--data", "data/rows.jsonl") == 0
    capsys.readouterr()
    assert "no part of the merge: merge_statistics.safetensors" in refuse(place, capsys, "merge", *TWO, "-o", "with")
    assert "which is read" in refuse(place, capsys, "merge", "with", TWO[0], "-o", "with/out")


def test_collect_and_stats(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "data/rows.jsonl")
    wrong = ["run/checkpoint-1/model.safetensors", "base/model.safetensors", "data/rows.jsonl", "thesis/config.json"]
    for output in (*wrong, *NOWHERE):
        refuse(place, capsys, "collect", TWO[0], *data, "-o", output)
    assert run("collect", TWO[0], *data) == run("collect", TWO[0], *data, "-o", "other.safetensors") == 0
    assert run("collect", TWO[0], *data, "--overwrite") == 0
    statistics = "run/checkpoint-1/merge_statistics.safetensors"
    for output in (*wrong, *NOWHERE):
        refuse(place, capsys, "stats", "compress", statistics, "--storage", "bfloat16", "-o", output)
        refuse(place, capsys, "stats", "add", statistics, "other.safetensors", "-o", output)
        refuse(place, capsys, "stats", "scale", statistics, "2", "-o", output)
    for output in ("new.safetensors", "new.safetensors", statistics):  # its own successor, once that is whole
        assert run("stats", "compress", statistics, "--storage", "bfloat16", "-o", output, "--overwrite") == 0


def test_ledger(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(place)
    for output in ("thesis", "run", "base/sums", *NOWHERE):
        assert run("ledger", "init", output, "--base", "base", "--method", "simple") == 2
        assert snapshot(place) == before and "Traceback" not in capsys.readouterr().err
    assert run("ledger", "init", "sums", "--base", "base", "--method", "simple") == 0
    assert run("ledger", "add", "sums", TWO[0]) == 0
    for output in ("sums", "sums/out", "base", ".", "thesis", "run", *NOWHERE):
        refuse(place, capsys, "ledger", "solve", "sums", "-o", output)
    assert run("ledger", "solve", "sums", "-o", "solved") == 0
    assert run("ledger", "solve", "sums", "-o", "solved", "--overwrite") == 0
    assert run("ledger", "init", "more", "--base", "base", "--method", "simple") == 0
    assert run("ledger", "add", "more", TWO[1]) == 0
    before = snapshot(place)
    for output in ("sums", "sums/total", "thesis", *NOWHERE):
        assert run("ledger", "sum", "sums", "more", "-o", output) == 2
        assert snapshot(place) == before and "Traceback" not in capsys.readouterr().err
    assert run("ledger", "sum", "sums", "more", "-o", "total") == 0


def test_reproduce(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", *TWO, "-o", "merged", "--method", "simple") == 0
    before = snapshot(place)
    for output in ("merged", "merged/again", "run", "base", ".", *NOWHERE):
        assert run("reproduce", "merged", "-o", output) == 2, output
        assert snapshot(place) == before and "Traceback" not in capsys.readouterr().err
    assert run("reproduce", "merged", "-o", "again") == 0


def test_a_folder_that_was_moved_away_is_back_when_it_is_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command was killed between the two renames that some file systems need."""
    assert run("merge", *TWO, "-o", "merged", "--method", "simple") == 0
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from merganser.files import atomic\n"
        "atomic._exchanging_rename = lambda: None\n"
        "rename = Path.rename\n"
        "def dying(path, target):\n"
        "    if path.name == 'new':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(path, target)\n"
        "Path.rename = dying\n"
        "from merganser.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = ("merge", *TWO, "-o", "merged", "--method", "simple", "--overwrite")
    assert hasattr(atomic, "_exchanging_rename")
    subprocess.run([sys.executable, "-c", code, *command], capture_output=True, timeout=120)
    assert not (place / "merged").exists()
    assert run("inspect", "merged") == 0 and (place / "merged" / "provenance.json").is_file()
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
