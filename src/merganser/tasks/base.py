"""What a task is: which columns it reads, how it makes tokens and labels of them, and how it scores a model.

A new task is one file with a subclass of :class:`Task` (often of one of the existing tasks) and one line in
``merganser.tasks``. The order of work is always: ``columns`` → ``references`` (every label is checked) →
``encode`` → a model is loaded → ``outputs`` → ``align`` → ``judge`` → ``score``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from merganser.errors import CheckpointError, UserError, did_you_mean
from merganser.tasks.batches import Collation, Feature, Label
from merganser.tasks.columns import Columns, resolve, texts
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace, spread
from merganser.tasks.models import Opened, load_tokenizer, padding_id
from merganser.tasks.tokens import Encoded, encode_texts

Metric = Callable[[np.ndarray], float]

#: How labels are distributed given a model's logits: what its loss and its Fisher information are made of.
Problem = Literal["classification", "multi_label", "regression", "tokens", "next_token", "sequence"]

#: Problems whose outputs have names.
NAMED = ("classification", "multi_label", "tokens")
#: What ``config.json`` says.
Config = Mapping[str, Any]
#: The truth of each row, see :meth:`Task.references`; None where there is none.
Truths = Sequence[Any] | None


@dataclass(frozen=True)
class Task:
    """A reader, a head and metrics. Instances hold options only; they are values and can be compared.

    Attributes:
        name: what users call it.
        auto_class: the transformers class that loads the model.
        heads: endings of the architectures that have this task's head.
        metrics: functions of judgements (see :meth:`judge`), rates between 0 and 1; the first is the key
            metric.
        lower_is_better: metrics of which less is better.
        ensembles: whether the outputs of several models can be combined.
        needs: column roles that must be found, labels aside.
        wants: column roles that are taken where they are found.
        label_role: the role of what is to be predicted; None where there is no such column.
        usual: usual column names where they differ from those of :mod:`merganser.tasks.columns`.
        complete: whether every parameter of the model must be in the checkpoint.
        problem: how labels are distributed given logits, for Fisher information; None: there is no head.
        decoder_mask: what tells the decoder's real tokens, where there is one; see
            :class:`~merganser.tasks.batches.Collation`.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    metrics: ClassVar[Mapping[str, Metric]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    ensembles: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("text",)
    wants: ClassVar[tuple[str, ...]] = ("text_pair",)
    label_role: ClassVar[str | None] = "label"
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    complete: ClassVar[bool] = True
    problem: ClassVar[Problem | None] = None
    decoder_mask: ClassVar[str | None] = "inputs"

    @property
    def key_metric(self) -> str:
        """The name of the metric that stands for the task in tables."""
        return next(iter(self.metrics))

    def with_options(self, options: Mapping[str, Any]) -> Task:
        """This task with other options (the fields of its dataclass).

        Raises:
            UserError: an option that the task does not have.
        """
        known = [field.name for field in fields(self)]
        for option in options:
            if option not in known:
                mend = did_you_mean(option, known) if known else "this task has no options"
                raise UserError(f"task {self.name!r} has no option {option!r}", where="task options", mend=mend)
        return replace(self, **options)

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this ``config.json`` was made for the task; ``task_for("auto", …)`` asks."""
        return self.has_head(config)

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """Whether the architecture has this task's head."""
        return architecture(config).endswith(self.heads)

    def check_head(self, opened: Opened) -> None:
        """Refuse a model without this task's head before it is loaded: the head would be random.

        Raises:
            CheckpointError: the architecture has no such head.
        """
        known = architecture(opened.config)
        if known and not self.has_head(opened.config):
            what = f"the model is a {known}, which has no head for {self.name} (a …{self.heads[0]} has)"
            raise CheckpointError(what, where=opened.where, mend="choose another task, or leave it to --task auto")

    def check_scoring(self, opened: Opened) -> None:
        """Refuse a model that this task cannot score, for a reason that its configuration shows.

        Raises:
            CheckpointError: such a reason.
        """
        return

    def load_reader(self, opened: Opened) -> Any:
        """What makes a model's inputs of rows, from its own files: its tokenizer.

        Raises:
            CheckpointError: there is none, or it cannot be loaded.
        """
        return load_tokenizer(opened)

    def model_class(self, config: Mapping[str, Any]) -> str:
        """The transformers class to load a model with."""
        return self.auto_class

    def columns(self, rows: Rows, given: Columns, *, labelled: bool = True) -> Columns:
        """The columns to read; without labels where they are not ``labelled`` or the data have none to give.

        Raises:
            DataError: a column that is needed and not there.
        """
        if self.label_role is None:
            return resolve(rows, given, self.needs, self.wants, self.usual)
        if labelled:
            return resolve(rows, given, (*self.needs, self.label_role), self.wants, self.usual)
        return resolve(rows, given, self.needs, (*self.wants, self.label_role), self.usual)

    def space(self, config: Mapping[str, Any]) -> LabelSpace:
        """What the model can predict; empty for tasks whose outputs have no names."""
        return LabelSpace.of(config) if self.problem in NAMED else LabelSpace(())

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> Any:
        """The truth of each row: a sequence or an array whose first dimension is the rows; None beside the text.

        Raises:
            DataError: a label that is missing, malformed or outside the space, with file and line.
        """
        return [None] * len(rows)

    def encode(
        self, rows: Rows, tokenizer: Any, config: Config, columns: Columns, max_length: int, references: Truths = None
    ) -> Encoded:
        """Tokenise the rows; ``references`` become the features' labels.

        Raises:
            DataError: a text that is missing, malformed or without tokens, with file and line.
        """
        encoded = self.tokenise(rows, tokenizer, config, columns, max_length)
        if references is None:
            return encoded
        space = self.space(config)
        features = [
            replace(feature, labels=self.label(reference, feature, space))
            for feature, reference in zip(encoded.features, references, strict=True)
        ]
        return replace(encoded, features=features)

    def tokenise(
        self, rows: Rows, tokenizer: Any, config: Mapping[str, Any], columns: Columns, max_length: int
    ) -> Encoded:
        """The tokens of the texts, without labels."""
        first = texts(rows, columns.text or "text")
        second = texts(rows, columns.text_pair, "text_pair") if columns.text_pair else None
        return encode_texts(rows, first, second, tokenizer, config, max_length)

    def label(self, reference: Any, feature: Feature, space: LabelSpace) -> Label:
        """A reference as a label of transformers' own loss, beside the tokens that it belongs to."""
        raise NotImplementedError

    def collation(self, tokenizer: Any, config: Mapping[str, Any]) -> Collation:
        """How features become tensors."""
        absent = self.decoder_mask == "inputs" and not config.get("is_encoder_decoder")
        return Collation(padding_id(tokenizer), None if absent else self.decoder_mask)

    def outputs(
        self, model: nn.Module, inputs: dict[str, Tensor], features: Sequence[Feature], tokenizer: Any
    ) -> list[Any]:
        """What a model says of each example of a batch, small enough to be kept: its logits (labels,) here.

        Args:
            model: in eval mode.
            inputs: the batch, on the model's device, without labels.
            features: the batch before it became tensors.
            tokenizer: of the model.
        """
        with torch.inference_mode():
            logits: Tensor = model(**inputs).logits
        return list(logits.float().cpu().numpy())

    def align(self, outputs: Sequence[Any], own: LabelSpace, space: LabelSpace) -> Any:
        """Outputs over a model's own labels as outputs over ``space``; NaN where it does not know one."""
        return spread(np.stack(list(outputs)), own, space)

    def combine(self, aligned: Sequence[Any]) -> Any:
        """The ensemble: the mean of the models' logits, each label over the models that know it.

        Args:
            aligned: for each model what :meth:`align` returned.
        """
        return mean_of_known(np.stack(list(aligned)))

    def judge(self, aligned: Any, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Predictions beside truths, an array (examples, …): all that the metrics see."""
        return np.asarray(aligned)

    def by_label(self, aligned: Any, references: Sequence[Any], space: LabelSpace) -> dict[str, float]:
        """The F1 of each label that occurs, where the task has labels; of tokens, of each type of entity."""
        return {}

    def score(self, judgements: np.ndarray) -> dict[str, float]:
        """Every metric of the judgements."""
        return {name: float(metric(judgements)) for name, metric in self.metrics.items()}


def architecture(config: Mapping[str, Any]) -> str:
    """The first of a configuration's ``architectures``, or an empty string."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def mean_of_known(stacked: np.ndarray) -> np.ndarray:
    """The mean over the first dimension, leaving NaN out; NaN where every entry is NaN."""
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0).sum(axis=0, dtype=np.float64)
    count = known.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
