"""How much memory there is, how much is taken, and a budget that threads draw on."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _INFO = Path("/proc/self/status"), Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_UNLIMITED = 1 << 60
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT, _MAPPED = 256 * 2**20, 8 * 2**20


def anonymous_bytes() -> int:
    """The memory of this process that no file stands behind; where the system does not tell, its peak so far."""
    found = _entry(_STATUS, "RssAnon")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def available_bytes() -> int:
    """The memory that could still be taken; a very large number where the system does not tell."""
    found = _entry(_INFO, "MemAvailable")
    free = _UNLIMITED if found is None else found
    for path in _LIMITS:
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # another system, or "max"
            continue
        free = min(free, max(limit - anonymous_bytes(), 0))
    return free


def keep_freed() -> None:
    """Let the allocator keep what is freed of small buffers, for the rest of this process; does nothing without glibc.

    A slice's buffers would otherwise go back to the system and be cleared page by page for the next slice.
    """
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
    except (OSError, AttributeError, TypeError):  # another system
        return


def _entry(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class Budget:
    """Bytes that are drawn and given back, from any thread.

    Args:
        total: how many there are. Something larger is let through when nothing else is drawn.
    """

    def __init__(self, total: int) -> None:
        self._total, self._drawn = total, 0
        self._changed = threading.Condition()

    def draw(self, nbytes: int) -> None:
        """Wait until there is room for so many bytes, and take them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._drawn or self._drawn + nbytes <= self._total)
            self._drawn += nbytes

    @contextmanager
    def returning(self, nbytes: int) -> Iterator[None]:
        """Give bytes that were drawn back at the end of the block."""
        try:
            yield
        finally:
            with self._changed:
                self._drawn -= nbytes
                self._changed.notify_all()
