"""What an engine's worker does: one job, from JSON to JSON. Nothing but these two and a name crosses machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.experiments.grid.cells import ModelSpec, cell_from
from merganser.experiments.grid.compute import METHOD_STATISTICS, compute
from merganser.experiments.grid.config import ExperimentConfig
from merganser.experiments.grid.models import Models
from merganser.experiments.zoo import Zoo
from merganser.tasks.suite import DEV

FUNCTION = "merganser.experiments.grid.work:work"


def work(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job of an experiment.

    Args:
        payload: ``config`` (the resolved configuration), ``zoo`` (its URL), ``what``, and for a ``model`` its
            ``spec``, for a ``cell`` the ``cell``, its ``id`` and perhaps ``sums``.

    Returns:
        For a model its zoo id, for a cell its result row.
    """
    config = ExperimentConfig.model_validate(payload["config"])
    models = Models(config, Zoo(payload["zoo"]))
    if payload["what"] == "model":
        return prepare_model(models, ModelSpec(**payload["spec"]))
    sums = payload.get("sums")
    return compute(models, cell_from(payload["cell"]), payload["id"], None if sums is None else Path(sums))


def prepare_model(models: Models, spec: ModelSpec) -> dict[str, Any]:
    """Have a model, the statistics that the methods want, and its outputs for a greedy order, in the zoo."""
    entry = models.model(spec)
    for kind in wanted_statistics(models.config):
        models.statistics(spec, kind)
    if needs_order(models.config):
        for name in models.config.contributors:
            models.prediction(entry, models.config.set_of(name), DEV)
    return {"zoo": entry.id, "dev_scores": list(entry.facts.get("dev_scores") or [])}


def wanted_statistics(config: ExperimentConfig) -> list[str]:
    """The kinds of statistics that the methods of an experiment want."""
    return sorted({METHOD_STATISTICS[m.method] for m in config.methods if m.method in METHOD_STATISTICS})


def needs_order(config: ExperimentConfig) -> bool:
    """Whether the order of a greedy merge is still to be computed."""
    return config.layout == "greedy" and config.order == "computed"
