"""Signals that end a command, in real processes: everything is cleaned up, in one line, and the status says which."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Runs a command whose every step prints and waits; what is to be held back is patched before.
SLOW = """
import os, signal, sys, time
if {ignored!r}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
else:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which a background job may ignore
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
import {module} as module
whole = module.{name}
def slow(*values, **options):
    os.write(1, b"step\\n")  # in one piece, from whatever thread
    time.sleep({wait})
    return whole(*values, **options)
module.{name} = slow
from merganser.cli import main
main(sys.argv[1:])
"""
MERGE = ("merganser.merging.execution", "Merging.slices")
COLLECT = ("merganser.collection.shards", "_collect_shard")


@contextmanager
def started(
    tmp_path: Path, place: tuple[str, str], *arguments: object, wait: float = 0.2, ignored: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A command that has begun its work."""
    code = SLOW.format(module=place[0], name=place[1], wait=wait, ignored=ignored)
    (tmp_path / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    try:
        assert process.stdout and process.stdout.readline() == "step\n", process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def models(save_ready, tmp_path: Path) -> list[Path]:
    rows = [{"text": f"a b {word} d", "label": n % 2} for n, word in enumerate("efghijkl")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [save_ready(f"m{n}", "bert", seed=n) for n in (1, 2)]


@pytest.mark.parametrize(("number", "threads"), [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGHUP, 2)])
def test_a_merge_is_stopped(number: signal.Signals, threads: int, models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    before = everything(tmp_path)
    with started(tmp_path, MERGE, "merge", *models, "-o", tmp_path / "out", "--threads", threads) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.strip().splitlines()[-1] == f"merganser: stopped by {number.name}; nothing half-written is left"
    assert "Traceback" not in said and everything(tmp_path) == before


def test_impatience_leaves_nothing_either(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    before = everything(tmp_path)
    with started(tmp_path, MERGE, "merge", *models, "-o", tmp_path / "out", "--threads", "2", wait=1) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode != 0 and everything(tmp_path) == before


def test_a_collection_is_stopped_and_its_old_file_stays(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "statistics.safetensors"
    before = everything(tmp_path)
    arguments = ("collect", models[0], "--data", tmp_path / "data.jsonl", "-o", out, "--shard-examples", "2")
    with started(tmp_path, COLLECT, *arguments) as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert everything(tmp_path) == before


def test_what_is_ignored_stays_ignored(models: list[Path], tmp_path: Path) -> None:
    """As nohup starts a command."""
    with started(tmp_path, MERGE, "merge", *models, "-o", tmp_path / "out", wait=0, ignored=True) as process:
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "out" / "provenance.json").is_file()


def test_a_killed_merge_is_tidied_by_the_next_one_and_a_living_one_is_not(models: list[Path], tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    with started(tmp_path, MERGE, "merge", *models, "-o", out, "--threads", "1", wait=5) as living:
        (staged,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-"))
        with started(tmp_path, MERGE, "merge", *models, "-o", out, "--threads", "1") as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
        litter = temporary / "merganser-00000000"
        litter.mkdir()
        (litter / "lock").write_text("")
        command = [sys.executable, "-m", "merganser", "merge", *map(str, models), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert f"{out}: removed what a command that was killed had left beside it" in done.stderr
        assert staged.is_dir() and living.poll() is None
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == [staged.name]
        assert (out / "provenance.json").is_file()
    evaluated = [sys.executable, "-m", "merganser", "reproduce", str(out)]
    done = subprocess.run(evaluated, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True)
    assert done.returncode == 0 and "removed scratch of command killed earlier" in done.stderr.replace("1 ", "")
    assert not list(temporary.iterdir())
