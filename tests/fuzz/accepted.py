"""Why accepted changes are right, as ``accepted.md`` says; it is read from there."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("accepted.md")


@cache
def _rows() -> tuple[tuple[str, str, str], ...]:
    lines = [line.strip("|").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line) for line in lines[1:]]
    return tuple((kind, pattern, why) for kind, pattern, why in rows)


def reason(kind: str, accepted: str) -> str | None:
    """Why a change is accepted, by its kind and class; None where nobody has looked at it."""
    file, _, change = accepted.partition(": ")
    name = f"{file.rpartition('/')[2]}: {change}"
    return next((why for of, pattern, why in _rows() if of in (kind, "*") and fnmatchcase(name, pattern)), None)


def unnamed(found: Iterable[tuple[str, str]]) -> list[str]:
    """The accepted classes of (kind, class) that no row names, each once."""
    return sorted({f"{kind} {accepted}" for kind, accepted in found if accepted and reason(kind, accepted) is None})
