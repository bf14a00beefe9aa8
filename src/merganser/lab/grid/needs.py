"""What cells take from the zoo: models, multi-task models, statistics. Each is made once, by a job of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from merganser.lab.grid.cells import Cell, ModelSpec, cell_from
from merganser.lab.grid.compute import statistics_of
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.models import Models

What = Literal["model", "multitask", "gram", "fisher"]
_ORDER = ("model", "multitask", "gram", "fisher")
STATISTICS_TITLES = {"gram": "Gram matrices", "fisher": "Fisher information"}


@dataclass(frozen=True)
class Need:
    """Something that must be in the zoo before a cell can be worked on.

    Attributes:
        id: the same for everything that wants it.
        what: kind of it.
        description: for bars, lists and failures.
        payload: of the job that makes it.
        after: the id of what it is made from; empty where that is the pretrained model.
    """

    id: str
    what: What
    description: str
    payload: dict[str, Any] = field(compare=False)
    after: str = ""


def needs_of(config: ExperimentConfig, cell: Cell) -> list[Need]:
    """What a cell takes from the zoo, models before their statistics.

    Multi-task training has one seed of its own, so that contributors with the same and with different heads share it.
    """
    if cell.kind == "multitask":
        names = " + ".join(spec.name for spec in cell.contributors)
        title = f"multi-task {names} (seed {cell.seed}{', separate heads' * (cell.heads == 'separate')})"
        return [Need(title, "multitask", title, {"what": "multitask", "cell": cell.to_json()})]
    found = [model_need(spec) for spec in cell.contributors]
    kind = statistics_of(config, cell)
    if kind:
        found += [_statistics_need(config, spec, kind) for spec in cell.contributors]
    return found


def unique_needs(config: ExperimentConfig, cells: Iterable[Cell]) -> list[Need]:
    """What several cells take, each once: models, multi-task models, then statistics."""
    found = dict.fromkeys(need for cell in cells for need in needs_of(config, cell))
    return sorted(found, key=lambda need: _ORDER.index(need.what))


def model_need(spec: ModelSpec) -> Need:
    """A contributor's model."""
    payload = {"what": "model", "spec": asdict(spec)}
    return Need(f"model {spec.name} {spec.seed}", "model", f"model {spec.name} (seed {spec.seed})", payload)


def _statistics_need(config: ExperimentConfig, spec: ModelSpec, kind: str) -> Need:
    cells = (Cell("merge", method.key, (spec,), "same", spec.seed) for method in config.methods)
    users = ", ".join(cell.method for cell in cells if statistics_of(config, cell) == kind)
    return Need(
        f"{kind} {spec.name} {spec.seed}",
        "gram" if kind == "gram" else "fisher",
        f"{STATISTICS_TITLES[kind]} of {spec.name} (seed {spec.seed}), for {users}",
        {"what": "statistics", "spec": asdict(spec), "kind": kind},
        after=model_need(spec).id,
    )


def is_there(models: Models, need: Need) -> bool:
    """Whether the zoo holds what is needed, without making anything."""
    if need.what == "multitask":
        return models.zoo.get(models.multitask_key(cell_from(need.payload["cell"]))) is not None
    spec = ModelSpec(**need.payload["spec"])
    entry = models.find(spec)
    if entry is None or need.what == "model":
        return entry is not None
    return models.zoo.has(entry, models.statistics_name(spec, need.what))
