"""What verbs return: results that can be used as the path of what was written, and that notebooks show as tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


class PathResult(os.PathLike[str]):
    """The result of a verb that writes a file or a folder: wherever a path is wanted, its path.

    Attributes:
        path: of what was written, as it was given.
    """

    path: str | Path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return Path(self.path) / name

    def __getattr__(self, name: str) -> Any:
        """What only paths have, such as ``glob``."""
        if name.startswith("__") or name == "path":
            raise AttributeError(name)
        return getattr(Path(self.path), name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (str, os.PathLike)) and os.fspath(self) == os.fspath(other)

    def __hash__(self) -> int:
        return hash(os.fspath(self))


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """A table as a notebook shows it, with notes below."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    table = f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return table + (f"<ul>{listed}</ul>" if listed else "")
