"""Multi-label classification: any number of labels for a text, and labels that were not annotated at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from merganser.errors import DataError, UserError
from merganser.tasks.base import Metric, Task
from merganser.tasks.batches import Feature
from merganser.tasks.columns import Columns, column_values
from merganser.tasks.data import Rows
from merganser.tasks.labels import CHOOSE, LabelReader, LabelSpace

NOT_ANNOTATED = -1
_BINARY = (0, 1, None)  # True and False are equal to these, too


def macro_f1(judgements: np.ndarray) -> float:
    """The mean over the annotated labels of each label's F1 on the examples on which it is annotated.

    A label is annotated when any example has a 0 or a 1 for it. Its F1 is 0 where it is neither true nor
    predicted anywhere (scikit-learn's rule). Judgements: (examples, 2, labels) of predicted and true, -1 for
    not annotated.
    """
    by_label = [_annotated(alone) for alone in np.moveaxis(judgements, 2, 0)]
    scores = [_f1(predicted, true) for predicted, true in by_label if len(true)]
    return float(np.mean(scores)) if scores else 0.0


def micro_f1(judgements: np.ndarray) -> float:
    """F1 over all annotated decisions together."""
    return _f1(*_annotated(judgements))


def _annotated(judgements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true of the decisions that are annotated, in a row each."""
    predicted, true = judgements[:, 0], judgements[:, 1]
    known = true != NOT_ANNOTATED
    return predicted[known], true[known]


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of zeros and ones; 0 where there is no one among them."""
    ones = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / ones) if ones else 0.0


def accuracy(judgements: np.ndarray) -> float:
    """The share of right ones among the annotated decisions."""
    predicted, true = _annotated(judgements)
    return float((predicted == true).mean()) if len(true) else 0.0


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels; key metric macro-F1 over the annotated labels.

    Attributes:
        threshold: above what a label is predicted.
        threshold_on: what is compared with it: the ``probability`` (sigmoid of the logit), or the raw
            ``logit``, as the public code of the RegMean paper has it.
    """

    threshold: float = 0.5
    threshold_on: str = "probability"

    name = "multi-label"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    problem = "multi_label"
    metrics: ClassVar[Mapping[str, Metric]] = {"macro_f1": macro_f1, "micro_f1": micro_f1, "accuracy": accuracy}
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"label": ("labels", "label", "classes", "categories")}

    def __post_init__(self) -> None:
        if self.threshold_on not in ("probability", "logit"):
            mend = "give probability or logit"
            raise UserError(f"a threshold on {self.threshold_on!r} is unknown", where="threshold_on", mend=mend)

    def fits(self, config: Mapping[str, Any]) -> bool:
        """A classifier whose configuration says so."""
        return self.has_head(config) and config.get("problem_type") == "multi_label_classification"

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> np.ndarray:
        """1, 0 or NaN (not annotated) for each label: float32 (rows, labels).

        A row gives a list of labels (names or places; all others are 0), a vector of 0, 1 and null with an
        entry for each label, or a mapping from labels to 0, 1 or null (labels that it lacks are not
        annotated). Lists count as vectors when all lists of the column look like vectors. In CSV files: JSON,
        or labels separated by ``|``.
        """
        column = columns.label or "labels"
        values = [_parse(value, where) for value, where in column_values(rows, column, "label")]
        lists = [value for value in values if isinstance(value, list)]
        vectors = bool(lists) and all(_is_vector(value, len(space)) for value in lists)
        vectors = vectors or any(None in value for value in lists)  # a list of labels has no null: some are malformed
        reader = LabelReader(space, rows.class_names.get(column))
        found = np.zeros((len(rows), len(space)), np.float32)
        for index, value in enumerate(values):
            where = rows.where(index)
            if isinstance(value, dict):
                found[index] = np.nan
                for name, mark in value.items():
                    found[index, reader.read(name, where)] = _mark(mark, where)
            elif vectors:
                if len(value) != len(space):
                    what = f"{len(value)} entries for the model's {len(space)} labels: {space.valid()}"
                    raise DataError(what, where=where, mend=CHOOSE)
                found[index] = [_mark(mark, where) for mark in value]
            else:
                for label in value:
                    found[index, reader.read(label, where)] = 1
        return found

    def label(self, reference: Any, feature: Feature, space: LabelSpace) -> list[float]:
        """A float for each label; NaN is kept for those that are not annotated."""
        return [float(value) for value in reference]

    def judge(self, aligned: np.ndarray, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Predicted and true marks: int8 (examples, 2, labels); truths that are not annotated are -1."""
        scores = aligned
        if self.threshold_on == "probability":
            scores = 0.5 * (1 + np.tanh(0.5 * aligned.astype(np.float64)))  # the sigmoid, without overflow
        with np.errstate(invalid="ignore"):
            predicted = np.where(np.isnan(scores), False, scores > self.threshold)
        true = np.asarray(references)
        marks = np.where(np.isnan(true), NOT_ANNOTATED, true)
        return np.stack([predicted.astype(np.int8), marks.astype(np.int8)], axis=1)

    def by_label(self, aligned: np.ndarray, references: Sequence[Any], space: LabelSpace) -> dict[str, float]:
        """F1 of each annotated label; their mean is the key metric."""
        alone = np.moveaxis(self.judge(aligned, references, space), 2, 0)
        decisions = zip(space.names, map(_annotated, alone), strict=True)
        return {name: _f1(predicted, true) for name, (predicted, true) in decisions if len(true)}


def _parse(value: Any, where: str) -> list[Any] | dict[Any, Any]:
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith(("[", "{")):
            return [part.strip() for part in text.split("|") if part.strip()]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the labels are no JSON: {error}", where=where, mend=CHOOSE) from None
    if isinstance(value, int | float):
        return [value]
    if not isinstance(value, list | tuple | dict):
        raise DataError(f"the labels are a {type(value).__name__}, not a list", where=where, mend=CHOOSE)
    return value if isinstance(value, dict) else list(value)


def _is_vector(value: list[Any], width: int) -> bool:
    return len(value) == width and all(not isinstance(mark, str) and mark in _BINARY for mark in value)


def _mark(mark: Any, where: str) -> float:
    if mark is None:
        return float("nan")
    if isinstance(mark, str) or mark not in _BINARY:
        raise DataError(f"a label is marked {mark!r}", where=where, mend="mark it 0, 1 or null (not annotated)")
    return float(mark)
