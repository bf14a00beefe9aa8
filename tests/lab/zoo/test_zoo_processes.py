"""Processes and threads that want the same model of the zoo at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from merganser.lab.zoo import Zoo, ZooError, id_of
from zoo_examples import KEY, make


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


MAKER = """
import os, sys, time
from pathlib import Path
from merganser.lab.zoo import Zoo
def make(folder):
    print("making", flush=True)
    (folder / "half").write_text("x" * 10)
    if sys.argv[2] == "hang":
        time.sleep(600)
    sys.stdin.readline()
    (folder / "whole").write_text("y")
    return {"maker": os.getpid()}
zoo = Zoo(sys.argv[1])
(zoo.work({"k": 1}) / "progress").write_text("kept")
print("asking", flush=True)
print(zoo.build({"k": 1}, make).facts["maker"], flush=True)
"""


def start(root: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(root), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_make_a_model_once(zoo: Zoo) -> None:
    first = start(zoo.root, "go")
    assert first.stdout and [first.stdout.readline() for _ in range(2)] == ["asking\n", "making\n"]
    second = start(zoo.root, "go")
    assert second.stderr and "waiting for another process" in second.stderr.readline()
    assert zoo.get({"k": 1}) is None
    with pytest.raises(ZooError):
        zoo.remove(id_of({"k": 1}))
    out, _ = first.communicate("\n", timeout=60)
    assert out == f"{first.pid}\n"
    out, _ = second.communicate("\n", timeout=60)
    assert out == f"asking\n{first.pid}\n"
    entry = zoo.get({"k": 1})
    assert entry is not None and sorted(entry.files) == ["half", "whole"]


def test_a_killed_maker_leaves_nothing_finished_and_frees_the_waiting(zoo: Zoo) -> None:
    first = start(zoo.root, "hang")
    assert first.stdout and [first.stdout.readline() for _ in range(2)] == ["asking\n", "making\n"]
    second = start(zoo.root, "go")
    assert second.stderr and "waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    assert first.wait(timeout=60) == -signal.SIGKILL
    first.communicate()
    assert zoo.get({"k": 1}) is None and zoo.ls() == []
    assert (zoo.root / ".work" / id_of({"k": 1}) / "progress").read_text() == "kept"
    out, _ = second.communicate("\n", timeout=60)
    assert out == f"asking\nmaking\n{second.pid}\n"
    entry = zoo.get({"k": 1})
    assert entry is not None and zoo.verify(entry) == 2
    assert not list((zoo.root / ".partial").iterdir()) and not list((zoo.root / ".work").iterdir())


def test_threads_make_a_model_once(tmp_path: Path) -> None:
    made = []

    def slow(folder: Path) -> Any:
        made.append(1)
        time.sleep(0.05)
        return make(folder)

    threads = [threading.Thread(target=lambda: Zoo(tmp_path).build(KEY, slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and Zoo(tmp_path).get(KEY)
