"""Running a grid: models first, then the order of greedy merges, then the cells; each once, whatever is killed.

    run_experiment(config, results="results", zoo="zoo")

Results lie in ``<results>/<experiment>/``: ``experiment.json`` (the resolved configuration), ``order.json`` and
one file a cell in ``cells/``, written whole. The same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.writer import parse_size
from merganser.engines import Engine, Job, Outcome, SerialEngine
from merganser.errors import UserError, raise_all
from merganser.experiments.grid.cells import Cell, ModelSpec, expand, models_of
from merganser.experiments.grid.compute import FORMAT, scored_on
from merganser.experiments.grid.config import ExperimentConfig, localised
from merganser.experiments.grid.folder import finished, open_folder, set_aside
from merganser.experiments.grid.models import Models, base_sha256
from merganser.experiments.grid.order import compute_order, recorded_order
from merganser.experiments.grid.work import FUNCTION, needs_order
from merganser.experiments.report import write_text
from merganser.experiments.zoo import Zoo
from merganser.tasks.suite import DEV

_MODEL_COST = 90.0  # seconds; only proportions matter
_COSTS = {"merge": 8.0, "multitask": 300.0, "individual": 4.0, "ensemble": 1.0}


@dataclass(frozen=True)
class Failure:
    """A job that could not be done."""

    job: str
    error: str


@dataclass(frozen=True)
class Finished:
    """What a run left behind.

    Attributes:
        folder: of the experiment's results.
        cells: result files that the grid has now.
        done: how many of them this run has added.
        failures: what could not be done; the finished cells stay.
    """

    folder: Path
    cells: int
    done: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Planned:
    """One line of a dry run: a model or a cell, and whether it is there already."""

    what: str
    description: str
    cached: bool


def run_experiment(
    config: ExperimentConfig,
    *,
    results: str | Path,
    zoo: str | Path,
    engine: Engine | None = None,
) -> Finished:
    """Run what is not finished of a grid.

    Args:
        config: see :func:`merganser.experiments.grid.loading.load_config`.
        results: the folder that holds a folder for each experiment.
        zoo: a folder or an fsspec URL.
        engine: where jobs run; this process by default.

    Returns:
        What is there now. A job that fails does not stop the others.

    Raises:
        UserError: data or a pretrained model that is not there, a results folder of another version.
    """
    engine = engine or SerialEngine()
    folder = Path(results) / config.name
    config, zoo = localised(config), zoo if "://" in str(zoo) else Path(zoo).expanduser().resolve()
    models = Models(config, Zoo(zoo))
    check_inputs(models)
    open_folder(folder, config)
    grid = _Grid(models, folder, engine, {"config": config.model_dump(mode="json"), "zoo": str(zoo)})
    order: Sequence[str] | None = None
    if needs_order(config):
        order = recorded_order(models, folder)
        if order is None:
            grid.prepare(expand(config))
            if grid.failures:
                return Finished(folder, len(finished(folder)), 0, tuple(grid.failures))
            order = compute_order(models, folder)
    cells = {cell_id(models, cell): cell for cell in expand(config, order)}
    left = {name: cell for name, cell in cells.items() if name not in finished(folder)}
    grid.prepare(list(left.values()))
    done = grid.work(left)
    set_aside(folder, set(cells))
    if not grid.failures:
        shutil.rmtree(folder / "sums", ignore_errors=True)
    return Finished(folder, len(finished(folder)), done, tuple(grid.failures))


@dataclass
class _Grid:
    """The jobs of a run.

    Attributes:
        common: what every job is told.
        failures: of the jobs so far.
    """

    models: Models
    folder: Path
    engine: Engine
    common: Mapping[str, Any]
    failures: list[Failure] = field(default_factory=list)

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Have the models of some cells, and what the methods want of them, in the zoo."""
        jobs = [
            self._job(
                f"model {spec.name} {spec.seed}",
                f"model {spec.name} (seed {spec.seed})",
                _MODEL_COST,
                {"what": "model", "spec": asdict(spec)},
            )
            for spec in models_of(cells)
        ]
        for _ in self._outcomes(jobs):
            continue

    def work(self, cells: Mapping[str, Cell]) -> int:
        """Work on cells and write their rows as they come; how many were done."""
        jobs = [
            self._job(
                name,
                cell.description,
                _COSTS[cell.kind],
                {
                    "what": "cell",
                    "cell": cell.to_json(),
                    "id": name,
                    "sums": _sums(self.folder, self.models.config, cell),
                },
            )
            for name, cell in cells.items()
        ]
        done = 0
        for outcome in self._outcomes(jobs):
            text = json.dumps(outcome.result, indent=1, ensure_ascii=False) + "\n"
            write_text(self.folder / "cells" / f"{outcome.job.id}.json", text)
            done += 1
        return done

    def _outcomes(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        for outcome in self.engine.run(jobs, FUNCTION):
            if outcome.error is None:
                yield outcome
            else:
                self.failures.append(Failure(outcome.job.description, outcome.error))

    def _job(self, name: str, description: str, cost: float, payload: Mapping[str, Any]) -> Job:
        reserved = _resources(self.models.config)
        return Job(name, description, {**self.common, **payload}, cost, **reserved)


def plan_experiment(config: ExperimentConfig, *, results: str | Path, zoo: str | Path) -> list[Planned]:
    """What a run would do, without doing any of it: every model and cell, and what is there already.

    Data and a pretrained model that are not on this machine do not stop it: then nothing counts as cached.
    """
    folder = Path(results) / config.name
    try:
        models: Models | None = Models(config, Zoo(zoo))
        check_inputs(models)  # type: ignore[arg-type]
    except UserError:
        models = None
    order: Sequence[str] | None = None
    if needs_order(config) and models is not None:
        order = recorded_order(models, folder)
    cells = expand(config, order)
    present = finished(folder) if folder.is_dir() else set()
    known = order is not None or not needs_order(config)
    lines = [
        Planned(
            "model", f"{spec.name} (seed {spec.seed})", models is not None and models.find(spec) is not None
        )
        for spec in models_of(cells)
    ]
    for cell in cells:
        description = cell.description
        if not known and len(cell.contributors) > 1:
            description = (
                f"{cell.method}: the first {len(cell.contributors)} of the computed order "
                f"(seed {cell.seed}, {cell.heads} heads)"
            )
        cached = models is not None and known and cell_id(models, cell) in present
        lines.append(Planned(cell.kind, description, cached))
    return lines


def check_inputs(models: Models) -> None:
    """Read all data once and hash the pretrained model, so that nothing is missing hours later.

    Raises:
        UserError: what is missing or malformed, all at once.
    """
    problems: list[UserError] = []

    def attempt(function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except UserError as error:
            if str(error) not in {str(one) for one in problems}:
                problems.append(error)

    config = models.config
    if any(args.checkpoint is None for args in config.contributors.values()):
        attempt(base_sha256, config.pretrained.model)
    attempt(models.settings)
    for cell in expand(config):
        for name, split, _ in scored_on(config, cell):
            attempt(models.data.rows, name, split)
        for spec in cell.contributors:
            attempt(models.rows, spec)
            attempt(models.data.rows, spec.set, DEV)
    raise_all(problems)


def cell_id(models: Models, cell: Cell) -> str:
    """The name of a cell: a hash of all that its row depends on."""
    config = models.config
    method = next((m for m in config.methods if cell.kind == "merge" and m.key == cell.method), None)
    content = {
        "format": FORMAT,
        "experiment": config.name,
        "layout": config.layout,
        "cell": cell.to_json(),
        "models": [models.key(spec) for spec in cell.contributors],
        "arguments": [
            config.contributors[_contributor(config, spec)].model_dump(mode="json")
            for spec in cell.contributors
        ],
        "method": method.model_dump(mode="json") if method else None,
        "statistics": config.statistics.model_dump(mode="json") if method else None,
        "tests": [
            (name, split, domain, models.data.digest(name, split))
            for name, split, domain in scored_on(config, cell)
        ],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _contributor(config: ExperimentConfig, spec: ModelSpec) -> str:
    return spec.name if spec.name in config.contributors else spec.name.rsplit("/", 1)[0]


def _resources(config: ExperimentConfig) -> dict[str, Any]:
    """What each job takes: training holds weights, gradients and two moments; a merge reads tensor by tensor."""
    wanted = config.resources
    if wanted.memory is not None:
        memory = parse_size(wanted.memory)
    else:
        infos = open_checkpoint(config.pretrained.model).tensors.values()
        parameters = sum(math.prod(info.shape) for info in infos)
        memory = 6 * 4 * parameters + 10**9
    return {"cpus": wanted.cpus, "gpus": wanted.gpus, "memory": memory}


def _sums(folder: Path, config: ExperimentConfig, cell: Cell) -> str | None:
    if cell.kind != "merge" or config.layout != "greedy":
        return None
    name = "".join(c if c.isalnum() else "-" for c in cell.method)
    return str((folder / "sums" / f"{name}-{cell.heads}-{cell.seed}").resolve())
