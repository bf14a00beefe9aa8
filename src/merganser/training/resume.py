"""Going on from a training that was killed: whose checkpoints a work folder holds, and which one is the last."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merganser.errors import UserError
from merganser.tasks.data import Rows
from merganser.training.heads import Start
from merganser.training.loop import STATE, state_of
from merganser.training.settings import TrainingSettings

_JOURNAL = "training.json"  # in a work folder: what its checkpoints are of


def fingerprint(
    parts: Sequence[tuple[Start, Rows, Rows | None]], settings: TrainingSettings, more: tuple[Any, ...]
) -> str:
    """The hash of everything that the weights depend on.

    Args:
        parts: base and head, training data and development data of each data set.
        settings: hyper-parameters.
        more: whatever else.
    """
    facts = {
        "parts": [
            {
                "base": start.opened.checkpoint.manifest_sha256(),
                "config": dict(start.config),
                "keeps_head": start.keeps_head,
                "task": [type(start.task).__name__, repr(start.task)],
                "labels": start.labels,
                "rows": [rows.rows, sorted(rows.class_names.items())],
                "dev": None if dev is None else [dev.rows, sorted(dev.class_names.items())],
            }
            for start, rows, dev in parts
        ],
        "settings": settings.model_dump(),
        "more": more,
        "versions": [version(name) for name in ("torch", "transformers", "accelerate")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def take_up(work: Path, key: str) -> Path | None:
    """The checkpoint to go on from, if the work folder holds this training; else the folder is emptied.

    Raises:
        UserError: the folder holds something else than a training's checkpoints.
    """
    if work.exists() and not work.is_dir():
        raise UserError("the work folder is a file", where=work, mend="give a folder")
    journal = work / _JOURNAL
    if work.is_dir() and any(work.iterdir()) and not journal.is_file():
        what = "the work folder holds something other than a training, so it is left alone"
        raise UserError(what, where=work, mend="give an empty or a new folder")
    if journal.is_file() and journal.read_text(encoding="utf-8") == _journal(key):
        return last_checkpoint(work)
    clear(work)
    work.mkdir(parents=True, exist_ok=True)
    journal.write_text(_journal(key), encoding="utf-8")
    return None


def _journal(key: str) -> str:
    return json.dumps({"training": key}) + "\n"


def clear(work: Path) -> None:
    """Remove a training's checkpoints, and the folder if nothing else is in it.

    First goes what says that a checkpoint is whole, so that none is gone on from that was removed in part.
    """
    checkpoints = list(work.glob("checkpoint-*"))
    for path in checkpoints:
        (path / STATE).unlink(missing_ok=True)
    for path in checkpoints:
        shutil.rmtree(path, ignore_errors=True)
    (work / _JOURNAL).unlink(missing_ok=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def last_checkpoint(scratch: Path) -> Path | None:
    """The last checkpoint that was written whole."""
    found = []
    for path in scratch.glob("checkpoint-*"):
        try:
            state_of(path)
        except UserError:
            continue
        found.append(path)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
