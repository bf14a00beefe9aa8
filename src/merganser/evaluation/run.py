"""The verb ``evaluate``: several models and their ensemble on several data sets.

merganser evaluate MODEL MODEL --data a.jsonl --data b.jsonl
merganser.evaluate(["merged", "specialist"], ["a.jsonl", "b.jsonl"], ensemble=True).table()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from merganser import progress
from merganser.errors import CheckpointError, ErrorCollector, UserError, did_you_mean, raise_all
from merganser.evaluation.bootstrap import difference, resample, standard_error
from merganser.evaluation.result import Evaluation, Score
from merganser.tasks import task_for
from merganser.tasks.base import Task
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, read_rows
from merganser.tasks.labels import LabelSpace, union
from merganser.tasks.models import Opened, load_model, load_tokenizer, open_model, prepare_padding
from merganser.tasks.predict import Prediction, predict

T = TypeVar("T")

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class _Member:
    """A model with its task and label space."""

    opened: Opened
    task: Task
    space: LabelSpace


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | Sequence[str | Path],
    *,
    task: str | Task = "auto",
    task_options: Mapping[str, Any] | None = None,
    columns: Columns | Mapping[str, str | None] | None = None,
    ensemble: bool = False,
    metric: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    bootstrap: int = 200,
    device: str | None = None,
    allow_pickle: bool = False,
) -> Evaluation:
    """Score models on data sets.

    Every model, data set and label is checked before the first model is loaded, and each model is loaded
    once.

    Args:
        models: folders, ``folder::heads/name`` or ``org/name@revision``.
        data: see :func:`merganser.tasks.data.read_rows`; a split can be chosen for each as ``source[split]``.
        task: a name of :data:`merganser.tasks.TASKS`, or ``auto`` to go by each model's configuration.
        task_options: of the task, such as ``{"threshold_on": "logit"}`` for ``multi-label``.
        columns: names of the columns; what is not given is found by its usual name.
        ensemble: add a row ``ensemble``: the mean of the models' logits, each label over the models that know
            it (for generated texts, the majority vote). Labels are then those of all models together.
        metric: the metric to show in tables, instead of the task's key metric.
        split: of data that have several.
        limit: use at most this many rows of each data set, the first ones.
        batch_size: examples in a batch.
        max_length: tokens at which a text is cut; by default 128, and never more than the model takes.
        bootstrap: how many bootstrap samples give the standard error and the paired differences; 0 for none.
        device: to run on; by default the GPU where there is one.
        allow_pickle: accept pickled weights (read with ``weights_only``).

    Returns:
        A score for each model (and the ensemble) on each data set; rates are between 0 and 1.

    Raises:
        UserError: any mistake in the arguments, the models or the data.
    """
    references, sources = _as_list(models, "models"), _as_list(data, "data")
    if batch_size < 1 or bootstrap < 0 or (max_length is not None and max_length < 1):
        raise UserError("batch size and length must be at least 1, bootstrap 0 or more", where="evaluate")
    if ensemble and len(references) < 2:
        raise UserError("an ensemble needs at least two models", where="--ensemble", mend="give more models")
    errors = ErrorCollector()
    options = dict(task_options or {})
    members = _found(errors.catch(_member, name, task, options, allow_pickle) for name in references)
    rows_of = _found(errors.catch(read_rows, source, split=split, limit=limit) for source in sources)
    if len(members) == len(references):
        errors.catch(_check_together, members, ensemble, metric)
    errors.raise_all()
    _check_names([rows.source for rows in rows_of], "data")
    spaces = _spaces(members, ensemble)
    given = Columns.of(columns)
    truths: dict[tuple[int, int], tuple[Columns, Any]] = {}
    for m, (member, space) in enumerate(zip(members, spaces, strict=True)):
        for d, rows in enumerate(rows_of):
            truth = errors.catch(_truth, member, rows, given, space)
            if truth is not None:
                truths[m, d] = truth
    tokenizers = [errors.catch(load_tokenizer, member.opened) for member in members]
    errors.raise_all()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cells: dict[tuple[int, int], Prediction] = {}
    total = len(members) * sum(map(len, rows_of))
    with progress.bar(total, "evaluating", "ex") as bar:
        for m, (member, tokenizer, space) in enumerate(zip(members, tokenizers, spaces, strict=True)):
            network = _load(member, tokenizer, place, allow_pickle)
            for d, rows in enumerate(rows_of):
                cells[m, d] = predict(
                    network,
                    tokenizer,
                    member.opened.config,
                    member.task,
                    rows,
                    truths[m, d][0],
                    space,
                    name=member.opened.name,
                    batch_size=batch_size,
                    max_length=max_length,
                    bar=bar,
                )
            del network
    labels = [(member.opened.name, member.task, space) for member, space in zip(members, spaces, strict=True)]
    if ensemble:
        joint, first = len(members), members[0].task
        labels.append((ENSEMBLE, first, spaces[0]))
        for d in range(len(rows_of)):
            parts = [cells[m, d] for m in range(len(members))]
            truths[joint, d] = truths[0, d]
            cells[joint, d] = Prediction(
                first.combine([part.aligned for part in parts]),
                max(part.truncated for part in parts),
                min(part.max_length for part in parts),
            )
    scores = _scores(labels, rows_of, cells, truths, metric, bootstrap)
    settings = {"limit": limit, "max_length": max_length, "bootstrap": bootstrap, "task_options": options}
    return Evaluation(tuple(scores), settings)


def _found(items: Iterable[T | None]) -> list[T]:
    return [item for item in items if item is not None]


def _as_list(given: str | Path | Sequence[str | Path], what: str) -> list[str]:
    found = [str(given)] if isinstance(given, str | Path) else [str(item) for item in given]
    if not found:
        raise UserError(f"no {what} to evaluate", where=what, mend=f"give at least one of the {what}")
    _check_names(found, what)
    return found


def _check_names(names: Sequence[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)} is given twice", where=what, mend="give each once")
    if what == "models" and ENSEMBLE in names:
        raise UserError(f"{ENSEMBLE!r} names the ensemble", where=what, mend=f"write ./{ENSEMBLE} for the folder")


def _member(name: str, task: str | Task, options: dict[str, Any], allow_pickle: bool) -> _Member:
    opened = open_model(name, allow_pickle=allow_pickle)
    try:
        chosen = task_for(task, opened.config, **options)
    except UserError as error:
        if error.where != "config.json":
            raise
        raise CheckpointError(error.what, where=opened.where, mend=error.mend) from None
    chosen.check_head(opened)
    chosen.check_scoring(opened)
    return _Member(opened, chosen, chosen.space(opened.config))


def _check_together(members: Sequence[_Member], ensemble: bool, metric: str | None) -> None:
    problems: list[UserError] = []
    for task in {member.task.name: member.task for member in members}.values():
        if metric is not None and metric not in task.metrics:
            mend = did_you_mean(metric, task.metrics)
            problems.append(UserError(f"{task.name} has no metric {metric!r}", where="--metric", mend=mend))
    if ensemble and len({member.task.name for member in members}) > 1:
        named = ", ".join(f"{member.opened.name} ({member.task.name})" for member in members)
        problems.append(
            UserError(
                f"models of different tasks make no ensemble: {named}",
                where="--ensemble",
                mend="leave the ensemble out, or name one task with --task",
            )
        )
    elif ensemble and not members[0].task.ensembles:
        problems.append(
            UserError(
                f"{members[0].task.name} has no ensemble: its outputs are too large to be kept",
                where="--ensemble",
                mend="leave the ensemble out",
            )
        )
    raise_all(problems)


def _spaces(members: Sequence[_Member], ensemble: bool) -> list[LabelSpace]:
    """The labels that each model is scored over: its own, or everyone's where they make an ensemble."""
    if not ensemble:
        return [member.space for member in members]
    return [union(member.space for member in members)] * len(members)


def _truth(member: _Member, rows: Rows, given: Columns, space: LabelSpace) -> tuple[Columns, Any]:
    columns = member.task.columns(rows, given)
    return columns, member.task.references(rows, columns, space)


def _load(member: _Member, tokenizer: Any, place: str, allow_pickle: bool) -> nn.Module:
    network = load_model(
        member.opened,
        member.task.model_class(member.opened.config),
        complete=member.task.complete,
        allow_pickle=allow_pickle,
    )
    prepare_padding(network, tokenizer)
    return network.to(place)


def _scores(
    labels: Sequence[tuple[str, Task, LabelSpace]],
    rows_of: Sequence[Rows],
    cells: Mapping[tuple[int, int], Prediction],
    truths: Mapping[tuple[int, int], tuple[Columns, Any]],
    metric: str | None,
    bootstrap: int,
) -> list[Score]:
    scores: list[Score] = []
    firsts: dict[int, tuple[Task, float, np.ndarray]] = {}
    for m, (name, task, space) in enumerate(labels):
        key = metric or task.key_metric
        for d, rows in enumerate(rows_of):
            cell = cells[m, d]
            judgements = task.judge(cell.aligned, truths[m, d][1], space)
            values = task.score(judgements)
            samples = resample(judgements, task.metrics[key], bootstrap)
            first = firsts.setdefault(d, (task, values[key], samples))
            paired = m > 0 and first[0].name == task.name
            scores.append(
                Score(
                    model=name,
                    data=rows.source,
                    task=task.name,
                    key_metric=key,
                    higher_is_better=key not in task.lower_is_better,
                    scores=values,
                    examples=len(rows),
                    truncated=cell.truncated,
                    max_length=cell.max_length,
                    standard_error=standard_error(samples),
                    versus_first=difference(values[key], first[1], samples, first[2]) if paired else None,
                )
            )
    return scores
