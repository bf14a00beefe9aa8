"""Sizes as people write them, and whether a disk has room."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from merganser.errors import FileError, UserError


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``800MB`` or ``2GiB``.

    Raises:
        UserError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"{text!r} is not a size", mend="write it like 5GB or 800MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def human_bytes(count: float) -> str:
    """A size as people write it, such as ``91.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def free_bytes(target: Path) -> int:
    """Free space on the disk that ``target`` would lie on."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def space_error(
    target: Path, needed: int, what: str = "the result takes", mend: str = "free some space or write to another disk"
) -> FileError | None:
    """The error to raise where fewer than ``needed`` bytes are free for ``target``; ``what`` begins its sentence."""
    free = free_bytes(target)
    if needed <= free:
        return None
    text = f"too little disk: {what} {human_bytes(needed)}, {human_bytes(free)} are free"
    return FileError(text, where=target, mend=mend)
