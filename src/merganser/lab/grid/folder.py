"""The folder of an experiment's results: what is there, whether this version may go on in it, and a greedy order."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from merganser.documents import read_json
from merganser.errors import DataError, UserError
from merganser.files import Output, remove_leftovers, remove_leftovers_in, write_text
from merganser.lab.grid.cells import expand, models_of
from merganser.lab.grid.compute import FORMAT, score
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.models import Models
from merganser.lab.suites.base import DEV
from merganser.lab.zoo import id_of

MARKER, ORDER = "experiment.json", "order.json"


def results_name(folder: Path, config: ExperimentConfig) -> str:
    """What contributors with ``load_from_zoo: no`` are trained for: these results, once.

    A new name where there are no results yet, and none where no contributor asks for it.
    """
    if all(args.load_from_zoo != "no" for args in config.contributors.values()):
        return ""
    return recorded_name(folder) or uuid.uuid4().hex


def recorded_name(folder: Path) -> str:
    """The name of :func:`results_name` that the results have; empty where they have none."""
    return str(_read(folder / MARKER).get("trained_for", ""))


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is not there, or is no object."""
    try:
        values = read_json(path)
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}


def open_folder(folder: Path, config: ExperimentConfig, fresh: str = "") -> None:
    """Make the results' folder, which :func:`check_folder` has found fit, or go on in it.

    Args:
        folder: of the experiment.
        config: written into it.
        fresh: of :func:`results_name`; an earlier one is kept where this run has none.
    """
    marker = folder / MARKER
    earlier = _read(marker)
    name = fresh or earlier.get("trained_for", "")
    values = {"format": FORMAT, "trained_for": name, "config": config.model_dump(mode="json")}
    write_text(marker, json.dumps(values, indent=1, ensure_ascii=False) + "\n")  # before anything else lies there
    (folder / "cells").mkdir(exist_ok=True)
    for place in (folder, folder / "cells"):
        remove_leftovers_in(place)


def check_folder(folder: Path) -> None:
    """Check that results can be written to a folder, and that it holds nothing else than such of this version.

    Raises:
        DataError: it holds something else.
        FileError: nothing can be written there.
    """
    marker, other = folder / MARKER, "choose another --results folder"
    real = folder.resolve() if os.path.isdir(folder) else folder  # noqa: PTH112 (of any name at all)
    Output(real, lambda _: None, True).raise_problem()  # nothing in it is ever replaced
    remove_leftovers(marker)
    if marker.is_file():
        found = _read(marker).get("format", "unreadable")
        if found != FORMAT:
            what = f"results of format {found}; this version of merganser writes {FORMAT}"
            raise DataError(what, where=marker, mend=f"{other}, or use the version that wrote them")
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError("the folder holds something else than results of an experiment", where=folder, mend=other)


def finished(folder: Path) -> set[str]:
    """The ids of the cells whose rows are there."""
    return {path.stem for path in (folder / "cells").glob("*.json")}


def recorded_order(models: Models, folder: Path) -> list[str] | None:
    """The order that was computed before from the same models; None where there is none."""
    wanted = _addresses(models)
    return next((found["order"] for found in _recorded(folder).values() if found["models"] == wanted), None)


def _recorded(folder: Path) -> dict[Path, dict[str, Any]]:
    """The orders of this experiment's runs, which may be of some contributors only."""
    found = {path: _read(path) for path in sorted(folder.glob("order*.json"))}
    return {path: values for path, values in found.items() if {"order", "models"} <= set(values)}


def _addresses(models: Models) -> list[str]:
    """Where the zoo keeps the models that an order is computed from."""
    return sorted(models.address(spec) for spec in models_of(expand(models.config)))


def compute_order(models: Models, folder: Path) -> list[str]:
    """The order of a greedy merge: by each individual model's mean score on the *other* contributors' development
    data, over all seeds, the best first. No reported test is looked at. Written to ``order.json``, or beside it where
    that is the order of other contributors.
    """
    config = models.config
    names = list(config.ordered)
    values: dict[str, list[float]] = {name: [] for name in names}
    for spec in models_of(expand(config)):
        entry = models.model(spec)
        for set_name in map(config.set_of, names):
            if set_name != spec.set:
                prediction = models.prediction(entry, set_name, DEV)
                values[spec.name].append(score(models, set_name, DEV, prediction, [spec])["value"])
    means = {name: float(np.mean(found)) for name, found in values.items()}
    order = sorted(names, key=lambda name: (-means[name], name))
    by = "mean key score on the other contributors' development data"
    found = {"order": order, "by": by, "scores": means, "models": _addresses(models)}
    others = _recorded(folder).get(folder / ORDER)
    alike = others is None or set(others["order"]) == set(order)
    name = ORDER if alike else f"order-{id_of({'of': sorted(order)})[:8]}.json"
    write_text(folder / name, json.dumps(found, indent=1) + "\n")
    return order
