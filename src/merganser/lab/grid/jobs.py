"""What cells take from the zoo, and the work of one job: from JSON to JSON, and nothing else crosses machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merganser.lab.grid.cells import Cell, ModelSpec, cell_from
from merganser.lab.grid.compute import compute, statistics_of
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.models import Models
from merganser.lab.suites.base import DEV
from merganser.lab.zoo import Zoo

FUNCTION = "merganser.lab.grid.jobs:work"
STATISTICS_TITLES = {"gram": "Gram matrices", "fisher": "Fisher information", "kfac": "Kronecker factors"}
_ORDER = ("multitask", "model", *STATISTICS_TITLES)  # the longest first, so that several workers end together


@dataclass(frozen=True)
class Need:
    """Something that must be in the zoo before a cell can be worked on; each is made once, by a job of its own.

    Attributes:
        id: the same for everything that wants it.
        what: ``model``, ``multitask``, or the kind of statistics.
        description: for bars, lists and failures.
        cell: whose contributors it is made for: only one, but for multi-task training.
        after: the id of what it is made from; empty where that is the pretrained model.
    """

    id: str
    what: str
    description: str
    cell: Cell = field(compare=False)
    after: str = ""

    @property
    def spec(self) -> ModelSpec:
        """The contributor that a model or statistics are of."""
        return self.cell.contributors[0]


def needs_of(config: ExperimentConfig, cell: Cell) -> list[Need]:
    """What a cell takes from the zoo, models before their statistics.

    Multi-task training has one seed of its own, so that contributors with the same and with different heads share it.
    """
    if cell.kind == "multitask":
        names = " + ".join(spec.name for spec in cell.contributors)
        title = f"multi-task {names} (seed {cell.seed}{', separate heads' * (cell.heads == 'separate')})"
        return [Need(title, "multitask", title, cell)]
    found = [model_need(spec) for spec in cell.contributors]
    kind = statistics_of(config, cell)
    if kind:
        found += [_statistics_need(config, spec, kind) for spec in cell.contributors]
    return found


def unique_needs(config: ExperimentConfig, cells: Iterable[Cell]) -> list[Need]:
    """What several cells take, each once: multi-task models, models, then statistics."""
    found = dict.fromkeys(need for cell in cells for need in needs_of(config, cell))
    return sorted(found, key=lambda need: _ORDER.index(need.what))


def model_need(spec: ModelSpec) -> Need:
    """A contributor's model."""
    return Need(f"model {spec.name} {spec.seed}", "model", f"model {spec.name} (seed {spec.seed})", _alone(spec))


def _statistics_need(config: ExperimentConfig, spec: ModelSpec, kind: str) -> Need:
    users = ", ".join(method.key for method in config.methods if method.needs.statistics == kind)
    description = f"{STATISTICS_TITLES[kind]} of {spec.name} (seed {spec.seed}), for {users}"
    return Need(f"{kind} {spec.name} {spec.seed}", kind, description, _alone(spec), after=model_need(spec).id)


def _alone(spec: ModelSpec) -> Cell:
    return Cell("individual", "individual", (spec,), "same", spec.seed)


def is_there(models: Models, need: Need) -> bool:
    """Whether the zoo holds what is needed, without making anything."""
    if need.what == "multitask":
        return models.zoo.get(models.multitask_key(need.cell)) is not None
    entry = models.find(need.spec)
    if entry is None or need.what == "model":
        return entry is not None
    return models.zoo.has(entry, models.statistics_name(need.spec, need.what))


def needs_order(config: ExperimentConfig) -> bool:
    """Whether the order of a greedy merge is still to be computed."""
    return config.layout == "greedy" and config.order == "computed"


def work(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job of an experiment, where the engine runs it.

    Args:
        payload: ``config`` (the resolved configuration), ``zoo`` (its URL), ``allow_pickle``, ``fresh`` (see
            :class:`Models`), ``what`` (of a :class:`Need`, or ``cell``) and the ``cell``; of a ``cell`` also its
            ``id`` and perhaps ``sums``.

    Returns:
        For a cell its result row, else the zoo's id of the model.
    """
    config = ExperimentConfig.model_validate(payload["config"])
    models = Models(config, Zoo(payload["zoo"]), allow_pickle=payload["allow_pickle"], fresh=payload["fresh"])
    what, cell = payload["what"], cell_from(payload["cell"])
    if what == "cell":
        sums = payload["sums"]
        return compute(models, cell, payload["id"], None if sums is None else Path(sums))
    if what == "multitask":
        return {"zoo": models.multitask(cell).id}
    spec = cell.contributors[0]
    entry = models.model(spec)
    if what in STATISTICS_TITLES:
        models.statistics(spec, what)
    elif needs_order(config):
        for name in config.contributors:
            models.prediction(entry, config.set_of(name), DEV)
    return {"zoo": entry.id}
