"""A merge on more than one machine: one job a weight file, each written whole by whoever has it.

A worker receives the part of the plan that its file needs, opens the files that it names, and reports the hashes of
what it read and wrote. The bytes are those of a merge on one machine. Contributors and output must be found under the
same names everywhere: a shared folder, the Hub, or an fsspec URL for the output.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from merganser.engines import Engine, Job
from merganser.errors import CheckpointError, ErrorCollector, UserError
from merganser.files import scratch_folder
from merganser.merging.execution import Merging, TensorRecord, execute
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.memory import RunSettings, Schedule, fit
from merganser.merging.outputs import OutputTarget, output_of
from merganser.merging.plan import Plan, inputs_of
from merganser.merging.recipe import Recipe
from merganser.merging.targets.checkpoint import CheckpointTarget, Layout, make_layout
from merganser.paths import real

FUNCTION = "merganser.merging.distributed:write_file"


def run_on(
    plan: Plan,
    inputs: Inputs,
    settings: RunSettings,
    engine: Engine,
    schedule: Schedule,
    layout: Layout,
    place: OutputTarget,
) -> dict[str, TensorRecord]:
    """Have every weight file of a plan written by an engine's jobs; returns what became of each tensor.

    Args:
        plan: of the merge.
        inputs: its open files.
        settings: threads, memory and device of each job.
        engine: where the jobs run; what is lost with a machine runs again.
        schedule: for what a job takes.
        layout: where each tensor goes.
        place: receives the files.

    Raises:
        UserError: jobs that failed, all of them at once, or contributors that changed meanwhile.
    """
    whole = replace(plan, recipe=absolute(plan.recipe))
    jobs = []
    for file, specs in layout.files.items():
        steps = [s for s in plan.steps if any(layout.places[name][0] == file for name in s.unit.names)]
        payload = {
            "plan": replace(whole, steps=tuple(steps)).to_json(),
            "place": place.reference,
            "file": file,
            "threads": settings.threads,
            "max_memory": settings.max_memory,
            "device": settings.device,
            "allow_pickle": settings.allow_pickle,
        }
        jobs.append(
            Job(
                id=f"merge {file}",
                description=file,
                payload=payload,
                cost=sum(spec.nbytes for spec in specs) + 1,
                cpus=settings.threads,
                memory=settings.max_memory or schedule.peak_bytes,
                gpus=int(settings.device == "cuda"),
            )
        )
    records: dict[str, TensorRecord] = {}
    problems = ErrorCollector()
    for ended in engine.run(jobs, FUNCTION):
        if ended.result is None:
            what = "the work on this file failed"
            problems.add(UserError(what, where=ended.job.description, mend="run again", said=ended.error))
            continue
        records.update({name: TensorRecord(**entry) for name, entry in ended.result["records"].items()})
        for parent, hashes in zip(inputs.sources, ended.result["hashes"], strict=True):
            problems.add(*_differing(parent, hashes))
    place.tidy()
    problems.raise_all()
    return records


def write_file(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Write one weight file of a merge: what a worker does.

    Args:
        payload: the plan's part, place and name of the file, threads, memory, device, and whether pickles are read.

    Returns:
        what became of its tensors, and for each contributor (and the base) the hashes of the tensors that were read.
    """
    file = payload["file"]
    plan = Plan.from_json(payload["plan"], file)
    inputs = inputs_of(plan, allow_pickle=payload["allow_pickle"])
    settings = RunSettings(payload["threads"], payload["max_memory"], payload["device"])
    with scratch_folder() as scratch:
        place = output_of(payload["place"])
        folder = place.staging_folder(scratch)  # on the same disk, so that a rename puts the file into its place
        try:
            with CheckpointTarget(plan, make_layout(plan), folder, {file}) as target:
                execute(fit(plan.steps, settings), Merging(inputs, settings), target)
            place.put(folder / file, file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    hashes = [dict(source.checkpoint.hashes) for source in inputs.sources]
    return {"records": {name: asdict(record) for name, record in target.records.items()}, "hashes": hashes}


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
    parts = [str(real(Path(part))) if Path(part).exists() else part for part in reference.split("+")]
    return str(real(Path(reference))) if Path(reference).exists() else "+".join(parts)


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
