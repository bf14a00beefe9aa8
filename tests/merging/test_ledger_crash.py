"""A ledger that is killed, damaged, out of space or used twice at once: old or new, never between, and it says so."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from merganser.errors import UserError
from merganser.merging import ledger
from merganser.merging.ledger import store

Family = Callable[..., tuple[Path, list[Path]]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing guards against power cuts, which no test makes; on a busy disk it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


#: Adds a contributor to each of several ledgers, in a child each, which kills itself (as ``kill -9`` does) when a
#: function is called for the n-th time. Prints how each child ended.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from merganser.checkpoints.writer import SafetensorsWriter
from merganser.merging import ledger

model, *cases = sys.argv[1:]
os.fsync = lambda descriptor: None
owners = {"write": SafetensorsWriter, "fsync": os, "replace": Path, "unlink": Path}

def add(folder, name, number):
    original, calls = getattr(owners[name], name), []

    def killed(*arguments, **settings):
        calls.append(1)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **settings)

    setattr(owners[name], name, killed)
    ledger.add(folder, model, threads=1)

ends = []
for case in cases:
    child = os.fork()
    if not child:
        add(*json.loads(case))
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""

#: Function, its how many-th call is the last, and whether the contributor is in the ledger then.
KILLS = [
    ("write", 1, False),  # the first sum of the new file
    ("write", 30, False),
    ("fsync", 1, False),  # every sum is written
    ("fsync", 3, False),  # ledger.json's successor is written
    ("replace", 1, False),
    ("fsync", 4, True),  # it has just been renamed
    ("unlink", 1, True),  # the old sums are still there
]


def test_a_killed_add_is_whole_or_not_there(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    start = ledger.init(tmp_path / "start", base)
    ledger.add(start, models[0])
    about = (start / "ledger.json").read_bytes()
    cases = []
    for number, (name, call, _) in enumerate(KILLS):
        shutil.copytree(start, tmp_path / f"sums-{number}")
        cases.append(json.dumps([str(tmp_path / f"sums-{number}"), name, call]))
    command = [sys.executable, "-c", KILLED, str(models[1]), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == [-signal.SIGKILL] * len(KILLS), done.stderr
    wanted = {}
    for there in (False, True):
        whole = shutil.copytree(start, tmp_path / f"whole-{there}")
        for model in models[1:] if there else models[2:]:
            ledger.add(whole, model)
        wanted[there] = (whole / str(ledger.show(whole).file)).read_bytes(), names(whole)
    left_over = 0
    for number, (_, _, there) in enumerate(KILLS):
        folder = tmp_path / f"sums-{number}"
        assert ((folder / "ledger.json").read_bytes() != about) == there
        left_over += len(list(folder.iterdir())) > 3
        ledger.add(folder, models[2])  # the lock went with its holder, and leftovers do not matter
        assert ((folder / str(ledger.show(folder).file)).read_bytes(), names(folder)) == wanted[there]
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "ledger.json", str(ledger.show(folder).file)]
    assert left_over >= 5  # there was something to tidy up


def names(folder: Path) -> list[str]:
    return [entry.name for entry in ledger.show(folder).contributors]


def test_a_failing_add_leaves_the_ledger_as_it_was(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = family("bert", 2)
    folder = ledger.init(tmp_path / "sums", base)
    ledger.add(folder, models[0])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    calls = []

    def full(*arguments: object) -> None:
        calls.append(1)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full; the ledger is as it was"):
        ledger.add(folder, models[1])
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr("merganser.files.space.free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match="too little disk: the new sums take"):
        ledger.add(folder, models[1])
    with pytest.raises(UserError, match="too little disk"):
        ledger.combine([folder, ledger.init(tmp_path / "other", base)], tmp_path / "total")
    with pytest.raises(UserError, match="too little disk: the result takes"):
        ledger.solve(folder, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "total").exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "foreign", "edited", "not json", "newer"])
def test_a_damaged_ledger_is_not_used(family: Family, tmp_path: Path, damage: str) -> None:
    base, models = family("bert", 2)
    folder = ledger.init(tmp_path / "sums", base)
    ledger.add(folder, models[0])
    sums, about = folder / str(ledger.show(folder).file), folder / "ledger.json"
    data = bytearray(sums.read_bytes())
    words = {
        "flipped": "does not have its recorded hash",
        "truncated": "the sums are damaged",
        "missing": "the sums are damaged",
        "foreign": "not those of this ledger",
        "edited": "damaged or was edited",
        "not json": "unreadable JSON",
        "newer": "a ledger of format 99",
    }
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        sums.write_bytes(data)
    elif damage == "truncated":
        sums.write_bytes(data[:-8])
    elif damage == "missing":
        sums.unlink()
    elif damage == "foreign":
        sums.write_bytes((models[0] / "model.safetensors").read_bytes())
    elif damage == "edited":
        about.write_text(about.read_text().replace('"coefficient": 1.0', '"coefficient": 2.0'))
    elif damage == "not json":
        about.write_text(about.read_text()[:-3])
    else:
        about.write_text(json.dumps({**json.loads(about.read_text()), "format": 99}))
    for work in (
        lambda: ledger.add(folder, models[1]),
        lambda: ledger.solve(folder, tmp_path / "out"),
        lambda: ledger.combine([ledger.init(tmp_path / "o", base), folder], tmp_path / "total"),
    ):
        if damage == "flipped" and work.__code__.co_names[0] == "solve":
            continue  # it may be a low half, which solving does not read
        with pytest.raises(UserError, match=words[damage]):
            work()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "o", "sums", "tuned-0", "tuned-1"]


def test_two_processes_take_turns(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family("bert", 1)
    folder = ledger.init(tmp_path / "sums", base)
    said: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("merganser.files.locks.logger.warning", lambda message, *_: said.put(message))
    thread = threading.Thread(target=ledger.add, args=(folder, models[0]))
    with FileLock(folder / store.LOCK):
        thread.start()
        assert "waiting for another process" in said.get(timeout=60)
        assert not ledger.show(folder).contributors
    thread.join(60)
    assert len(ledger.show(folder).contributors) == 1


def test_a_ledger_that_nobody_can_write_to_is_solved(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only share, where not even a lock can be made."""
    base, models = family("bert", 2)
    folder = ledger.init(tmp_path / "sums", base)
    ledger.add(folder, models[0])

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert ledger.solve(folder, tmp_path / "out").is_dir()
    with pytest.raises(UserError, match="cannot be written"):
        ledger.add(folder, models[1])
