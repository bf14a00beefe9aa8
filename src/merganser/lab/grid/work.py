"""What an engine's worker does: one job, from JSON to JSON. Nothing but these two and a name crosses machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.lab.grid.cells import ModelSpec, cell_from
from merganser.lab.grid.compute import compute
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.models import Models
from merganser.lab.suites.base import DEV
from merganser.lab.zoo import Zoo

FUNCTION = "merganser.lab.grid.work:work"


def work(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job of an experiment.

    Args:
        payload: ``config`` (the resolved configuration), ``zoo`` (its URL), ``allow_pickle``, ``fresh`` (see
            :class:`Models`), ``what``; for a ``model`` its ``spec``, for ``statistics`` also their ``kind``, for a
            ``multitask`` model and for a ``cell`` the ``cell``, and for the latter its ``id`` and perhaps ``sums``.

    Returns:
        For a cell its result row, else the zoo's id of the model.
    """
    config = ExperimentConfig.model_validate(payload["config"])
    zoo = Zoo(payload["zoo"])
    models = Models(config, zoo, allow_pickle=payload["allow_pickle"], fresh=payload["fresh"])
    what = payload["what"]
    if what == "cell":
        sums = payload.get("sums")
        return compute(models, cell_from(payload["cell"]), payload["id"], None if sums is None else Path(sums))
    if what == "multitask":
        return {"zoo": models.multitask(cell_from(payload["cell"])).id}
    spec = ModelSpec(**payload["spec"])
    entry = models.model(spec)
    if what == "statistics":
        models.statistics(spec, payload["kind"])
    elif needs_order(config):
        for name in config.contributors:
            models.prediction(entry, config.set_of(name), DEV)
    return {"zoo": entry.id}


def needs_order(config: ExperimentConfig) -> bool:
    """Whether the order of a greedy merge is still to be computed."""
    return config.layout == "greedy" and config.order == "computed"
