"""The order of a greedy merge, computed from the individual models on development data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from merganser.files import write_text
from merganser.lab.grid.cells import expand, models_of
from merganser.lab.grid.compute import score
from merganser.lab.grid.models import Models
from merganser.lab.suites.base import DEV
from merganser.lab.zoo import id_of

FILE_NAME = "order.json"


def recorded_order(models: Models, folder: Path) -> list[str] | None:
    """The order that was computed before from the same models; None where there is none."""
    wanted = _addresses(models)
    return next((found["order"] for found in _recorded(folder).values() if found["models"] == wanted), None)


def _recorded(folder: Path) -> dict[Path, dict[str, Any]]:
    """The orders of this experiment's runs, which may be of some contributors only."""
    found = {}
    for path in sorted(folder.glob("order*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found[path] = {"order": list(values["order"]), "models": list(values["models"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


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
    means: dict[str, float] = {}
    specs = models_of(expand(config))
    for name in names:
        values = []
        for spec in (spec for spec in specs if spec.name == name):
            entry = models.model(spec)
            for other in names:
                set_name = config.set_of(other)
                if set_name != spec.set:
                    prediction = models.prediction(entry, set_name, DEV)
                    values.append(score(models, set_name, DEV, prediction, [spec])["value"])
        means[name] = float(np.mean(values))
    order = sorted(names, key=lambda name: (-means[name], name))
    by = "mean key score on the other contributors' development data"
    found = {"order": order, "by": by, "scores": means, "models": _addresses(models)}
    others = _recorded(folder).get(folder / FILE_NAME)
    alike = others is None or set(others["order"]) == set(order)
    name = FILE_NAME if alike else f"order-{id_of({'of': sorted(order)})[:8]}.json"
    write_text(folder / name, json.dumps(found, indent=1) + "\n")
    return order
