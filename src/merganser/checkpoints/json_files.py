"""JSON files of a checkpoint, as data from a stranger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from merganser.documents import read_json as read_document
from merganser.errors import CheckpointError
from merganser.paths import inside


def read_json(path: Path, missing: Any = None) -> Any:
    """A JSON file that holds an object; ``missing`` where there is none.

    Raises:
        CheckpointError: it is not JSON, not an object, no plain file, or a link that leads out of its folder.
    """
    if not os.path.lexists(path):
        return missing
    value = parse(path)
    if not isinstance(value, dict):
        raise CheckpointError("a JSON object is expected", where=path, mend="restore the file")
    return value


def parse(path: Path) -> Any:
    """What a JSON file holds; configurations may have infinite numbers.

    Raises:
        CheckpointError: it is not JSON, no plain file, or a link that leads out of its folder.
    """
    if path.is_symlink():
        inside(path.parent, path.name, CheckpointError, where=path.parent, what="the file")
    return read_document(path, CheckpointError, finite=False)
