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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.writer import parse_size
from merganser.errors import DataError, UserError
from merganser.experiments.engines import Engine, Job, SerialEngine
from merganser.experiments.grid.cells import Cell, ModelSpec, expand, models_of
from merganser.experiments.grid.compute import FORMAT, score, scored_on
from merganser.experiments.grid.config import ExperimentConfig, localised
from merganser.experiments.grid.models import Models
from merganser.experiments.grid.work import FUNCTION, needs_order
from merganser.experiments.report import write_text
from merganser.experiments.zoo import Zoo
from merganser.tasks.suite import DEV

_MODEL_COST, _MULTITASK_COST, _MERGE_COST, _OTHER_COST = 90.0, 300.0, 8.0, 2.0  # seconds; proportions matter


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
    _open_folder(folder, config)
    common = {"config": config.model_dump(mode="json"), "zoo": str(zoo)}
    reserved = _resources(config)
    failures: list[Failure] = []
    first = expand(config)
    missing = [spec for spec in models_of(first) if not _has_model(models, spec)]
    jobs = [
        Job(
            id=f"model {spec.name} {spec.seed}",
            description=f"model {spec.name} (seed {spec.seed})",
            payload={**common, "what": "model", "spec": asdict(spec)},
            cost=_MODEL_COST,
            **reserved,
        )
        for spec in (models_of(first) if needs_order(config) or _wants_statistics(models) else missing)
    ]
    for outcome in engine.run(jobs, FUNCTION):
        if outcome.error is not None:
            failures.append(Failure(outcome.job.description, outcome.error))
    order = None
    if needs_order(config):
        if failures:
            return Finished(folder, len(_finished(folder)), 0, tuple(failures))
        order = compute_order(models, folder)
    cells = {cell_id(models, cell): cell for cell in expand(config, order)}
    present = _finished(folder)
    done = 0
    open_cells = [
        Job(
            id=name,
            description=cell.description,
            payload={
                **common,
                "what": "cell",
                "cell": cell.to_json(),
                "id": name,
                "sums": _sums(folder, config, cell),
            },
            cost=_cost(cell),
            **reserved,
        )
        for name, cell in cells.items()
        if name not in present
    ]
    for outcome in engine.run(open_cells, FUNCTION):
        if outcome.error is not None:
            failures.append(Failure(outcome.job.description, outcome.error))
            continue
        text = json.dumps(outcome.result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(folder / "cells" / f"{outcome.job.id}.json", text)
        done += 1
    _set_aside(folder, set(cells))
    if not failures:
        shutil.rmtree(folder / "sums", ignore_errors=True)
    return Finished(folder, len(_finished(folder)), done, tuple(failures))


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
    recorded = folder / "order.json"
    if needs_order(config) and recorded.is_file():
        order = json.loads(recorded.read_text(encoding="utf-8"))["order"]
    cells = expand(config, order)
    present = _finished(folder) if folder.is_dir() else set()
    known = order is not None or not needs_order(config)
    lines = [
        Planned("model", f"{spec.name} (seed {spec.seed})", models is not None and _has_model(models, spec))
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
    from merganser.errors import raise_all
    from merganser.experiments.grid.models import base_sha256

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


def compute_order(models: Models, folder: Path) -> list[str]:
    """The order of a greedy merge: by each individual model's mean score on the *other* contributors' development
    data, over all seeds, the best first. No reported test is looked at. Written to ``order.json``.
    """
    config = models.config
    names = list(config.contributors)
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
    text = json.dumps({"order": order, "by": by, "scores": means}, indent=1) + "\n"
    write_text(folder / "order.json", text)
    return order


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


def _has_model(models: Models, spec: ModelSpec) -> bool:
    return models.find(spec) is not None


def _wants_statistics(models: Models) -> bool:
    from merganser.experiments.grid.work import wanted_statistics

    return bool(wanted_statistics(models.config))


def _open_folder(folder: Path, config: ExperimentConfig) -> None:
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


def _finished(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "cells").glob("*.json")}


def _set_aside(folder: Path, current: set[str]) -> None:
    """Rows of cells that the configuration no longer has go to ``other-cells``: kept, and not reported."""
    for name in _finished(folder) - current:
        (folder / "other-cells").mkdir(exist_ok=True)
        (folder / "cells" / f"{name}.json").replace(folder / "other-cells" / f"{name}.json")


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


def _cost(cell: Cell) -> float:
    return {"merge": _MERGE_COST, "multitask": _MULTITASK_COST}.get(cell.kind, _OTHER_COST)
