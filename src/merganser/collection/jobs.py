"""Shards as the jobs of an engine: each is a process that opens model and data anew and leaves a file.

Every machine must find the model, the data and the folder of the output under the same names. A job writes the
statistics of its shard into a folder beside the output and returns name and hash; whoever started it adds them in their
order and removes them. No text or token is written anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merganser.checkpoints import sha256_file
from merganser.checkpoints.layers import describe_layers
from merganser.collection.examples import Examples, encode
from merganser.collection.gram import BUFFER_BYTES
from merganser.collection.kfac import ROUND_BYTES, WIDEST_OUTPUT, KfacChoice
from merganser.collection.placement import Placement
from merganser.collection.sampling import Sampling
from merganser.collection.shards import Shard, Tally, shard_collector
from merganser.engines import Engine, Job
from merganser.errors import CheckpointError, DataError, UserError
from merganser.paths import expanded
from merganser.statistics import FisherKind, Statistics, write_statistics
from merganser.statistics.storage import Storage
from merganser.tasks import TASKS
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, read_rows, selected
from merganser.tasks.models import Opened, open_model
from merganser.tasks.separate_texts import SeparateTexts

FUNCTION = "merganser.collection.jobs:work"
PROCESS_BYTES = 700 * 2**20  # of a Python process with torch and transformers and a batch's activations


def make_jobs(
    examples: Examples,
    shards: Sequence[Shard],
    folder: Path,
    *,
    data: str | Rows,
    cpus: float,
    grams: bool,
    fisher: FisherKind | None,
    kfac: KfacChoice | None,
    sampling: Sampling | None,
    **settings: Any,
) -> list[Job]:
    """A job for each shard.

    Args:
        examples: of which the shards are.
        shards: contiguous ones.
        folder: for the jobs' files.
        data: where the examples were read from.
        cpus: of each job.
        grams, fisher, kfac, sampling: what to collect.
        settings: more of what ``collect`` was given: ``labelled`` (labels go into the examples), ``split``,
            ``separate`` (the prompts of texts that are read alone, by column),
            ``batch_size``, ``experts``, ``label``, ``allow_pickle``.

    Raises:
        UserError: data or a task that other machines cannot be told of.
    """
    if isinstance(data, Rows):
        mend = "give the data as a file or data set that every machine can read"
        raise UserError("rows in memory are not on other machines", where="--engine", mend=mend)
    if TASKS.get(examples.task.name) != examples.task:
        what = f"task {examples.task.name!r} has options of its own, which jobs are not told of"
        raise UserError(what, where="--engine", mend="give the task by its name")
    memory = job_memory(examples.opened, grams=grams, fisher=fisher is not None, kfac=kfac is not None)
    shared = {
        "model": _absolute(examples.opened.name),
        "data": _absolute(data),
        "folder": str(folder.absolute()),
        "task": examples.task.name,
        "columns": asdict(examples.columns),
        "max_length": examples.encoded.max_length,
        "manifest": examples.opened.checkpoint.manifest_hash("blake3"),
        "grams": grams,
        "fisher": fisher,
        "kfac": kfac,
        "sampling": asdict(sampling) if sampling else None,
        **settings,
    }
    return [
        Job(
            id=f"shard-{shard.number}",
            description=f"shard {shard.number + 1} of {len(shards)}",
            payload={
                **shared,
                "number": shard.number,
                **_rows_of(examples.numbers[shard.indices[0] : shard.indices[-1] + 1]),
                "fisher_examples": shard.fisher,
                "fingerprint": examples.fingerprint(shard.indices),
            },
            cost=sum(len(examples.encoded.features[index].input_ids) for index in shard.indices),
            cpus=cpus,
            memory=memory,
        )
        for shard in shards
    ]


def job_memory(opened: Opened, *, grams: bool, fisher: bool, kfac: bool = False) -> int:
    """About how many bytes a job takes: the model in float32, the sums, a shard's statistics and the process."""
    parameters = sum(math.prod(tensor.shape) for tensor in opened.checkpoint.tensors.values())
    needed = PROCESS_BYTES + (4 + (8 if fisher else 0)) * parameters
    if grams:
        needed += BUFFER_BYTES + sum(6 * width**2 for width in input_widths(opened, experts=True))
    if kfac:
        needed += ROUND_BYTES + sum(6 * height**2 for height in output_heights(opened))
    return needed


def input_widths(opened: Opened, *, experts: bool) -> list[int]:
    """About which Gram matrices there will be, from the configuration and headers: the width of each.

    Args:
        opened: the model.
        experts: whether each expert has its own.
    """
    try:
        layers = describe_layers(opened.checkpoint)
    except CheckpointError:  # loading it will say what is wrong
        return []
    widths = {  # layers of one parent that are as wide see the same input, mostly
        (layer.module.rpartition(".")[0], opened.checkpoint.tensors[layer.weight].shape[layer.kind == "linear"])
        for layer in layers
        if layer.kind != "embedding" and (experts or not (layer.experts or ".experts." in layer.module))
    }
    return [width for _, width in sorted(widths)]


def output_heights(opened: Opened) -> list[int]:
    """About which covariances of output gradients there will be, likewise: the number of outputs of each layer."""
    try:
        layers = describe_layers(opened.checkpoint)
    except CheckpointError:  # loading it will say what is wrong
        return []
    shapes = {layer.weight: opened.checkpoint.tensors[layer.weight].shape for layer in layers}
    found = {
        layer.weight: shapes[layer.weight][layer.kind == "conv1d"]
        for layer in layers
        if layer.kind in ("linear", "conv1d") and layer.experts is None and len(shapes[layer.weight]) == 2
    }
    return [height for height in found.values() if height <= WIDEST_OUTPUT]


def file_bytes(
    opened: Opened, storage: Storage, *, grams: bool, fisher: bool, experts: bool, kfac: bool = False
) -> int:
    """About how many bytes the statistics take on the disk, from the configuration and headers; rather too few.

    Args:
        opened: the model.
        storage: of Gram matrices.
        grams, fisher, kfac: what is collected.
        experts: whether each expert has its own Gram matrices.
    """
    parameters = sum(math.prod(tensor.shape) for tensor in opened.checkpoint.tensors.values())
    widths = [*(input_widths(opened, experts=experts) if grams else []), *(output_heights(opened) if kfac else [])]
    number = 4 if storage.kind == "float32" else 2  # bytes
    low = storage.kind == "lowrank"
    sizes = [number * width * (storage.rank + 2 if low and storage.pays(width) else width // 2) for width in widths]
    return sum(sizes) + (number * parameters if fisher else 0)


def run_jobs(engine: Engine, jobs: Sequence[Job]) -> Iterator[tuple[Statistics, Tally]]:
    """The shards' statistics in their order, each file removed once the next is asked for.

    Raises:
        UserError: a job that failed, or a file that is not what its job has written.
    """
    ended: dict[str, Mapping[str, Any]] = {}
    due = 0
    with closing(engine.run(jobs, FUNCTION)) as outcomes:  # type: ignore[type-var]
        for outcome in outcomes:
            if outcome.error is not None or outcome.result is None:
                what, mend = f"{outcome.job.description} failed", "mend that and run again; nothing was written"
                raise UserError(what, where=f"--engine {engine.name}", mend=mend, said=outcome.error)
            ended[outcome.job.id] = outcome.result
            while due < len(jobs) and jobs[due].id in ended:
                result = ended.pop(jobs[due].id)
                file = Path(result["path"])
                if sha256_file(file) != result["sha256"]:
                    mend = "use a folder that all machines share, and nobody else"
                    raise DataError("the file is not what its job has written", where=file, mend=mend)
                yield Statistics.open(file), Tally(**result["tally"])
                file.unlink()
                due += 1


def work(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Collect one shard and write its statistics; what an engine calls.

    Args:
        payload: of a job of :func:`make_jobs`.

    Returns:
        ``path`` and ``sha256`` of the file, and the ``tally``.

    Raises:
        DataError: model or data differ from those that the job was made for.
    """
    opened = open_model(payload["model"], allow_pickle=payload["allow_pickle"])
    if opened.checkpoint.manifest_hash("blake3") != payload["manifest"]:
        raise _differs("the model", opened.name)
    examples = _examples(payload, opened)
    indices = range(len(examples))
    if examples.fingerprint(indices) != payload["fingerprint"]:
        raise _differs("the tokenised examples", payload["data"])
    shard = Shard(payload["number"], indices, payload["fisher_examples"])
    sampling = Sampling(**payload["sampling"]) if payload["sampling"] else None
    wanted = {key: payload[key] for key in ("grams", "fisher", "kfac", "experts", "label", "allow_pickle")}
    with shard_collector(examples, Placement(), payload["batch_size"], sampling=sampling, **wanted) as collect_shard:
        found, tally = collect_shard(shard)
    path = Path(payload["folder"]) / f"{shard.number:06}.safetensors"
    write_statistics(path, found.header, {name: found.packed(name) for name in found.tensors})
    return {"path": str(path), "sha256": sha256_file(path), "tally": asdict(tally)}


def _examples(payload: Mapping[str, Any], opened: Opened) -> Examples:
    """The shard's examples, tokenised as where the job comes from."""
    rows = read_rows(payload["data"], split=payload["split"], limit=payload["stop"], prefer=("train",))
    if payload["separate"] is not None:
        rows = SeparateTexts(payload["separate"]).apply(rows)
    left_out = set(payload["left_out"])
    numbers = range(payload["start"], min(payload["stop"], len(rows)))
    rows = selected(rows, [number for number in numbers if number not in left_out])
    task, columns = TASKS[payload["task"]], Columns(**payload["columns"])
    labelled = payload["labelled"] and len(rows) > 0
    references = task.references(rows, columns, task.space(opened.config)) if labelled else None
    tokenizer = task.load_reader(opened)
    return encode(rows, task, opened, tokenizer, columns, references, payload["max_length"], range(len(rows)))


def _rows_of(numbers: Sequence[int]) -> dict[str, Any]:
    """Which rows of the data a shard has, of which these are the numbers."""
    start, stop = numbers[0], numbers[-1] + 1
    return {"start": start, "stop": stop, "left_out": sorted(set(range(start, stop)) - set(numbers))}


def _differs(what: str, where: str) -> DataError:
    return DataError(
        f"{what} on this machine differ from those where the collection was started",
        where=where,
        mend="let every machine see the same files, and change none while they are read",
    )


def _absolute(name: str) -> str:
    """A path as every working directory knows it; what follows it (``::heads/name``, ``[split]``) stays."""
    for stem in (name.partition("::")[0], name.partition("[")[0], name):
        if expanded(stem).exists():
            return f"{expanded(stem).absolute()}{name.removeprefix(stem)}"
    return name
