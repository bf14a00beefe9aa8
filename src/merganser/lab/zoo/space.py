"""Where a zoo makes things: locks, unfinished folders and scratch folders, hidden in the folder of the zoo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from merganser.files import locked, remove


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

    def lock(self, name: str, *, wait: bool = True) -> AbstractContextManager[None]:
        """Hold the lock of an entry or of a file beside it."""
        return locked(self.root / ".locks" / f"{name}.lock", f"makes {name} in {self.root}", wait=wait)

    @contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """An empty folder to make something in, under the lock of that name; whatever is left in it is removed."""
        folder = self.root / ".partial" / name
        remove(folder)  # of a maker that was killed
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            remove(folder)
