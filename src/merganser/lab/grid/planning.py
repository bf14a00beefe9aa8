"""What a run would do, without doing any of it: checked inputs, what is there, what is left, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merganser.errors import ErrorCollector, UserError, require
from merganser.lab.grid.cells import Cell, expand, title_of
from merganser.lab.grid.checks import check_inputs, remarks
from merganser.lab.grid.compute import cell_id
from merganser.lab.grid.config import ExperimentConfig, localised
from merganser.lab.grid.estimate import Estimate, estimate
from merganser.lab.grid.folder import check_folder, finished, recorded_name, recorded_order
from merganser.lab.grid.jobs import STATISTICS_TITLES, is_there, needs_order, unique_needs
from merganser.lab.grid.models import Models
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

    @property
    def state(self) -> str:
        """``cached``, or what has to be done."""
        return "cached" if self.cached else self.verb


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


def plan_experiment(
    config: ExperimentConfig, *, results: str | Path, zoo: str | Path, allow_pickle: bool = False
) -> Plan:
    """Check every input as a run does, and list what is there and what is left.

    Mistakes do not stop it: the grid is listed all the same. Arguments as of
    :func:`merganser.lab.grid.run.run_experiment`.
    """
    folder, config = Path(results) / config.name, localised(config)
    errors = ErrorCollector()
    errors.catch(check_folder, folder)
    fresh = "" if errors.found else recorded_name(folder)
    errors.catch(require, "lab", "an experiment", "accelerate")
    models = errors.catch(Models, config, Zoo(zoo), allow_pickle=allow_pickle, fresh=fresh)
    if models is not None:
        errors.catch(check_inputs, models)
    ready = None if errors.found else models
    order = recorded_order(ready, folder) if ready and needs_order(config) else None
    known = order is not None or not needs_order(config)
    cells = expand(config, order)
    # Where nothing was computed yet, no key is looked up, so that no data set is hashed.
    present = finished(folder) if ready and known else set()
    there = {cell for cell in cells if ready and present and cell_id(ready, cell) in present}
    filled = ready is not None and bool(ready.zoo.ls())
    needs = {need: bool(filled and ready and is_there(ready, need)) for need in unique_needs(config, cells)}
    lines = []
    for need, cached in needs.items():
        verb = "to train" if need.what in ("model", "multitask") else "to collect"
        if ready and need.what == "model":
            args = ready.args(need.spec)
            verb = "to copy" if args.checkpoint else verb
            if not cached and args.load_from_zoo == "yes" and args.checkpoint is None:
                errors.add(ready.absent(need.spec))
        title = _TITLES[need.what]
        what = need.what if need.what == "model" else title.lower()
        lines.append(Planned(what, need.description.removeprefix("model "), title, cached, verb))
    lines += [_cell_line(config, cell, cell in there, known) for cell in cells]
    if ready is None:
        guess = Estimate(None, "what is said above has to be mended first")
        return Plan(tuple(lines), tuple(errors.found), tuple(config.remarks()), guess)
    left = [cell for cell in cells if cell not in there]
    guess = estimate(ready, [need for need in unique_needs(config, left) if not needs[need]], left)
    return Plan(tuple(lines), tuple(errors.found), tuple(remarks(ready)), guess)


def _cell_line(config: ExperimentConfig, cell: Cell, cached: bool, known: bool) -> Planned:
    description = cell.description
    if not known and len(cell.contributors) > 1:
        count = f"the first {len(cell.contributors)} of the computed order"
        description = f"{cell.method}: {count} (seed {cell.seed}, {cell.heads} heads)"
    heads = f", {cell.heads} heads" if len(config.heads) > 1 else ""
    return Planned(cell.kind, description, f"{title_of(config, cell)}{heads}", cached)
