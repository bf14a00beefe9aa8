"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from merganser.errors import CheckpointError, DataError
from merganser.tasks.base import Metric, Task
from merganser.tasks.batches import Feature
from merganser.tasks.columns import Columns, column_values
from merganser.tasks.data import Rows
from merganser.tasks.labels import CHOOSE, LabelSpace
from merganser.tasks.models import Opened


def pearson(judgements: np.ndarray) -> float:
    """Pearson's correlation of predicted and true numbers (examples, 2); 0 where either side is constant."""
    predicted, true = judgements.astype(np.float64).T
    if len(true) < 2 or predicted.std() == 0 or true.std() == 0:
        return 0.0
    return float(np.clip(np.corrcoef(predicted, true)[0, 1], -1, 1))


def spearman(judgements: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank."""
    return pearson(np.stack([_ranks(column) for column in judgements.T], axis=1))


def mse(judgements: np.ndarray) -> float:
    """The mean squared error, in the square of the labels' unit (the one score that is no rate)."""
    return float(np.square(judgements[:, 1] - judgements[:, 0]).mean())


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return mean_rank


@dataclass(frozen=True)
class Regression(Task):
    """One number; key metric Pearson's correlation."""

    name = "regression"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    problem = "regression"
    metrics: ClassVar[Mapping[str, Metric]] = {"pearson": pearson, "spearman": spearman, "mse": mse}
    lower_is_better = frozenset({"mse"})
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"label": ("label", "labels", "score", "rating", "similarity")}

    def fits(self, config: Mapping[str, Any]) -> bool:
        """A classifier with a single output."""
        declared = config.get("problem_type")
        return self.has_head(config) and (
            declared == "regression" or (declared is None and len(LabelSpace.of(config)) == 1)
        )

    def check_head(self, opened: Opened) -> None:
        """Refuse heads with more than one output."""
        super().check_head(opened)
        width = len(LabelSpace.of(opened.config))
        if width != 1:
            what = f"regression needs a head with one output, this one has {width}"
            raise CheckpointError(what, where=opened.where, mend="choose --task text-classification or multi-label")

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> np.ndarray:
        """The numbers: float64 (rows,)."""
        values = column_values(rows, columns.label or "label", "label")
        return np.array([_number(value, where) for value, where in values], np.float64)

    def label(self, reference: Any, feature: Feature, space: LabelSpace) -> float:
        """The number."""
        return float(reference)

    def align(self, outputs: Sequence[np.ndarray], own: LabelSpace, space: LabelSpace) -> np.ndarray:
        """Predictions (examples,)."""
        return np.stack(list(outputs)).reshape(len(outputs))

    def judge(self, aligned: np.ndarray, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Predicted and true number: float64 (examples, 2)."""
        return np.stack([aligned.astype(np.float64), np.asarray(references, np.float64)], axis=1)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"label {value!r} is not a finite number", where=where, mend=CHOOSE)
    return number
