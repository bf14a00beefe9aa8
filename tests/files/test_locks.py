"""Locks that one process at a time can hold."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from merganser.errors import FileError
from merganser.files import locked, locks

HOLDER = """
import sys, time
from pathlib import Path
from merganser.files import locked
with locked(Path(sys.argv[1]), "uses sums"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_waited_for_and_goes_with_a_holder_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "locks" / "a.lock", queue.Queue[str]()
    monkeypatch.setattr(locks.logger, "warning", lambda text, *more: said.put(text % more))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    held = threading.Event()

    def wait() -> None:
        with locked(path, "uses sums"):
            held.set()

    waiting = threading.Thread(target=wait)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(FileError, match="another process uses sums") as error,
            locked(path, "uses sums", wait=False),
        ):
            pass
        assert error.value.mend == "wait for it, or stop it"
        waiting.start()
        assert said.get(timeout=60) == "waiting for another process that uses sums" and not held.is_set()
    finally:
        holder.kill()
        holder.communicate()
    assert held.wait(60)
    waiting.join(60)
    with locked(path, "uses sums", wait=False):
        pass


def test_a_lock_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    number = errno.EROFS
    with pytest.raises(FileError, match="cannot be written"), locked(tmp_path / "lock", "uses it"):
        pass
    with locked(tmp_path / "lock", "uses it", needed=False):
        pass
    number = errno.ENOSPC
    with pytest.raises(FileError, match="the disk is full"), locked(tmp_path / "lock", "uses it", needed=False):
        pass
