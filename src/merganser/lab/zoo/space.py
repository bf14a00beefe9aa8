"""Where a zoo makes things: locks, unfinished folders and scratch folders, hidden in the folder of the zoo."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merganser.lab.zoo.keys import ZooError
from merganser.lab.zoo.places import discard

logger = logging.getLogger(__name__)


class Space:
    """The hidden folders ``.locks``, ``.partial`` and ``.work`` of a zoo.

    Args:
        root: the local folder of the zoo; it is made when something is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def scratch(self, identity: str) -> Path:
        """The scratch folder for the training of an entry; it may not be there."""
        return self.root / ".work" / identity

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock of an entry or of a file beside it; it is dropped when its holder dies."""
        from filelock import FileLock, Timeout

        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".locks" / f"{name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise ZooError(
                        f"{name} is being made", where=self.root, mend="wait for it, or stop its maker"
                    ) from None
                logger.warning("waiting for another process that makes %s in %s", name, self.root)
                lock.acquire()
        except OSError as error:
            raise ZooError(
                f"cannot be written: {error}",
                where=self.root,
                mend="check the path, its permissions and space",
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """An empty folder to make something in, under the lock of that name; whatever is left in it is removed."""
        folder = self.root / ".partial" / name
        discard(folder)  # of a maker that was killed
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            discard(folder)
