"""The folder of an experiment's results: what is there, and whether this version may go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.errors import DataError
from merganser.experiments.grid.compute import FORMAT
from merganser.experiments.grid.config import ExperimentConfig
from merganser.experiments.report import write_text


def open_folder(folder: Path, config: ExperimentConfig) -> None:
    """Make the results' folder, or check that this version may go on in it."""
    marker = folder / "experiment.json"
    if marker.is_file():
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))["format"]
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
    values: Mapping[str, Any] = {"format": FORMAT, "config": config.model_dump(mode="json")}
    write_text(marker, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def finished(folder: Path) -> set[str]:
    """The ids of the cells whose rows are there."""
    return {path.stem for path in (folder / "cells").glob("*.json")}


def set_aside(folder: Path, current: set[str]) -> None:
    """Rows of cells that the configuration no longer has go to ``other-cells``: kept, and not reported."""
    for name in finished(folder) - current:
        (folder / "other-cells").mkdir(exist_ok=True)
        (folder / "cells" / f"{name}.json").replace(folder / "other-cells" / f"{name}.json")
