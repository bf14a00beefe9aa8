"""Losses that transformers' models do not have: labels that were not annotated, and reweighting.

Reweighting by ``sqrt-inverse``: with the frequency fₗ of label l in the training data, its weight is

    wₗ = fₗ^(−½) / mean over labels of f^(−½)

so that rare labels weigh more and the weights' mean is 1. In classification, of texts or of tokens, fₗ is the
share of the examples (or labelled tokens) with class l, and an example's cross-entropy is multiplied by the
weight of its true class. In multi-label classification, fₗ is the share of positives among the examples that
annotate l (a label without a positive counts as if it had one), and both a label's positives and its
negatives are multiplied by wₗ. The mean is taken over examples (tokens, annotated decisions), not divided by
the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merganser.errors import DataError, UserError
from merganser.tasks.base import Problem
from merganser.tasks.batches import IGNORED, Feature

#: Logits and labels to a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(
    problem: Problem | None, features: Sequence[Feature], labels: int, reweight: str, source: str
) -> Loss | None:
    """The loss of a task; None where the model's own is right.

    Args:
        problem: of the task.
        features: the training data with their labels.
        labels: how many outputs the head has.
        reweight: ``none`` or ``sqrt-inverse``.
        source: of the data, for messages.

    Raises:
        UserError: reweighting a task whose outputs are not labels.
        DataError: no label is annotated anywhere.
    """
    weighted = reweight != "none"
    if weighted and problem not in ("classification", "multi_label", "tokens"):
        mend = "give reweight: none"
        raise UserError("reweighting by label frequency has no meaning for this task", where="reweight", mend=mend)
    if problem == "multi_label":
        marks = np.array([feature.labels for feature in features], np.float64)
        if not np.isfinite(marks).any():
            raise DataError("no label is annotated in any row", where=source, mend="give labelled data")
        weights = multi_label_weights(marks) if weighted else np.ones(labels)
        return partial(_masked_binary, torch.tensor(weights, dtype=torch.float32))
    if weighted:
        weights = class_weights(_classes(features), labels)
        return partial(_weighted_classes, torch.tensor(weights, dtype=torch.float32))
    return None


def class_weights(classes: np.ndarray, labels: int) -> np.ndarray:
    """The weight of each class: float64 (labels,), mean 1 over the classes that occur; 1 for the others.

    Args:
        classes: the class of each example or token, int (n,).
        labels: the number of classes.
    """
    counts = np.bincount(classes, minlength=labels).astype(np.float64)
    weights, seen = np.ones(labels), counts > 0
    weights[seen] = _inverse_root(counts[seen] / counts.sum())
    return weights


def multi_label_weights(marks: np.ndarray) -> np.ndarray:
    """The weight of each label: float64 (labels,), mean 1 over the annotated labels; 1 for the others.

    Args:
        marks: 1, 0 or NaN (not annotated), (examples, labels).
    """
    annotated, positives = np.isfinite(marks).sum(axis=0), np.nansum(marks, axis=0)
    weights, known = np.ones(marks.shape[1]), annotated > 0
    weights[known] = _inverse_root(np.maximum(positives[known], 1) / annotated[known])
    return weights


def _inverse_root(frequencies: np.ndarray) -> np.ndarray:
    roots: np.ndarray = frequencies**-0.5
    return roots / roots.mean()


def _classes(features: Sequence[Feature]) -> np.ndarray:
    found: list[int] = []
    for feature in features:
        labels: Any = feature.labels
        found += [label for label in (labels if isinstance(labels, list) else [labels]) if label != IGNORED]
    return np.array(found, np.int64)


def _masked_binary(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over the annotated decisions of a batch; 0 where there is none."""
    known = ~torch.isnan(labels)
    each = functional.binary_cross_entropy_with_logits(
        logits.float(), torch.where(known, labels, 0).float(), reduction="none"
    )
    return (each * weights.to(logits.device) * known).sum() / known.sum().clamp(min=1)


def _weighted_classes(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy times the weight of the true class, the mean over the labelled examples or tokens."""
    flat, weights = labels.reshape(-1), weights.to(logits.device)
    total = functional.cross_entropy(
        logits.float().reshape(len(flat), -1), flat, weight=weights, ignore_index=IGNORED, reduction="sum"
    )
    return total / (flat != IGNORED).sum().clamp(min=1)
