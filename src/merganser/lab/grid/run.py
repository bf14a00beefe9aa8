"""Running a grid: models first, then the order of greedy merges, then the cells; each once, whatever is killed.

    run_experiment(config, results="results", zoo="zoo")

Results lie in ``<results>/<experiment>/``: ``experiment.json`` (the resolved configuration of the last run),
``order.json`` and one file a cell in ``cells/``, written whole and found again by content. The same command goes on
where it was stopped, and other runs of the experiment (some contributors, some seeds) only add to it.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merganser.checkpoints import open_checkpoint
from merganser.engines import Engine, Job, Outcome, SerialEngine
from merganser.errors import require
from merganser.files import is_url, parse_size, write_text
from merganser.lab.grid.cells import Cell, expand
from merganser.lab.grid.checks import check_inputs, remarks
from merganser.lab.grid.compute import cell_id
from merganser.lab.grid.config import ExperimentConfig, localised
from merganser.lab.grid.folder import check_folder, compute_order, finished, open_folder, recorded_order, results_name
from merganser.lab.grid.jobs import FUNCTION, Need, model_need, needs_of, needs_order, unique_needs
from merganser.lab.grid.models import Models
from merganser.lab.zoo import Zoo
from merganser.paths import expanded, real

#: Seconds; only proportions matter.
_COSTS = {
    "model": 90.0, "multitask": 300.0, "gram": 10.0, "fisher": 60.0, "kfac": 60.0, "merge": 8.0,
    "individual": 4.0, "ensemble": 1.0,
}  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass
class Failure:
    """A job that could not be done.

    Attributes:
        job: what it was.
        error: why.
        cells: how many cells were left out for it.
    """

    job: str
    error: str
    cells: int = 0


@dataclass(frozen=True)
class Finished:
    """What a run left behind.

    Attributes:
        folder: of the experiment's results.
        cells: how many of the grid's cells have their rows now.
        done: how many of them this run has added.
        failures: what could not be done, each once; the finished cells stay.
    """

    folder: Path
    cells: int
    done: int
    failures: tuple[Failure, ...]


def run_experiment(
    config: ExperimentConfig,
    *,
    results: str | Path,
    zoo: str | Path,
    engine: Engine | None = None,
    allow_pickle: bool = False,
    only_prepare: bool = False,
) -> Finished:
    """Run what is not finished of a grid.

    Args:
        config: see :func:`merganser.lab.grid.loading.load_config`.
        results: the folder that holds a folder for each experiment.
        zoo: a folder or an fsspec URL.
        engine: where jobs run; this process by default.
        allow_pickle: accept pickled weights (read with ``weights_only``) of the models that are given.
        only_prepare: have in the zoo what the cells need, models and statistics, and stop.

    Returns:
        What is there now. A job that fails does not stop the others, and is not tried again by each cell that needs
        it: these are left out.

    Raises:
        UserError: data or a pretrained model that is not there, a results folder of another version.
    """
    require("lab", "an experiment", "accelerate")
    folder = Path(results) / config.name
    check_folder(folder)
    config, zoo = localised(config), zoo if is_url(zoo) else real(expanded(zoo))
    fresh = results_name(folder, config)
    models = Models(config, Zoo(zoo), allow_pickle=allow_pickle, fresh=fresh)
    check_inputs(models)
    for remark in remarks(models):
        logger.warning("%s", remark)
    open_folder(folder, config, fresh)
    common = {"config": config.model_dump(mode="json"), "zoo": str(zoo), "allow_pickle": allow_pickle, "fresh": fresh}
    grid = _Grid(models, folder, engine or SerialEngine(), common)
    cells = {cell_id(models, cell): cell for cell in grid.expanded()}
    present = finished(folder)
    left = {name: cell for name, cell in cells.items() if name not in present}
    grid.prepare(list(left.values()))
    done = 0 if only_prepare else grid.work(left)
    if not grid.failures:
        shutil.rmtree(folder / "sums", ignore_errors=True)
    return Finished(folder, len(finished(folder) & set(cells)), done, tuple(grid.failures.values()))


@dataclass
class _Grid:
    """The jobs of a run.

    Attributes:
        common: what every job is told.
        failures: the jobs that failed so far, by their ids.
    """

    models: Models
    folder: Path
    engine: Engine
    common: Mapping[str, Any]
    failures: dict[str, Failure] = field(default_factory=dict)

    def expanded(self) -> list[Cell]:
        """The cells. Where a greedy order is to be computed, the models that it is computed from are made first.

        If one of them cannot be made there is no order, and only the individual models are left.
        """
        config = self.models.config
        if not needs_order(config):
            return expand(config)
        order = recorded_order(self.models, self.folder)
        if order is not None:
            return expand(config, order)
        cells = expand(config)
        singles = [cell for cell in cells if cell.kind == "individual"]
        specs = dict.fromkeys(spec for cell in cells for spec in cell.contributors)
        self._make([model_need(spec) for spec in specs])
        if not self.failures:
            return expand(config, compute_order(self.models, self.folder))
        next(iter(self.failures.values())).cells += len(cells) - len(singles)
        return singles

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Have in the zoo what some cells need: models, then what is made from them."""
        needs = unique_needs(self.models.config, cells)
        self._make([need for need in needs if not need.after])
        self._make([need for need in needs if need.after and need.after not in self.failures])

    def _make(self, needs: Sequence[Need]) -> None:
        jobs = []
        for need in needs:
            if need.id not in self.failures:
                jobs.append(self._job(need.id, need.description, _COSTS[need.what], need.cell, need.what))
        for _ in self._outcomes(jobs):
            continue

    def work(self, cells: Mapping[str, Cell]) -> int:
        """Work on cells and write their rows as they come; how many were done."""
        jobs = []
        for name, cell in cells.items():
            missing = next((n.id for n in needs_of(self.models.config, cell) if n.id in self.failures), None)
            if missing is not None:
                self.failures[missing].cells += 1
                continue
            more = {"id": name, "sums": _sums(self.folder, self.models.config, cell)}
            jobs.append(self._job(name, cell.description, _COSTS[cell.kind], cell, "cell", **more))
        done = 0
        for outcome in self._outcomes(jobs):
            text = json.dumps(outcome.result, indent=1, ensure_ascii=False)
            write_text(self.folder / "cells" / f"{outcome.job.id}.json", text + "\n")
            done += 1
        return done

    def _outcomes(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        if not jobs:
            return
        for outcome in self.engine.run(jobs, FUNCTION):
            if outcome.error is None:
                yield outcome
            else:
                self.failures[outcome.job.id] = Failure(outcome.job.description, outcome.error)

    def _job(self, name: str, description: str, cost: float, cell: Cell, what: str, **more: Any) -> Job:
        payload = {**self.common, "what": what, "cell": cell.to_json(), **more}
        wanted = self.models.config.resources
        return Job(name, description, payload, cost, wanted.cpus, _memory(self.models), wanted.gpus)


def _memory(models: Models) -> int:
    """What each job takes: training holds weights, gradients and two moments; a merge reads tensor by tensor."""
    if models.config.resources.memory is not None:
        return parse_size(models.config.resources.memory)
    opened = open_checkpoint(models.config.pretrained.model, allow_pickle=models.allow_pickle)
    return 6 * 4 * sum(math.prod(info.shape) for info in opened.tensors.values()) + 10**9


def _sums(folder: Path, config: ExperimentConfig, cell: Cell) -> str | None:
    if cell.kind != "merge" or config.layout != "greedy":
        return None
    name = "".join(c if c.isalnum() else "-" for c in cell.method)
    return str((folder / "sums" / f"{name}-{cell.heads}-{cell.seed}").resolve())
