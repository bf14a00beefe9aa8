"""One command in a fork of this process, which is stopped by a signal just before the n-th thing it does to files.

What a command does to files is told by Python's audit events, and by the calls of :mod:`os` that have none. So every
window between two such acts can be met, not by luck. Nothing is flushed to disk: that guards against power cuts, which
this does not make.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The audit events that change what is on disk.
_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "fcntl.flock"}
_CALLS = ("fsync", "pwrite")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_HANGS = 120.0  # seconds after which a command is taken for one that hangs


@dataclass(frozen=True)
class Stop:
    """When a command is stopped, and by what.

    Attributes:
        signal: which.
        act: just before its how many-th act, counted from 0; None: by time.
        seconds: after so many, where ``act`` is None.
    """

    signal: int
    act: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        when = f"after {self.seconds:.2f} s" if self.act is None else f"before act {self.act}"
        return f"{signal.Signals(self.signal).name} {when}"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status, negative: the signal that ended it.
        said: what it wrote to standard output and standard error.
        acts: what it did to files, in order, where it was not stopped.
        seconds: that it took.
    """

    status: int
    said: str
    acts: tuple[str, ...]
    seconds: float


def run(command: Sequence[str] | Callable[[], object], world: Path, logs: Path, stop: Stop | None = None) -> Ended:
    """Run a command in a folder; scratch space is ``tmp`` in there, the object store ``store``.

    Args:
        command: arguments of ``merganser``, or a function.
        world: the folder.
        logs: a folder outside of it for what the command says.
        stop: when it is stopped; None: never.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _work(command, world, logs, stop)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = _wait(child, stop)
    acts = (logs / "acts").read_text().splitlines() if stop is None and (logs / "acts").is_file() else []
    said = (logs / "said").read_text(errors="replace")
    return Ended(status, said, tuple(acts), time.monotonic() - started)


def _wait(child: int, stop: Stop | None) -> int:
    started, waiting = time.monotonic(), stop is not None and stop.act is None
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # what it has started must not outlive it
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if waiting and stop is not None and passed >= stop.seconds:
            waiting = False
            os.killpg(child, stop.signal) if stop.signal == signal.SIGKILL else os.kill(child, stop.signal)
        if passed > _HANGS:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


def _work(command: Sequence[str] | Callable[[], object], world: Path, logs: Path, stop: Stop | None) -> int:
    from merganser.cli import main

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    log = os.open(logs / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(_HANGS - 20, file=log)  # where it hangs, if it does
    places = {"TMPDIR": "tmp", "KEPT_STORE": "store", "XDG_CACHE_HOME": "cache"}
    os.environ.update({name: str(world / place) for name, place in places.items()}, COLUMNS="200")
    tempfile.tempdir = str(world / "tmp")  # Python itself would try it out with a file, and a kill would leave this
    os.chdir(world)
    acts = _watch(world, stop)
    status = 0
    try:
        main(list(command)) if not callable(command) else command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if stop is None:
        (logs / "acts").write_text("\n".join(list(acts)))
    return status


def _watch(world: Path, stop: Stop | None) -> list[str]:
    """Note every act, and stop this process before the one that is to be its last."""
    acts: list[str] = []
    within = str(world)

    def act(name: str) -> None:
        acts.append(name)
        if stop is not None and stop.act == len(acts) - 1:
            if stop.signal == signal.SIGKILL:
                os.killpg(0, stop.signal)
            else:
                os.kill(os.getpid(), stop.signal)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            act(f"{event} {' '.join(str(one) for one in arguments[:2])}".replace(within, "").replace("\n", " "))
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            path = "" if isinstance(arguments[0], int) else str(Path(os.fsdecode(arguments[0])).absolute())
            if path.startswith(within):
                act(f"open {path.removeprefix(within)}")

    for name in _CALLS:
        setattr(os, name, _told(act, name, getattr(os, name)))
    sys.addaudithook(hook)
    return acts


def _told(act: Callable[[str], None], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def told(*arguments: Any) -> Any:
        act(name)
        return None if name == "fsync" else original(*arguments)

    return told
