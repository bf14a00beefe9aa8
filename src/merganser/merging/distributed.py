"""A merge on more than one machine: one job a weight file, each written whole by whoever has it.

Nothing but the recipe goes to a worker: it derives the same plan from the same headers, merges the units that its file
needs and reports the hashes of what it read and wrote. The bytes are those of a merge on one machine. Contributors and
output must be found under the same names everywhere: a shared folder, the Hub, or an fsspec URL for the output.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merganser.engines import Engine, Job
from merganser.errors import CheckpointError, UserError, raise_all
from merganser.merging.execution import Execution, Outcome
from merganser.merging.layout import Layout, make_layout
from merganser.merging.parents import Parent
from merganser.merging.places import Place, place_of
from merganser.merging.plan import Plan, make_plan
from merganser.merging.recipe import Recipe, make_recipe

FUNCTION = "merganser.merging.distributed:write_file"


def run_on(engine: Engine, plan: Plan, layout: Layout, place: Place) -> dict[str, Outcome]:
    """Have every weight file of a plan written by an engine's jobs; returns what became of each tensor.

    Args:
        engine: where the jobs run; what is lost with a machine runs again.
        plan: of the merge.
        layout: where each tensor goes.
        place: receives the files.

    Raises:
        UserError: jobs that failed, all of them at once, or contributors that changed meanwhile.
    """
    jobs = [
        Job(
            id=f"merge {file}",
            description=file,
            payload={
                "recipe": absolute(plan.recipe).model_dump(mode="json"),
                "place": place.reference,
                "file": file,
                "threads": plan.threads,
                "max_memory": plan.max_memory,
                "device": plan.device,
            },
            cost=sum(spec.nbytes for spec in specs) + 1,
            cpus=plan.threads,
            memory=plan.max_memory or plan.peak_bytes,
            gpus=int(plan.device == "cuda"),
        )
        for file, specs in layout.files.items()
    ]
    outcomes: dict[str, Outcome] = {}
    problems: list[UserError] = []
    for ended in engine.run(jobs, FUNCTION):
        if ended.result is None:
            problems.append(
                UserError(f"the work on this file failed: {ended.error}", where=ended.job.description, mend="run again")
            )
            continue
        outcomes.update({name: Outcome(**entry) for name, entry in ended.result["outcomes"].items()})
        for parent, hashes in zip(_sources(plan), ended.result["hashes"], strict=True):
            problems += _differing(parent, hashes)
    place.tidy()
    raise_all(problems)
    return {name: outcomes[name] for name in sorted(outcomes)}


def write_file(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Write one weight file of a merge: what a worker does.

    Args:
        payload: recipe, place and name of the file, threads, memory and device.

    Returns:
        the outcomes of its tensors, and for each contributor (and the base) the hashes of the tensors that were read.
    """
    recipe = make_recipe(payload["recipe"], "recipe")
    plan = make_plan(recipe, threads=payload["threads"], max_memory=payload["max_memory"], device=payload["device"])
    file = payload["file"]
    with tempfile.TemporaryDirectory(prefix="merganser-") as scratch:
        place = place_of(payload["place"])
        folder = place.near(Path(scratch))  # on the same disk, so that a rename puts the file into its place
        try:
            outcomes = Execution(plan, make_layout(plan), folder, files={file}).run()
            place.put(folder / file, file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    hashes = [dict(source.checkpoint.hashes) for source in _sources(plan)]
    return {"outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()}, "hashes": hashes}


def absolute(recipe: Recipe) -> Recipe:
    """A recipe whose folders are found from anywhere."""
    people = tuple(
        one.model_copy(
            update={"model": _absolute(one.model), "statistics": one.statistics and _absolute(one.statistics)}
        )
        for one in recipe.contributors
    )
    return recipe.model_copy(update={"contributors": people, "base": recipe.base and _absolute(recipe.base)})


def _absolute(reference: str) -> str:
    parts = [str(Path(part).resolve()) if Path(part).exists() else part for part in reference.split("+")]
    return str(Path(reference).resolve()) if Path(reference).exists() else "+".join(parts)


def _sources(plan: Plan) -> list[Parent]:
    return [*plan.parents, *([plan.base] if plan.base else [])]


def _differing(parent: Parent, hashes: Mapping[str, str]) -> list[CheckpointError]:
    """Take over the hashes that a worker has found; tensors that differ from what was read elsewhere."""
    known = parent.checkpoint.hashes
    differing = [name for name, found in hashes.items() if known.setdefault(name, found) != found]
    return [
        CheckpointError(
            f"tensor {name!r} is not the same on every machine",
            where=parent.checkpoint.name,
            mend="give all machines the same files, and leave them alone while merging",
        )
        for name in differing
    ]
