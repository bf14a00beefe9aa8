"""The verb ``evaluate``: several models and their ensemble on several data sets.

merganser evaluate MODEL MODEL --data a.jsonl --data b.jsonl
merganser.evaluate(["merged", "specialist"], ["a.jsonl", "b.jsonl"], ensemble=True).table()
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from merganser import progress
from merganser.checkpoints.opening import model_reference
from merganser.errors import CheckpointError, ErrorCollector, UserError, did_you_mean
from merganser.evaluation.bootstrap import difference, resample, standard_error
from merganser.evaluation.encoders import compare_embeddings, load_encoder
from merganser.evaluation.result import Evaluation, Score
from merganser.tasks import task_for
from merganser.tasks.base import Task
from merganser.tasks.columns import Columns
from merganser.tasks.data import DataSource, Rows, in_memory, read_rows
from merganser.tasks.embedding import Embedding
from merganser.tasks.labels import LabelSpace, union
from merganser.tasks.models import Opened, load_model, load_tokenizer, open_model, prepare_padding
from merganser.tasks.predict import Prediction, predict

T = TypeVar("T")

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class _EvaluatedModel:
    """A model with its task and the labels that it is scored over: its own, or everyone's in an ensemble."""

    name: str
    opened: Opened
    task: Task
    space: LabelSpace


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: DataSource | Sequence[DataSource],
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
        data: files, folders or data sets, see :func:`merganser.tasks.data.read_rows`; a split can be chosen for each as
            ``source[split]``. A list of dictionaries by column is one; a list of texts names several.
        task: a name of :data:`merganser.tasks.TASKS`, or ``auto`` to go by each model's configuration.
        task_options: of the task, such as ``{"threshold_on": "logit"}`` for ``multi-label``.
        columns: names of the columns; what is not given is found by its usual name.
        ensemble: add a row ``ensemble``: the mean of the models' logits, each label over the models that know
            it (for generated texts, the majority vote). Labels are then those of all models together.
        metric: the metric to show in tables, instead of the task's key metric.
        split: of data that have several.
        limit: use at most this many rows of each data set, the first ones.
        batch_size: examples in a batch.
        max_length: tokens at which a text is cut; by default 128 (for embeddings what the model says), and never more
            than the model takes.
        bootstrap: how many bootstrap samples give the standard error and the paired differences; 0 for none.
        device: to run on; by default the GPU where there is one.
        allow_pickle: accept pickled weights (read with ``weights_only``).

    Returns:
        A score for each model (and the ensemble) on each data set; rates are between 0 and 1.

    Raises:
        UserError: any mistake in the arguments, the models or the data.
    """
    references, sources = _models(models), _sources(data)
    if batch_size < 1 or bootstrap < 0 or (max_length is not None and max_length < 1):
        raise UserError("batch size and length must be at least 1, bootstrap 0 or more", where="evaluate")
    if ensemble and len(references) < 2:
        raise UserError("an ensemble needs at least two models", where="--ensemble", mend="give more models")
    errors = ErrorCollector()
    options = dict(task_options or {})
    models_found = _found(errors.catch(_open, name, task, options, allow_pickle) for name in references)
    rows_of = _found(errors.catch(read_rows, one, split=split, limit=limit, called=name) for name, one in sources)
    if len(models_found) == len(references):
        errors.catch(_check_together, models_found, ensemble, metric)
    errors.raise_all()
    _check_names([rows.source for rows in rows_of], "data")
    if ensemble:
        joint = union(model.space for model in models_found)
        models_found = [replace(model, space=joint) for model in models_found]
    given = Columns.of(columns)
    truths = [_found(errors.catch(_truth, model, rows, given) for rows in rows_of) for model in models_found]
    tokenizers = [  # an encoder of sentences has its own
        None if isinstance(model.task, Embedding) else errors.catch(load_tokenizer, model.opened)
        for model in models_found
    ]
    errors.raise_all()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictions: list[list[Prediction]] = []  # of each model, on each data set
    with progress.bar(len(models_found) * sum(map(len, rows_of)), "evaluating", "ex") as bar:
        for model, tokenizer, of_model in zip(models_found, tokenizers, truths, strict=True):
            how: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "bar": bar}
            if isinstance(model.task, Embedding):
                encoder = load_encoder(model.opened, place, allow_pickle=allow_pickle)
                say: Callable[..., Prediction] = partial(compare_embeddings, encoder, model.task, name=model.name)
                del encoder
            else:
                say = _outputs(model, tokenizer, place, allow_pickle)
            predictions.append([say(rows, read, **how) for rows, (read, _) in zip(rows_of, of_model, strict=True)])
            del say
    if ensemble:
        first = models_found[0]
        predictions.append([_combined(first.task, alone) for alone in zip(*predictions, strict=True)])
        truths.append(truths[0])
        models_found.append(replace(first, name=ENSEMBLE))
    scores = _scores(models_found, rows_of, truths, predictions, metric, bootstrap)
    settings = {"limit": limit, "max_length": max_length, "bootstrap": bootstrap, "task_options": options}
    return Evaluation(tuple(scores), settings)


def _found(items: Iterable[T | None]) -> list[T]:
    return [item for item in items if item is not None]


def _models(given: Any) -> list[str]:
    single = not isinstance(given, Iterable) or isinstance(given, str | os.PathLike | Mapping)
    found = [model_reference(one) for one in ([given] if single else given)]
    if not found:
        raise UserError("no models to evaluate", where="models", mend="give at least one of the models")
    _check_names(found, "models")
    return found


def _sources(given: Any) -> list[tuple[str, DataSource]]:
    """What to read, each with a name."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    if found and isinstance(found[0], Mapping) and not isinstance(given, Mapping):  # the rows of one
        found = [found]
    if not found:
        raise UserError("no data to evaluate", where="data", mend="give at least one of the data")
    called = ["data" if len(found) == 1 else f"data {number}" for number in range(1, len(found) + 1)]
    named = [(name if in_memory(one) else str(one), one) for name, one in zip(called, found, strict=True)]
    _check_names([name for name, _ in named], "data")
    return named


def _check_names(names: Sequence[str], what: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{', '.join(twice)} is given twice", where=what, mend="give each once")
    if what == "models" and ENSEMBLE in names:
        raise UserError(f"{ENSEMBLE!r} names the ensemble", where=what, mend=f"write ./{ENSEMBLE} for the folder")


def _open(name: str, task: str | Task, options: dict[str, Any], allow_pickle: bool) -> _EvaluatedModel:
    opened = open_model(name, allow_pickle=allow_pickle, codes=True)
    try:
        chosen = task_for(task, opened.config, **options)
    except UserError as error:
        if error.where != "config.json":
            raise
        raise CheckpointError(error.what, where=opened.where, mend=error.mend) from None
    chosen.check_head(opened)
    chosen.check_scoring(opened)
    return _EvaluatedModel(name, opened, chosen, chosen.space(opened.config))


def _check_together(evaluated: Sequence[_EvaluatedModel], ensemble: bool, metric: str | None) -> None:
    problems = ErrorCollector()
    tasks = {model.task.name: model.task for model in evaluated}
    for name, task in tasks.items():
        if metric is not None and metric not in task.metrics:
            mend = did_you_mean(metric, task.metrics)
            problems.add(UserError(f"{name} has no metric {metric!r}", where="--metric", mend=mend))
    if ensemble and len(tasks) > 1:
        named = ", ".join(f"{model.name} ({model.task.name})" for model in evaluated)
        what = f"models of different tasks make no ensemble: {named}"
        mend = "leave the ensemble out, or name one task with --task"
        problems.add(UserError(what, where="--ensemble", mend=mend))
    elif ensemble and not evaluated[0].task.ensembles:
        what = f"{evaluated[0].task.name} has no ensemble: its outputs are too large to be kept"
        problems.add(UserError(what, where="--ensemble", mend="leave the ensemble out"))
    problems.raise_all()


def _truth(model: _EvaluatedModel, rows: Rows, given: Columns) -> tuple[Columns, Any]:
    columns = model.task.columns(rows, given)
    return columns, model.task.references(rows, columns, model.space)


def _outputs(model: _EvaluatedModel, tokenizer: Any, place: str, allow_pickle: bool) -> Callable[..., Prediction]:
    """What a model with a head says of rows, the model loaded as long as this is kept."""
    opened, task = model.opened, model.task
    class_name = task.model_class(opened.config)
    network = load_model(opened, class_name, complete=task.complete, allow_pickle=allow_pickle)
    prepare_padding(network, tokenizer)

    def say(rows: Rows, read: Columns, **how: Any) -> Prediction:
        return predict(network, tokenizer, opened.config, task, rows, read, model.space, name=model.name, **how)

    network.to(place)
    return say


def _combined(task: Task, alone: Sequence[Prediction]) -> Prediction:
    """What the ensemble says of a data set."""
    aligned = task.combine([one.aligned for one in alone])
    return Prediction(aligned, max(one.truncated for one in alone), min(one.max_length for one in alone))


def _scores(
    evaluated: Sequence[_EvaluatedModel],
    rows_of: Sequence[Rows],
    truths: Sequence[Sequence[tuple[Columns, Any]]],
    predictions: Sequence[Sequence[Prediction]],
    metric: str | None,
    bootstrap: int,
) -> list[Score]:
    scores: list[Score] = []
    firsts: dict[int, tuple[Task, float, np.ndarray]] = {}
    for model, of_model, said in zip(evaluated, truths, predictions, strict=True):
        task, key = model.task, metric or model.task.key_metric
        for number, (rows, (_, truth), prediction) in enumerate(zip(rows_of, of_model, said, strict=True)):
            judgements = task.judge(prediction.aligned, truth, model.space)
            values = task.score(judgements)
            samples = resample(judgements, task.metrics[key], bootstrap)
            first = firsts.setdefault(number, (task, values[key], samples))
            paired = model is not evaluated[0] and first[0].name == task.name
            scores.append(
                Score(
                    model=model.name,
                    data=rows.source,
                    task=task.name,
                    key_metric=key,
                    higher_is_better=key not in task.lower_is_better,
                    scores=values,
                    examples=len(rows),
                    truncated=prediction.truncated,
                    max_length=prediction.max_length,
                    standard_error=standard_error(samples),
                    versus_first=difference(values[key], first[1], samples, first[2]) if paired else None,
                )
            )
    return scores
