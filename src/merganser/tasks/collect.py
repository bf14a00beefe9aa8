"""The verb ``collect``: run next to private data, write the statistics that a merge needs, and nothing else.

merganser collect MODEL --data reviews.jsonl
merganser.collect("model", "reviews.jsonl")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from merganser.checkpoints import home_of
from merganser.errors import DataError, StatisticsError, UserError, did_you_mean
from merganser.statistics import FILE_NAME, FisherKind, collect_statistics, write_statistics
from merganser.tasks import task_for
from merganser.tasks.base import Task
from merganser.tasks.batches import Batches, make_batches, padding_share
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, read_rows
from merganser.tasks.gather import Gather
from merganser.tasks.models import (
    Opened,
    choose_length,
    load_model,
    load_tokenizer,
    open_model,
    prepare_padding,
)
from merganser.tasks.suite import selected


def collect(
    model: str | Path,
    data: str | Path | Rows,
    *,
    task: str | Task = "auto",
    fisher: str | None = None,
    fisher_examples: int | None = None,
    grams: bool = True,
    output: str | Path | None = None,
    columns: Columns | Mapping[str, str | None] | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    use_labels: bool = True,
    label: str = "",
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Collect the statistics of a model on data and write them beside its weights.

    Everything that can be wrong is looked for before the model is loaded; the file appears whole or not at
    all.

    Args:
        model: a model folder, ``folder::heads/name`` or ``org/name@revision``.
        data: rows, or what :func:`merganser.tasks.data.read_rows` takes; of several splits, ``train`` is taken.
        task: a name of :data:`merganser.tasks.TASKS`, or ``auto`` to go by the model's configuration.
        fisher: also collect diagonal Fisher information: ``expected`` (over the model's own labels),
            ``empirical`` (the labels of the data) or ``predicted`` (the most probable label).
        fisher_examples: from so many of the first examples; None: from all.
        grams: collect Gram matrices, means and token counts.
        output: the file to write; by default ``merge_statistics.safetensors`` in the model folder. A model on
            the Hub needs one.
        columns: names of the columns; what is not given is found by its usual name.
        split: of data that have several.
        limit: use at most this many rows, the first ones.
        batch_size: examples in a batch. It changes speed, and no number beyond rounding.
        max_length: tokens at which a text is cut; by default 128, and never more than the model takes.
        use_labels: check the labels where there are some. Gram matrices need none.
        label: free text for the header, such as what the data are. Published with the statistics.
        overwrite: replace an existing file.
        allow_pickle: accept pickled weights (read with ``weights_only``).

    Returns:
        The file that was written.

    Raises:
        UserError: any mistake in the arguments, the model or the data, before the model is loaded.
    """
    kind = _fisher_kind(fisher)
    _check_numbers(batch_size=batch_size, max_length=max_length, fisher_examples=fisher_examples)
    if not grams and kind is None:
        raise UserError("there is nothing to collect", where="collect", mend="ask for grams, fisher or both")
    gather = Gather()
    opened = gather(open_model, model, allow_pickle=allow_pickle)
    rows = gather(_rows, data, split, limit)
    target = None if opened is None else gather(_target, opened, output, overwrite)
    chosen = None if opened is None else gather(_task, opened, task, kind)
    gather.settle()
    if opened is None or rows is None or target is None or chosen is None:
        raise RuntimeError("a step failed without an error")
    found, references = _labels(rows, chosen, opened, Columns.of(columns), kind, use_labels)
    tokenizer = load_tokenizer(opened)
    length = choose_length(max_length, opened.config, tokenizer, pairs=found.text_pair is not None)
    encoded = chosen.encode(
        rows, tokenizer, opened.config, found, length, references if kind is not None else None
    )
    batches = make_batches(
        encoded.features,
        chosen.collation(tokenizer, opened.config),
        batch_size,
        leading=fisher_examples or 0,
    )
    network = load_model(
        opened, chosen.model_class(opened.config), complete=chosen.complete, allow_pickle=allow_pickle
    )
    prepare_padding(network, tokenizer)
    header, tensors = collect_statistics(
        network,
        opened.checkpoint,
        _inputs(batches),
        grams=grams,
        fisher=kind,
        fisher_examples=fisher_examples,
        problem=chosen.problem,
        label=label,
        total=len(rows),
    )
    cut = f"; {encoded.truncated} of {len(rows)} texts were longer and cut" if encoded.truncated else ""
    notes = (
        f"task: {chosen.name}",
        f"texts cut at {length} tokens{cut}",
        f"{padding_share(batches):.1%} of the positions were padding, and were left out",
    )
    write_statistics(target, header.model_copy(update={"notes": (*header.notes, *notes)}), tensors)
    return target


def _rows(data: str | Path | Rows, split: str | None, limit: int | None) -> Rows:
    if isinstance(data, Rows):
        return data if limit is None else selected(data, range(min(limit, len(data))))
    return read_rows(data, split=split, limit=limit, prefer=("train",))


def _task(opened: Opened, task: str | Task, kind: FisherKind | None) -> Task:
    """The task, which must suit the model's head."""
    chosen = task_for(task, opened.config)
    chosen.check_head(opened)
    if kind is not None and chosen.problem is None:
        raise UserError(
            f"Fisher information needs a head, which {chosen.name} has not",
            where="--fisher",
            mend="leave it out, or collect on a fine-tuned checkpoint",
        )
    return chosen


def _labels(
    rows: Rows, task: Task, opened: Opened, given: Columns, kind: FisherKind | None, use_labels: bool
) -> tuple[Columns, Any]:
    """The columns, and the labels where they are there: checked, though Gram matrices need none."""
    if not use_labels and kind == "empirical":
        raise UserError(
            "empirical Fisher information is made of labels",
            where="--fisher",
            mend="use the labels, or collect expected",
        )
    columns = task.columns(rows, given, labelled=kind == "empirical")
    if task.label_role is not None and (not use_labels or columns.label is None):
        return columns, None
    try:
        return columns, task.references(rows, columns, task.space(opened.config))
    except DataError as error:
        if kind == "empirical" or task.label_role is None:
            raise
        mend = f"{error.mend}; Gram matrices need no labels: --ignore-labels leaves them unread"
        raise DataError(error.what, where=error.where, mend=mend) from None


def _inputs(batches: Batches) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield batch.inputs


def _fisher_kind(fisher: str | None) -> FisherKind | None:
    kinds: dict[str, FisherKind] = {kind: kind for kind in get_args(FisherKind)}
    if fisher is None:
        return None
    if fisher not in kinds:
        raise UserError(
            f"unknown kind of Fisher information {fisher!r}",
            where="--fisher",
            mend=did_you_mean(fisher, kinds),
        )
    return kinds[fisher]


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(
                f"{name} is {value}", where=f"--{name.replace('_', '-')}", mend="give a number of at least 1"
            )


def _target(opened: Opened, output: str | Path | None, overwrite: bool) -> Path:
    """The file to write, which must not be there and whose folder must take it."""
    home = home_of(opened.checkpoint)
    if output is None and home.revision is not None:
        raise StatisticsError(
            "statistics of a model on the Hub are not written into its cached copy",
            where=opened.name,
            mend=f"say where with -o (in a copy of the repository: {FILE_NAME})",
        )
    target = home.path / FILE_NAME if output is None else Path(output).expanduser()
    if target.is_dir():
        target = target / FILE_NAME
    if target.exists() and not overwrite:
        raise StatisticsError(
            "the statistics file exists", where=target, mend="choose another with -o, or --overwrite it"
        )
    folder = target.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        state = "is not writable" if folder.is_dir() else "does not exist"
        raise StatisticsError(
            f"the folder of the output {state}",
            where=target,
            mend="make the folder, or choose another with -o",
        )
    return target
