"""Locks that one process at a time can hold, and that go with it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merganser.errors import FileError
from merganser.files.atomic import write_error

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, use: str, *, wait: bool = True, needed: bool = True) -> Iterator[None]:
    """Hold a lock that one process at a time can hold; the system drops it when its holder dies.

    Args:
        path: the lock file, which is made and stays.
        use: what the holder does, such as ``uses sums``: for the warning while waiting, and the error.
        wait: False: raise where another process holds the lock.
        needed: False: go without a lock where none can be made. What nobody can write to, nobody changes.

    Raises:
        FileError: another process holds the lock, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                mend = "wait for it, or stop it"
                raise FileError(f"another process {use}", where=path, mend=mend) from None
            logger.warning("waiting for another process that %s", use)
            lock.acquire()
    except OSError as error:
        if needed or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise write_error(path, error) from None
    try:
        yield
    finally:
        lock.release()
