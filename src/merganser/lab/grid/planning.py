"""What a run would do, without doing any of it: checked inputs, what is there, what is left, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from merganser.errors import ErrorCollector, UserError, require
from merganser.lab.grid.cells import Cell, ModelSpec, expand, title_of
from merganser.lab.grid.checks import check_inputs, remarks
from merganser.lab.grid.config import ExperimentConfig, localised
from merganser.lab.grid.estimate import Estimate, estimate
from merganser.lab.grid.folder import finished, recorded_name
from merganser.lab.grid.identity import cell_id
from merganser.lab.grid.models import Models
from merganser.lab.grid.needs import STATISTICS_TITLES, Need, is_there, unique_needs
from merganser.lab.grid.order import recorded_order
from merganser.lab.grid.work import needs_order
from merganser.lab.zoo import Zoo

_TITLES = {"model": "models", "multitask": "multi-task models", **STATISTICS_TITLES}


@dataclass(frozen=True)
class Planned:
    """One thing to do.

    Attributes:
        what: ``model``, ``multi-task models``, ``gram matrices``, ``fisher information``, or the kind of a cell.
        description: of it alone.
        group: of all that is listed as one line.
        cached: whether it is there already.
        verb: what has to be done where it is not.
    """

    what: str
    description: str
    group: str
    cached: bool
    verb: str = "to do"


@dataclass(frozen=True)
class Plan:
    """Everything that a run would do, in its order.

    Attributes:
        lines: of models, what is made from them, and cells.
        problems: why the run would refuse to start; what is there already is then not known.
        remarks: what is allowed and may not be expected.
        estimate: of what is left to do.
    """

    lines: tuple[Planned, ...]
    problems: tuple[UserError, ...]
    remarks: tuple[str, ...]
    estimate: Estimate

    def __iter__(self) -> Iterator[Planned]:
        return iter(self.lines)


def plan_experiment(
    config: ExperimentConfig, *, results: str | Path, zoo: str | Path, allow_pickle: bool = False
) -> Plan:
    """Check every input as a run does, and list what is there and what is left.

    Mistakes do not stop it: the grid is listed all the same. Arguments as of
    :func:`merganser.lab.grid.run.run_experiment`.
    """
    folder, config = Path(results) / config.name, localised(config)
    errors, fresh = ErrorCollector(), recorded_name(folder)
    errors.catch(require, "lab", "an experiment", "accelerate")
    models = errors.catch(Models, config, Zoo(zoo), allow_pickle=allow_pickle, fresh=fresh)
    if models is not None:
        errors.catch(check_inputs, models)
    if models is None or errors.found:
        cells = expand(config)
        lines = [_need_line(need, False) for need in unique_needs(config, cells)]
        lines += [_cell_line(config, cell, False, not needs_order(config)) for cell in cells]
        guess = Estimate(None, "what is said above has to be mended first")
        return Plan(tuple(lines), tuple(errors.found), tuple(config.remarks()), guess)
    order = recorded_order(models, folder) if needs_order(config) else None
    known = order is not None or not needs_order(config)
    cells = expand(config, order)
    present = finished(folder) if folder.is_dir() else set()
    # Where nothing was computed yet, no key is looked up, so that no data set is hashed.
    there = {cell: known and bool(present) and cell_id(models, cell) in present for cell in cells}
    filled = bool(models.zoo.ls())
    needs = {need: filled and is_there(models, need) for need in unique_needs(config, cells)}
    lines = []
    for need, cached in needs.items():
        args = models.args(ModelSpec(**need.payload["spec"])) if need.what == "model" else None
        if args is not None and not cached and args.load_from_zoo == "yes" and args.checkpoint is None:
            errors.add(models.absent(ModelSpec(**need.payload["spec"])))
        lines.append(_need_line(need, cached, "to copy" if args is not None and args.checkpoint else None))
    lines += [_cell_line(config, cell, there[cell], known) for cell in cells]
    left = [cell for cell in cells if not there[cell]]
    wanted = unique_needs(config, left)
    guess = estimate(models, [need for need in wanted if not needs[need]], left)
    return Plan(tuple(lines), tuple(errors.found), tuple(remarks(models)), guess)


def _need_line(need: Need, cached: bool, verb: str | None = None) -> Planned:
    title = _TITLES[need.what]
    usual = "to train" if need.what in ("model", "multitask") else "to collect"
    return Planned(
        need.what if need.what == "model" else title.lower(),
        need.description.removeprefix("model "),
        title,
        cached,
        verb or usual,
    )


def _cell_line(config: ExperimentConfig, cell: Cell, cached: bool, known: bool) -> Planned:
    description = cell.description
    if not known and len(cell.contributors) > 1:
        count = f"the first {len(cell.contributors)} of the computed order"
        description = f"{cell.method}: {count} (seed {cell.seed}, {cell.heads} heads)"
    heads = f", {cell.heads} heads" if len(config.heads) > 1 else ""
    return Planned(cell.kind, description, f"{title_of(config, cell)}{heads}", cached)
