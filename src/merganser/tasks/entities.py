"""Entities in BIO tags, as conlleval and seqeval's default mode find them.

An entity begins at ``B-X``, and also at an ``I-X`` that continues nothing (after ``O``, or after another
type). It ends before the next beginning or ``O``. Precision, recall and F1 are micro averages over exact
(type, begin, end) matches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[str, int, int]

OUTSIDE = "O"


def is_bio(tag: str) -> bool:
    """Whether a tag is ``O``, ``B-TYPE`` or ``I-TYPE``."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities of a sequence of BIO tags: (type, first word, last word)."""
    found: set[Span] = set()
    kind, start = "", 0
    for position, tag in enumerate([*tags, OUTSIDE]):
        here = "" if tag == OUTSIDE else tag[2:]
        if kind and (here != kind or tag.startswith("B-")):
            found.add((kind, start, position - 1))
            kind = ""
        if here and not kind:
            kind, start = here, position
    return found


def count_entities(predicted: Sequence[str], true: Sequence[str]) -> tuple[int, int, int]:
    """How many entities of one sequence are right, predicted and true."""
    found, wanted = spans(predicted), spans(true)
    return len(found & wanted), len(found), len(wanted)


def precision(counts: np.ndarray) -> float:
    """Right among predicted entities, 0 without any; counts: (sequences, 3) of right, predicted, true."""
    right, found, _ = counts.sum(axis=0)
    return float(right / found) if found else 0.0


def recall(counts: np.ndarray) -> float:
    """Right among true entities; 0 where there is none."""
    right, _, wanted = counts.sum(axis=0)
    return float(right / wanted) if wanted else 0.0


def f1(counts: np.ndarray) -> float:
    """The harmonic mean of precision and recall; 0 where both are."""
    right, found, wanted = counts.sum(axis=0)
    return float(2 * right / (found + wanted)) if found + wanted else 0.0
