"""Folders that one process works in, and that are removed when it is through with them, or by others once it is dead.

Everything unfinished lies in such a folder: what is written beside its place, and scratch in the system's folder for
temporary files. Its owner holds a lock on a file in it, which the kernel releases when the owner dies, however it
dies. So the next command can tell litter from the work of a living process: it takes the lock or it does not.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

#: Inside a claimed folder: the file with the lock, what is being made, and what it takes the place of.
LOCK, NEW, OLD = "lock", "new", "old"
_SCRATCH = "merganser-"
_DIGITS = 8
_held: set[int] = set()


# ── claiming ──


@contextmanager
def claimed(parent: Path, prefix: str, mode: int = 0o777) -> Iterator[Path]:
    """A new folder ``<parent>/<prefix><8 hex digits>``, this process's own; it is removed at the end.

    Where the file system has no locks there is none, and others let the folder be.

    Args:
        parent: the folder to make it in, which must exist.
        prefix: of its name.
        mode: its permissions, before the process's mask.
    """
    folder, descriptor = _claim(parent, prefix, mode)
    owner = os.getpid()
    _held.add(descriptor)
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # a fork that unwinds its copy of the stack leaves its parent's work alone
            try:
                _remove_whole(folder)
            finally:
                _held.discard(descriptor)
                os.close(descriptor)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for what nobody keeps, removed at the end; before it, what dead processes of this user have left.

    Args:
        parent: by default the system's folder for temporary files.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_dead_scratch(parent)
    with claimed(parent, _SCRATCH, 0o700) as folder:
        (folder / NEW).mkdir()
        yield folder / NEW


def remove_dead_scratch(parent: Path) -> None:
    """Remove the scratch folders that dead processes of this user have left in a folder, and say so."""
    if count := remove_dead(parent, _SCRATCH, private=True):
        logger.warning("removed scratch of %s killed earlier from %s", _counted(count, "command"), parent)


def lasting_scratch() -> Path:
    """A scratch folder that is there until this process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder())


def _claim(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
    """Make a folder and lock it; again where another process took the new folder for a dead one's meanwhile."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(_DIGITS // 2)}"
        descriptor = -1
        try:
            folder.mkdir(mode)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, " ".join(_machine()).encode())
            if _is_at(descriptor, folder / LOCK):
                return folder, descriptor
            os.close(descriptor)
        except (FileExistsError, FileNotFoundError):
            pass  # the name is taken, or another process has removed the folder before the lock was there
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            _remove(folder)
            raise
        if not parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(parent))


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path; not where it was removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@cache
def _machine() -> tuple[str, str]:
    """Hashes of what tells this machine from others: the running kernel, which containers share, and its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # no Linux
        boot = secrets.token_hex()
    first, second = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (boot, os.uname().nodename))
    return first, second


def _forget() -> None:
    """In a forked child: let go of the parent's locks, which would else live as long as the child."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


# ── what dead processes have left ──


def remove_dead(parent: Path, prefix: str, target: Path | None = None, *, private: bool = False) -> int:
    """Remove the folders that :func:`claimed` has made for processes that are dead by now.

    A folder is let be while its owner lives, where its lock cannot be had, and where it is another machine's, whose
    locks may not reach here.

    Args:
        parent: the folder they lie in.
        prefix: as it was given to :func:`claimed`.
        target: what they were to become. An old one that was moved away and nothing had taken its place is put back.
        private: only those that belong to this user.

    Returns:
        How many were removed.
    """
    pattern, count = re.compile(re.escape(prefix) + rf"[0-9a-f]{{{_DIGITS}}}"), 0
    with suppress(OSError, ValueError):  # a name that no folder can have
        for entry in os.scandir(parent):
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                if private and entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                    continue
                with suppress(OSError):
                    count += _take_over(Path(entry.path), target)
    return count


def _take_over(folder: Path, target: Path | None) -> bool:
    """Remove a folder whose owner is dead, and put back what it had moved away; whether there was anything to do."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        folder.rmdir()  # only an empty one; one that is just being made is made again
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = os.read(descriptor, 100).decode("ascii", "replace").split()
        if not _is_at(descriptor, folder / LOCK) or (owner and not set(owner) & set(_machine())):
            return False
        if target is not None and is_there(folder / OLD) and is_there(folder / NEW):  # killed between two renames
            if is_there(target):
                logger.warning("%s is what was at %s before: move it where you want it", folder / OLD, target)
                return False
            (folder / OLD).rename(target)
            logger.warning("%s was moved away by a command that was killed, and is back", target)
        _remove(folder)
        return True
    finally:
        os.close(descriptor)


def is_there(path: Path) -> bool:
    """Whether there is anything at a path, be it a link to nowhere."""
    return os.path.lexists(path)


def _remove(folder: Path) -> None:
    """Remove a claimed folder, the lock last: without it nobody knows whose the rest is."""
    with suppress(OSError):  # what is left is in nobody's way, and the next command's
        for path in folder.iterdir():
            if path.name != LOCK:
                remove(path)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _remove_whole(folder: Path) -> None:
    """Remove a claimed folder; interrupts come through afterwards, so that impatient users do not leave half of it."""
    interrupt: KeyboardInterrupt | None = None
    while is_there(folder):
        try:
            _remove(folder)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count > 1 else "")
