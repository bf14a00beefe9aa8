"""Files and folders that are there whole or not at all.

Everything is written beside its place, flushed and renamed at the end, so that a process that fails or is killed leaves
what was there before. What takes the place of something else is exchanged with it in one call where the system has
one; where it has none, the next command puts the old one back if a process was killed in between.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

from merganser.errors import FileError
from merganser.files.claims import NEW, OLD, claimed, is_there, remove_dead

logger = logging.getLogger(__name__)

_LONGEST = 255 - len("..partial-") - 8  # bytes of a name that staging puts its own around
_STAGED = re.compile(r"\.(.+)\.partial-[0-9a-f]{8}")
#: Raises where what lies at a path may not be replaced.
Check = Callable[[Path], None]


# ── errors ──


@contextmanager
def writing(target: Path, kept: str = "") -> Iterator[None]:
    """Turn what the system says while ``target`` is written into an error for the user.

    Args:
        target: named in the error.
        kept: what the error says of a full disk besides, such as that the old file is still there.

    Raises:
        FileError: the disk is full, or ``target`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise write_error(target, error, kept) from None
    except SafetensorError as error:
        if "while serializing" not in str(error):
            raise  # it is about a file that was read
        raise write_error(target, error, kept) from None


def write_error(target: Path, error: Exception, kept: str = "") -> FileError:
    """The error for the user, of what the system said while ``target`` was written (see :func:`writing`)."""
    numbers = (errno.ENOSPC, errno.EDQUOT)  # safetensors gives them in its text alone
    if getattr(error, "errno", None) in numbers or any(f"os error {n})" in str(error) for n in numbers):
        what = f"the disk is full; {kept}" if kept else "the disk is full"
        return FileError(what, where=target, mend="free some space or choose another disk")
    what = f"cannot be written: {error}"
    return FileError(what, where=target, mend="check the path and its permissions")


# ── whole or not at all ──


@contextmanager
def new_file(target: Path, *, check: Check | None = None) -> Iterator[Path]:
    """A path to write a file at; flushed and renamed to ``target`` when the block ends well.

    Args:
        target: the file; one that is there is replaced.
        check: raises where what is there by then may not be replaced.

    Raises:
        FileError: the disk is full, or the file cannot be written.
    """
    with writing(target), _staged(target) as work:
        yield work / NEW
        sync(work / NEW)
        _put(work, target, check)
        sync(target.parent)


@contextmanager
def new_folder(target: Path, *, check: Check | None = None) -> Iterator[Path]:
    """A folder to fill; flushed and renamed to ``target`` when the block ends well, removed when it does not.

    Args:
        target: the folder; must not be there, unless ``check`` is given.
        check: raises where what is there by then may not be replaced.

    Raises:
        FileError: the disk is full, or the folder cannot be written.
    """
    target = target.absolute()
    with writing(target), _staged(target) as work:
        (work / NEW).mkdir()
        yield work / NEW
        _sync_all(work / NEW)
        _put(work, target, check)
        sync(target.parent)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for what it is made of, removed at the end, or by the next writer of ``target``.

    Raises:
        FileError: the disk is full, or the folder cannot be made.
    """
    with writing(target), _staged(target) as work:
        (work / NEW).mkdir()
        yield work / NEW


def write_bytes(path: Path, data: bytes, *, check: Check | None = None) -> Path:
    """Write a file, whole or not at all; see :func:`new_file`.

    Raises:
        FileError: the disk is full, or the file cannot be written.
    """
    with new_file(path, check=check) as work:
        work.write_bytes(data)
    return path


def write_text(path: Path, text: str, *, check: Check | None = None) -> Path:
    """Write a UTF-8 text file, whole or not at all; see :func:`new_file`.

    Raises:
        FileError: the disk is full, or the file cannot be written.
    """
    return write_bytes(path, text.encode(), check=check)


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of ``target`` have left beside it, and put back what one had moved away; say so.

    What living processes are writing stays. Every writer of ``target`` calls this first.
    """
    if count := remove_dead(target.parent, _staging_prefix(target), target):
        what = "a command that was" if count == 1 else f"{count} commands that were"
        logger.warning("%s: removed what %s killed had left beside it", target, what)


def remove_leftovers_in(folder: Path) -> None:
    """The same of everything in a folder, for a command that may write none of what killed ones were writing there."""
    names = {match[1] for path in folder.glob(".*.partial-*") if (match := _STAGED.fullmatch(path.name))}
    for name in sorted(names):
        remove_leftovers(folder / name)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a network file system that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    """Flush everything in a folder, inner ones first, then the folder itself."""
    for place, folders, names in os.walk(folder, topdown=False):
        del folders  # each was a place before
        for name in names:
            if (path := Path(place, name)).is_file() and not path.is_symlink():
                sync(path)
        sync(Path(place))


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A claimed folder beside ``target``; no pattern such as ``*.json`` matches it or what is made in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with claimed(target.parent, _staging_prefix(target)) as work:
        yield work


def _staging_prefix(target: Path) -> str:
    """The beginning of names beside ``target``, which fit where its own name fits."""
    name = target.name
    if len(raw := os.fsencode(name)) > _LONGEST:
        digest = hashlib.sha256(raw).hexdigest()[:16]
        name = raw[: _LONGEST - len(digest) - 4].decode(errors="ignore") + digest
    return f".{name}.partial-"


# ── taking the place of something else ──


def _put(work: Path, target: Path, check: Check | None) -> None:
    """Rename what was made in a claimed folder to ``target``; what lay there goes into the claimed folder.

    ``check`` sees what lay there once it cannot change any more by its name; where it raises, everything is as it was.
    Without one it is an ordinary rename, which replaces a file and no folder.
    """
    new, old = work / NEW, work / OLD
    if check is None or not is_there(target):
        new.replace(target)
    elif _exchange(new, target):
        try:
            check(new)
        except BaseException:
            _exchange(new, target)
            raise
    else:
        try:
            target.rename(old)
            check(old)
            new.rename(target)
        except BaseException:
            if is_there(old) and not is_there(target):
                old.rename(target)
            raise


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two files or folders in one call; False where the system or the file system cannot."""
    rename = _exchanging_rename()
    if rename is None:
        return False
    if rename(os.fsencode(one), os.fsencode(two)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(two))


@cache
def _exchanging_rename() -> Callable[[bytes, bytes], int] | None:
    """The system's call that exchanges two paths; None where it has none."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap and (lambda one, two: int(swap(one, two, ctypes.c_uint(2))))  # RENAME_SWAP
    exchange, here = getattr(library, "renameat2", None), ctypes.c_int(-100)  # AT_FDCWD
    return exchange and (lambda one, two: int(exchange(here, one, here, two, ctypes.c_uint(2))))  # RENAME_EXCHANGE
