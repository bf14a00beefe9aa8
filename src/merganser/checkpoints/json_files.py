"""JSON files of a checkpoint, as data from a stranger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merganser.errors import CheckpointError


def read_json(path: Path, missing: Any = None) -> Any:
    """A JSON file that holds an object; ``missing`` where there is none.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    if not path.is_file():
        return missing
    value = parse(path)
    if not isinstance(value, dict):
        raise CheckpointError("a JSON object is expected", where=path, mend="restore the file")
    return value


def parse(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"unreadable JSON: {error}", where=path, mend="restore the file") from None
