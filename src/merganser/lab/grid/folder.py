"""The folder of an experiment's results: what is there, and whether this version may go on in it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.errors import DataError
from merganser.files import write_text
from merganser.lab.grid.compute import FORMAT
from merganser.lab.grid.config import ExperimentConfig

MARKER = "experiment.json"


def results_name(folder: Path, config: ExperimentConfig) -> str:
    """What contributors with ``load_from_zoo: no`` are trained for: these results, once.

    A new name where there are no results yet, and none where no contributor asks for it.
    """
    if all(args.load_from_zoo != "no" for args in config.contributors.values()):
        return ""
    return recorded_name(folder) or uuid.uuid4().hex


def recorded_name(folder: Path) -> str:
    """The name of :func:`results_name` that the results have; empty where they have none."""
    try:
        return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["trained_for"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def open_folder(folder: Path, config: ExperimentConfig, fresh: str = "") -> None:
    """Make the results' folder, or check that this version may go on in it.

    Args:
        folder: of the experiment.
        config: written into it.
        fresh: of :func:`results_name`; an earlier one is kept where this run has none.
    """
    marker = folder / MARKER
    earlier: Mapping[str, Any] = {}
    if marker.is_file():
        try:
            earlier = json.loads(marker.read_text(encoding="utf-8"))
            found = earlier["format"]
        except (OSError, ValueError, KeyError, TypeError):
            found = "unreadable"
        if found != FORMAT:
            raise DataError(
                f"results of format {found}; this version of merganser writes {FORMAT}",
                where=marker,
                mend="choose another --results folder, or use the version that wrote them",
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            "the folder holds something else than results of an experiment",
            where=folder,
            mend="choose another --results folder",
        )
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    values = {
        "format": FORMAT,
        "trained_for": fresh or earlier.get("trained_for", ""),
        "config": config.model_dump(mode="json"),
    }
    write_text(marker, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def finished(folder: Path) -> set[str]:
    """The ids of the cells whose rows are there."""
    return {path.stem for path in (folder / "cells").glob("*.json")}


def recall(folder: Path, wanted: set[str]) -> None:
    """Rows that an earlier version has set aside in ``other-cells`` come back where they are wanted."""
    for path in (folder / "other-cells").glob("*.json"):
        if path.stem in wanted:
            path.replace(folder / "cells" / path.name)
