"""The verb ``collect``: run next to private data, write the statistics that a merge needs, and nothing else.

merganser collect MODEL --data reviews.jsonl
merganser.collect("model", "reviews.jsonl")
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from merganser.checkpoints.places import places_read
from merganser.collection.examples import Examples, annotated_rows, encode, find_columns
from merganser.collection.jobs import file_bytes, make_jobs, run_jobs
from merganser.collection.kfac import KfacChoice, refuse_sequences
from merganser.collection.pipeline import reason_against
from merganser.collection.placement import choose_placement
from merganser.collection.sampling import Sampling
from merganser.collection.scores import describe_left_out
from merganser.collection.shards import SHARD_EXAMPLES, fixed_shards, shard_collector, sum_shards
from merganser.collection.stacks import INNER_RANK, Experts, is_inner
from merganser.collection.stopping import StoppingRule
from merganser.engines import Engine, make_engine
from merganser.errors import ErrorCollector, StatisticsError, UserError, did_you_mean, raise_all
from merganser.files import Output, local_path, parse_size, space_error, staging_folder
from merganser.paths import expanded, is_name
from merganser.progress import bar
from merganser.results import PathResult, html_table
from merganser.statistics import FILE_NAME, FisherKind, Statistics, StatisticsHeader, write_statistics
from merganser.statistics.storage import Storage, compress, parse_storage
from merganser.statistics.writing import statistics_output
from merganser.tasks import task_for
from merganser.tasks.base import Task
from merganser.tasks.columns import Columns
from merganser.tasks.data import DataSource, in_memory, read_rows
from merganser.tasks.feature_extraction import FeatureExtraction
from merganser.tasks.models import Opened, open_model
from merganser.tasks.separate_texts import separate_texts


@dataclass(frozen=True, eq=False)
class CollectResult(PathResult):
    """What :func:`collect` has written; can be used as the path of the file.

    Attributes:
        path: of the file.
        header: what the file says of itself: layers, examples, tokens, notes.
        seconds: that it took.
    """

    path: Path
    header: StatisticsHeader
    seconds: float

    def _repr_html_(self) -> str:
        counts = Counter(layer.kind for layer in self.header.layers)
        title = f"{self.path}: {self.header.examples} examples, {self.header.tokens} tokens in {self.seconds:.1f} s"
        return html_table(title, ["statistics of", "layers"], counts.items(), self.header.notes)


def collect(
    model: str | Path,
    data: DataSource,
    *,
    task: str | Task = "auto",
    fisher: str | None = None,
    kfac: str | None = None,
    fisher_examples: int | None = None,
    grams: bool = True,
    output: str | Path | None = None,
    columns: Columns | Mapping[str, str | None] | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    use_labels: bool = True,
    until_converged: float | None = None,
    sample_tokens: float | int | None = None,
    shard_examples: int = SHARD_EXAMPLES,
    seed: int = 0,
    storage: str = "float32",
    experts: str = "shared",
    engine: str | Engine = "serial",
    ray_address: str | None = None,
    cpus: float = 1,
    device: str = "cpu",
    max_memory: str | int | None = None,
    offload_folder: str | Path | None = None,
    label: str = "",
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> CollectResult:
    """Collect the statistics of a model on data and write them beside its weights.

    Everything that can be wrong is looked for before the model is loaded; the file appears whole or not at
    all.

    Args:
        model: a model folder, ``folder::heads/name`` or ``org/name@revision``.
        data: a file, a folder, a data set's name or a ``Dataset``, or a list of texts or of dictionaries by column; see
            :func:`merganser.tasks.data.read_rows`. Of several splits, ``train`` is taken.
        task: a name of :data:`merganser.tasks.TASKS`, or ``auto`` to go by the model's configuration.
        fisher: also collect diagonal Fisher information: ``expected`` (over the model's own labels),
            ``empirical`` (the labels of the data) or ``predicted`` (the most probable label).
        kfac: also collect, beside the Gram matrix of each linear layer's input, the covariance of the gradients of
            its output: ``expected`` (over the model's own labels), ``sampled`` (one drawn of them), ``empirical`` (the
            labels of the data), or ``auto`` (expected for heads of few outputs, else sampled).
        fisher_examples: both of these from so many of the first examples; None: from all.
        grams: collect Gram matrices, means and token counts.
        output: the file to write; by default ``merge_statistics.safetensors`` in the model folder. A model on
            the Hub needs one.
        columns: names of the columns; what is not given is found by its usual name.
        split: of data that have several.
        limit: use at most this many rows, the first ones.
        batch_size: examples in a batch. It changes speed, and no number beyond rounding.
        max_length: tokens at which a text is cut, never more than the model takes; by default sentence-transformers'
            ``max_seq_length``, or else what the model takes, and at most 512.
        use_labels: read the labels where there are some. They are checked, and a row without any annotated one is
            left out of all statistics. Gram matrices need none.
        until_converged: stop when the estimated relative error of the Gram matrices is at most this, see
            :mod:`merganser.collection.stopping`; None: use all examples.
        sample_tokens: wide inputs keep a seeded sample of their tokens, see
            :mod:`merganser.collection.sampling`: a float is the share, an integer their number if all examples
            are used; None: all.
        shard_examples: examples whose sums are computed together, see :mod:`merganser.collection.shards`.
        seed: of the order of ``until_converged`` and the sample of ``sample_tokens``.
        storage: ``float32``, ``bfloat16`` or ``lowrank:r``, see :mod:`merganser.statistics.storage`.
        experts: ``shared``: the experts of a layer share the Gram matrix of their inputs, and what is inside each is
            written in low rank; ``exact``: each has its own, as ``storage`` says; ``none``: experts have no statistics.
        engine: ``serial``: one shard after the other, here; ``ray``: shards are jobs on a cluster, and the bytes
            are the same; or an engine itself.
        ray_address: of a running cluster; None: what ``RAY_ADDRESS`` says, or this machine's.
        cpus: that each job of a cluster takes.
        device: ``cpu``, ``cuda`` or ``auto``.
        max_memory: bytes of weights in memory, or a size such as ``2GB``; the others stay on the disk, see
            :mod:`merganser.collection.placement`. None: all are in memory.
        offload_folder: for weights that cannot stay in the checkpoint's own files.
        label: free text for the header, such as what the data are. Published with the statistics.
        overwrite: replace an existing statistics file; nothing else is ever replaced.
        allow_pickle: accept pickled weights (read with ``weights_only``).

    Returns:
        What was written; it can be used as the path of the file.

    Raises:
        UserError: any mistake in the arguments, the model or the data, before the model is loaded.
    """
    kind, factors, started = _fisher_kind(fisher), _kfac_choice(kfac, grams), time.monotonic()
    _check_numbers(
        batch_size=batch_size, max_length=max_length, fisher_examples=fisher_examples, shard_examples=shard_examples
    )
    if not grams and kind is None:
        raise UserError("there is nothing to collect", where="collect", mend="ask for grams, fisher or both")
    _check_options(grams, until_converged, sample_tokens)
    stop = None if until_converged is None else StoppingRule(until_converged, seed, shard_examples, fisher_examples)
    stored = parse_storage(storage)
    if experts not in get_args(Experts):
        mend = did_you_mean(experts, get_args(Experts))
        raise UserError(f"unknown way {experts!r} with experts", where="--experts", mend=mend)
    elsewhere = _engine(engine, ray_address, cpus)
    if elsewhere is not None:
        _check_elsewhere(until_converged, device, max_memory)
    limit_bytes = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    errors = ErrorCollector()
    opened = errors.catch(open_model, model, allow_pickle=allow_pickle)
    rows = errors.catch(read_rows, data, split=split, limit=limit, prefer=("train",))
    target = None if opened is None else errors.catch(_target, opened, data, output, overwrite)
    chosen = None if opened is None else errors.catch(_task, opened, task, kind, factors)
    placement = (
        None
        if opened is None
        else errors.catch(choose_placement, device, limit_bytes, offload_folder, opened, fisher=bool(kind or factors))
    )
    if opened is not None and target is not None:
        needed = file_bytes(
            opened, stored, grams=grams, fisher=kind is not None, experts=experts == "exact", kfac=factors is not None
        )
        mend = "free some space, choose another disk with -o, or fewer bytes with --storage"
        errors.add(space_error(target.path, needed, "the statistics take about", mend))
    errors.raise_all()
    if opened is None or rows is None or target is None or chosen is None or placement is None:
        raise RuntimeError("a step failed without an error")
    given = Columns.of(columns)
    separate = separate_texts(rows, opened, given) if chosen.name == FeatureExtraction.name else None
    if separate is not None:
        rows, given = separate.apply(rows), Columns("text")
    whose: FisherKind | None = "empirical" if factors == "empirical" else kind
    found, references = find_columns(rows, chosen, opened, given, whose, use_labels)
    numbers = annotated_rows(rows, chosen, references, whose)
    labels = None if kind is None and factors is None else references
    examples = encode(rows, chosen, opened, chosen.load_reader(opened), found, labels, max_length, numbers)
    sampling, notes = _sampling(sample_tokens, examples, seed)
    if grams and (left := reason_against(opened, chosen, offloaded=limit_bytes is not None)) is not None:
        notes.append(left)
    if len(numbers) < len(rows):
        notes.append(describe_left_out(len(rows) - len(numbers)))
    wanted: dict[str, Any] = {
        "grams": grams, "fisher": kind, "kfac": factors, "sampling": sampling, "experts": experts, "label": label,
        "allow_pickle": allow_pickle,
    }  # fmt: skip
    shards = fixed_shards(len(examples), shard_examples, fisher_examples, grams=grams)
    if elsewhere is not None:
        with staging_folder(target.path) as folder:
            jobs = make_jobs(
                examples, shards, folder,
                data=rows if in_memory(data) else str(data), split=split,
                separate=None if separate is None else dict(separate.prompts),
                labelled=labels is not None, batch_size=batch_size, cpus=cpus, **wanted,
            )  # fmt: skip
            sums, tally = sum_shards(run_jobs(elsewhere, jobs))
    else:
        with (
            bar(len(examples), "collecting", "ex") as progress,
            shard_collector(examples, placement, batch_size, progress.update, **wanted) as collect_shard,
        ):
            if stop is not None:
                sums, tally, note = stop.run(len(examples), collect_shard)
                notes.append(note)
            else:
                sums, tally = sum_shards(map(collect_shard, shards))
    header, tensors = sums.result()
    notes = [
        *header.notes,
        f"task: {chosen.name}",
        examples.columns_read if separate is None else str(separate),
        *tally.notes(examples.encoded.max_length),
        *notes,
    ]
    whole = Statistics.in_memory(header.model_copy(update={"notes": tuple(notes)}), tensors)
    inner = [layer.input for layer in header.layers if layer.input and is_inner(layer)] if experts == "shared" else []
    compressed = compress(whole, stored, dict.fromkeys(inner, _inner_storage(stored)))
    written = write_statistics(target.path, *compressed, output=target)
    return CollectResult(written, compressed[0], time.monotonic() - started)


def _inner_storage(stored: Storage) -> Storage:
    """Of the inputs inside experts: low rank, and no higher one than of all others."""
    rank = min(INNER_RANK, stored.rank) if stored.kind == "lowrank" else INNER_RANK
    return Storage("lowrank", rank)


def _task(opened: Opened, task: str | Task, kind: FisherKind | None, factors: KfacChoice | None) -> Task:
    """The task, which must suit the model's head."""
    chosen = task_for(task, opened.config)
    chosen.check_head(opened)
    if (kind is not None or factors is not None) and chosen.problem is None:
        what, where = ("Fisher information", "--fisher") if kind is not None else ("K-FAC", "--kfac")
        mend = "leave it out, or collect on a fine-tuned checkpoint"
        raise UserError(f"{what} needs a head, which {chosen.name} has not", where=where, mend=mend)
    refuse_sequences(factors, chosen.problem)
    return chosen


def _engine(engine: str | Engine, ray_address: str | None, cpus: float) -> Engine | None:
    """Where shards are jobs; None for this process."""
    if not 0 < cpus < float("inf"):
        raise UserError(f"a job on {cpus:g} cpus", where="--cpus", mend="give a number above 0")
    if isinstance(engine, Engine):
        return engine
    if engine != "ray":
        if ray_address is not None:
            mend = "add --engine ray"
            raise UserError("the address of a cluster has no meaning without it", where="--ray-address", mend=mend)
        make_engine(engine)  # or an error that names it
        return None
    return make_engine(engine, address=ray_address, description="collecting")


def _check_elsewhere(until_converged: float | None, device: str, max_memory: str | int | None) -> None:
    """Refuse what jobs on other machines cannot do."""
    refused = {}
    if until_converged is not None:
        refused["--until-converged"] = "it is decided after each shard, so shards cannot run at once"
    if device not in ("cpu", "auto"):
        refused["--device"] = "jobs run on CPUs"
    if max_memory is not None:
        refused["--max-memory"] = "jobs load their model into memory, and say how much they take"
    mend = "leave one of the two out"
    raise_all([UserError(what, where=f"{at} with --engine ray", mend=mend) for at, what in refused.items()])


def _check_options(grams: bool, until_converged: float | None, sample_tokens: float | int | None) -> None:
    """Refuse ways of collecting less that mean nothing."""
    if isinstance(sample_tokens, float):
        Sampling(sample_tokens)
    elif sample_tokens is not None and sample_tokens < 1:
        raise UserError(
            f"a sample of {sample_tokens} tokens is empty",
            where="--sample-tokens",
            mend="give a number of tokens of at least 1, or a share such as 0.25",
        )
    if not grams and (until_converged is not None or sample_tokens is not None):
        option = "--until-converged" if until_converged is not None else "--sample-tokens"
        mend = "leave it out, or collect Gram matrices, too"
        raise UserError("it is about Gram matrices, and none are collected", where=option, mend=mend)


def _sampling(sample_tokens: float | int | None, examples: Examples, seed: int) -> tuple[Sampling | None, list[str]]:
    """The sampling that was asked for, and a note where there is none to do."""
    if sample_tokens is None:
        return None, []
    tokens, exact = examples.tokens, isinstance(sample_tokens, int)
    if exact and sample_tokens >= tokens:
        return None, [f"no sample was taken: there are {tokens} tokens, at most {sample_tokens} were wanted"]
    return Sampling(sample_tokens / tokens if exact else sample_tokens, seed), []


def _fisher_kind(fisher: str | None) -> FisherKind | None:
    kinds: dict[str | None, FisherKind] = {kind: kind for kind in get_args(FisherKind)}
    if fisher is not None and fisher not in kinds:
        mend = did_you_mean(fisher, get_args(FisherKind))
        raise UserError(f"unknown kind of Fisher information {fisher!r}", where="--fisher", mend=mend)
    return kinds.get(fisher)


def _kfac_choice(kfac: str | None, grams: bool) -> KfacChoice | None:
    choices: dict[str | None, KfacChoice] = {choice: choice for choice in get_args(KfacChoice)}
    if kfac is not None and kfac not in choices:
        mend = did_you_mean(kfac, get_args(KfacChoice))
        raise UserError(f"unknown kind of K-FAC {kfac!r}", where="--kfac", mend=mend)
    if kfac is not None and not grams:
        mend = "collect Gram matrices, too, or leave it out"
        raise UserError("K-FAC stands beside the Gram matrices of the same layers", where="--kfac", mend=mend)
    return choices.get(kfac)


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{name} is {value}", where=option, mend="give a number of at least 1")


def _target(opened: Opened, data: DataSource, output: str | Path | None, overwrite: bool) -> Output:
    """The file to write, which must not be there unless it may be replaced, and whose folder must take it."""
    home = opened.checkpoint.home
    if output is None and home.revision is not None:
        raise StatisticsError(
            "statistics of a model on the Hub are not written into its cached copy",
            where=opened.name,
            mend=f"say where with -o (in a copy of the repository: {FILE_NAME})",
        )
    path = home.path / FILE_NAME if output is None else expanded(output)
    if os.path.isdir(path):  # noqa: PTH112 (of a name that is too long, or holds NUL, it says no)
        path = path / FILE_NAME
    reads = places_read(opened.checkpoint)
    allowed = reads if path.name == FILE_NAME else []  # any other file of the model's folder may be loaded with it
    given = local_path(str(data)) if not in_memory(data) and is_name(str(data)) else None
    target = statistics_output(path, [*reads, *([given] if given else [])], overwrite=overwrite, allowed=allowed)
    target.raise_problem()
    if not path.parent.is_dir():
        mend = "make the folder, or choose another with -o"
        raise StatisticsError("the folder of the output does not exist", where=path, mend=mend)
    return target
