"""What killed processes leave is removed by the next command, and what living ones have never is."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from merganser.files import claims, scratch_folder
from merganser.files.claims import claimed, remove_dead

HOLDER = """
import sys, time
from pathlib import Path
from merganser.files.claims import claimed, scratch_folder
with claimed(Path(sys.argv[1]), ".out.partial-") as folder, scratch_folder() as scratch:
    (folder / "new").mkdir()
    (folder / "new" / "half").write_text("half of it")
    (scratch / "half").write_text("half of it")
    print(folder, scratch, flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """A process that holds a claimed folder and a scratch folder until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            claim, scratch = process.stdout.readline().split()
            yield process, Path(claim), Path(scratch)
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return place


def test_only_what_dead_processes_had_is_removed(
    tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(tmp_path) as (process, claim, scratch):
        assert remove_dead(tmp_path, ".out.partial-") == 0
        with scratch_folder() as own:
            assert own.is_dir() and not list(own.iterdir()) and own.parent.stat().st_mode & 0o777 == 0o700
        assert (claim / "new" / "half").exists() and (scratch / "half").exists() and not own.parent.exists()
        assert not caplog.messages
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (claim / "new" / "half").exists() and (scratch / "half").exists()
        assert remove_dead(tmp_path, ".other.partial-") == 0 and claim.exists()
        assert remove_dead(tmp_path, ".out.partial-") == 1 and not claim.exists()
        with scratch_folder():
            assert not scratch.exists() and len(caplog.messages) == 1
        assert not list(temporary.iterdir())


def test_what_is_not_ours_stays(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = temporary / "merganser-00000000"  # a folder of somebody's without our lock
    (mine / "thesis").mkdir(parents=True)
    (temporary / "merganser-thesis").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("")
    (temporary / "merganser-11111111").symlink_to(elsewhere)
    linked = temporary / "merganser-22222222"  # whose lock is a link
    linked.mkdir()
    (linked / "lock").symlink_to(elsewhere / "lock")
    (temporary / "merganser-33333333").write_text("a file")
    before = sorted(temporary.rglob("*"))
    with scratch_folder():
        pass
    assert sorted(temporary.rglob("*")) == before and (elsewhere / "lock").exists()
    dead = temporary / "merganser-44444444"
    dead.mkdir()
    (dead / "lock").write_text("")
    monkeypatch.setattr(os, "geteuid", lambda: dead.stat().st_uid + 1)
    assert remove_dead(temporary, "merganser-", private=True) == 0 and dead.exists()
    monkeypatch.undo()
    assert remove_dead(temporary, "merganser-", private=True) == 1 and not dead.exists()


def test_another_machines_are_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of a shared folder may not reach from one machine to another; those after a restart are of this one."""
    dead = tmp_path / ".out.partial-00000000"
    for machine, count in (
        (("other", "other"), 0),
        (("other", claims._machine()[1]), 1),
        ((claims._machine()[0], "x"), 1),
    ):
        dead.mkdir(exist_ok=True)
        (dead / "lock").write_text(" ".join(machine))
        assert remove_dead(tmp_path, ".out.partial-") == count and dead.exists() == (count == 0)


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claimed(tmp_path, ".out.partial-") as folder:
        assert remove_dead(tmp_path, ".out.partial-") == 0 and folder.exists()
    assert not folder.exists()


def test_those_who_claim_and_those_who_tidy_do_not_harm_each_other(tmp_path: Path) -> None:
    """A folder that is taken for a dead one's before it is locked is made again."""
    stop, lost = threading.Event(), list[Path]()

    def tidy() -> None:
        while not stop.is_set():
            remove_dead(tmp_path, ".out.partial-")

    tidying = [threading.Thread(target=tidy) for _ in range(2)]
    for thread in tidying:
        thread.start()
    for _ in range(300):
        with claimed(tmp_path, ".out.partial-") as folder:
            (folder / "new").write_text("x")
            if not (folder / "lock").exists():
                lost.append(folder)
    stop.set()
    for thread in tidying:
        thread.join()
    assert not lost and not [path for path in tmp_path.iterdir() if path.name != "tmp"]


def test_further_interrupts_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, calls = claims.remove, []

    def interrupted(path: Path) -> None:
        calls.append(path)
        if len(calls) < 4:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(claims, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path, ".out.partial-") as folder:
        (folder / "new").write_text("x")
        raise KeyboardInterrupt
    assert len(calls) == 4 and not folder.exists()


def test_a_fork_neither_removes_nor_holds_what_its_parent_has(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
from merganser.files.claims import claimed
try:
    with claimed(Path(sys.argv[1]), ".out.partial-") as folder:
        child = os.fork()
        if child == 0:
            raise RuntimeError("the child unwinds its copy of the stack")
        os.waitpid(child, 0)
        assert folder.exists()
        child = os.fork()
        if child == 0:
            os.close(1)
            time.sleep(600)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
except RuntimeError:
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    try:
        assert remove_dead(tmp_path, ".out.partial-") == 1
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize("call", ["open", "write", "fstat"])
def test_ctrl_c_while_a_folder_is_being_claimed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, call, interrupted)
        with claimed(tmp_path, "x-"):
            raise AssertionError("claimed all the same")
    assert not list(tmp_path.glob("x-*"))
