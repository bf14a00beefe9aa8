"""From a task, rows and a base to what the Trainer needs; labels are checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from merganser.errors import DataError, UserError, did_you_mean
from merganser.tasks.base import Task
from merganser.tasks.batches import Collation, Feature
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.models import choose_length
from merganser.tasks.predict import predict
from merganser.training.heads import Start, open_start
from merganser.training.losses import Loss, make_loss
from merganser.training.settings import TrainingSettings

GivenColumns = Columns | Mapping[str, str | None] | None


@dataclass(frozen=True)
class TrainingPart:
    """One of the data sets.

    Attributes:
        name: of the data set, and of its folder in the output.
        task: of the data.
        rows: to train on.
        labels: the head's outputs in order.
        dev: development data.
        metric: of the development score; by default the task's key metric.
        columns: what is not given is found by its usual name.
    """

    name: str
    task: Task
    rows: Rows
    labels: Sequence[str] = ()
    dev: Rows | None = None
    metric: str | None = None
    columns: GivenColumns = None


@dataclass(frozen=True)
class Dev:
    """Development data with their truths.

    Attributes:
        rows, columns, references: the data.
        metric: which of the task's metrics counts.
    """

    rows: Rows
    columns: Columns
    references: Any
    metric: str


@dataclass(frozen=True)
class Prepared:
    """A task's training data as tokens, and its development data.

    Attributes:
        start: the base and the head.
        features: the training data.
        collation: makes tensors of them.
        dev: None where there is none.
        loss: None where the model's own is right.
    """

    start: Start
    features: Sequence[Feature]
    collation: Collation
    dev: Dev | None
    loss: Loss | None

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of :class:`~merganser.training.loop.FeatureData`."""
        return self.collation([example["feature"] for example in examples])

    @property
    def higher_is_better(self) -> bool:
        """Of the development score."""
        return self.dev is None or self.dev.metric not in self.start.task.lower_is_better

    def score(self, model: nn.Module, settings: TrainingSettings) -> float:
        """The score of a model in eval mode on the development data."""
        if self.dev is None:
            raise RuntimeError("scored without development data")
        task, config = self.start.task, self.start.config
        space = task.space(config)
        found = predict(
            model,
            self.start.tokenizer,
            config,
            task,
            self.dev.rows,
            self.dev.columns,
            space,
            name="the model in training",
            batch_size=max(32, settings.batch_size),
            max_length=settings.max_length,
        )
        judgements = task.judge(found.aligned, self.dev.references, space)
        return task.score(judgements)[self.dev.metric]


def prepare(
    base: str | Path, part: TrainingPart, settings: TrainingSettings, folder: Path, *, allow_pickle: bool
) -> Prepared:
    """Check and tokenise the data of a task.

    Args:
        base: a model folder or a Hub name.
        part: the task and its data.
        settings: of the training.
        folder: for the tokenizer, which is saved before anything is tokenised, because that may change its state.
        allow_pickle: accept a base whose weights are pickled.

    Raises:
        UserError: any mistake in the base, the labels, the data or the settings.
    """
    task, rows = part.task, part.rows
    if not len(rows):
        raise DataError("there are no rows to train on", where=rows.source, mend="give at least one row")
    start = open_start(base, task, part.labels, allow_pickle=allow_pickle)
    space, given = task.space(start.config), Columns.of(part.columns)
    found = task.columns(rows, given)
    references = task.references(rows, found, space)
    dev = None if part.dev is None else _dev(start, part.dev, part.metric, given)
    tokenizer = start.tokenizer
    tokenizer.save_pretrained(folder)
    length = choose_length(settings.max_length, start.config, tokenizer, pairs=found.text_pair is not None)
    features = task.encode(rows, tokenizer, start.config, found, length, references).features
    loss = make_loss(task.problem, features, len(start.labels), settings.reweight, rows.source)
    return Prepared(start, features, task.collation(tokenizer, start.config), dev, loss)


def _dev(start: Start, dev: Rows, metric: str | None, given: Columns) -> Dev:
    task = start.task
    task.check_scoring(replace(start.opened, config=start.config))
    chosen = metric or task.key_metric
    if chosen not in task.metrics:
        mend = did_you_mean(chosen, task.metrics)
        raise UserError(f"{task.name} has no metric {chosen!r}", where="metric", mend=mend)
    if not len(dev):
        raise DataError("there are no development rows", where=dev.source, mend="give some, or no data")
    columns = task.columns(dev, given)
    return Dev(dev, columns, task.references(dev, columns, task.space(start.config)), chosen)
