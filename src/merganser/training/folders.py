"""A model folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merganser.errors import CheckpointError


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Raise before any work when ``folder`` may not be written.

    Raises:
        CheckpointError: it is a file, or a folder that is not empty while ``overwrite`` is off.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not overwrite:
            raise CheckpointError(
                "the output folder exists", where=folder, mend="choose another, or allow it to be overwritten"
            )
    elif folder.exists():
        raise CheckpointError("the output is a file", where=folder, mend="choose a folder")


@contextmanager
def whole_or_nothing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends without an error.

    Raises:
        CheckpointError: see :func:`refuse_existing`.
    """
    refuse_existing(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's is private
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
