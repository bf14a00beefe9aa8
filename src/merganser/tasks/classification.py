"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from merganser.errors import UserError, did_you_mean
from merganser.tasks.base import Metric, Task
from merganser.tasks.batches import Feature
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace, read_classes


def accuracy(judgements: np.ndarray) -> float:
    """The share of right predictions. Judgements: (examples, 2) of predicted and true labels."""
    return float((judgements[:, 0] == judgements[:, 1]).mean())


def macro_f1(judgements: np.ndarray) -> float:
    """The mean of the labels' F1 over the labels that occur among the truths or the predictions.

    A label that neither has is left out: scikit-learn's rule where no list of labels is given.
    """
    hits, predicted, true = _counts(judgements)
    seen = predicted + true
    return float(np.mean(2 * hits[seen > 0] / seen[seen > 0]))


def matthews(judgements: np.ndarray) -> float:
    """Matthews' correlation coefficient (-1 … 1), 0 where either side has one label only."""
    hits, predicted, true = _counts(judgements)
    total = len(judgements)
    spread_of_both = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    if not spread_of_both:
        return 0.0
    return float((hits.sum() * total - true @ predicted) / np.sqrt(spread_of_both))


def _counts(judgements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each label is predicted rightly, is predicted, and is true: float64 (labels,)."""
    predicted, true = judgements.T
    size = int(judgements.max()) + 1
    found = (true[predicted == true], predicted, true)
    hits, predictions, truths = (np.bincount(labels, minlength=size).astype(np.float64) for labels in found)
    return hits, predictions, truths


@dataclass(frozen=True)
class TextClassification(Task):
    """One of several labels; key metric macro-F1 unless another is chosen.

    Attributes:
        key: the key metric, one of ``macro_f1``, ``accuracy`` and ``matthews``; empty for the first.

    Raises:
        UserError: a key that is none of these.
    """

    key: str = ""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    problem = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = {"macro_f1": macro_f1, "accuracy": accuracy, "matthews": matthews}

    def __post_init__(self) -> None:
        if self.key and self.key not in self.metrics:
            mend = did_you_mean(str(self.key), self.metrics)
            raise UserError(f"task {self.name!r} has no metric {self.key!r}", where="key", mend=mend)

    @property
    def key_metric(self) -> str:
        """The chosen metric, or macro-F1."""
        return self.key or super().key_metric

    def fits(self, config: Mapping[str, Any]) -> bool:
        """A classifier that is neither a multi-label one nor a regression."""
        multiple = config.get("problem_type") in ("multi_label_classification", "regression")
        return self.has_head(config) and not multiple and len(self.space(config)) > 1

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> np.ndarray:
        """The place of each label in the space: int64 (rows,)."""
        return read_classes(rows, columns.label or "label", space)

    def label(self, reference: Any, feature: Feature, space: LabelSpace) -> int:
        """The class."""
        return int(reference)

    def judge(self, aligned: np.ndarray, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Predicted and true label: int64 (examples, 2). A label that no model knows is never predicted."""
        known = np.where(np.isnan(aligned), -np.inf, aligned)
        return np.stack([known.argmax(axis=1), np.asarray(references)], axis=1)
