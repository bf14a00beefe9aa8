"""What is collected from: a model's own data, checked and tokenised before its weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from merganser.collection.scores import annotated
from merganser.errors import DataError, UserError
from merganser.statistics import FisherKind
from merganser.tasks.base import Task
from merganser.tasks.batches import Batches, make_batches
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, selected
from merganser.tasks.models import Opened, choose_length, usual_length
from merganser.tasks.tokens import Encoded


@dataclass(frozen=True)
class Examples:
    """A model and its examples.

    Attributes:
        opened: the model, whose weights have not been read.
        task: reads the rows and has the model's head.
        columns: that were read.
        tokenizer: of the model.
        encoded: the examples, tokenised.
        numbers: of their rows in the data, ascending.
    """

    opened: Opened
    task: Task
    columns: Columns
    tokenizer: Any
    encoded: Encoded
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.encoded.features)

    @property
    def columns_read(self) -> str:
        """The columns that were read, for the header."""
        named = [f"{role} {name!r}" for role, name in asdict(self.columns).items() if name is not None]
        return f"columns: {', '.join(named)}"

    @property
    def tokens(self) -> int:
        """Of all examples, without padding; a decoder's targets aside."""
        return sum(len(feature.input_ids) for feature in self.encoded.features)

    def batches(self, indices: Sequence[int], batch_size: int, leading: int) -> Batches:
        """Batches of some examples by their length; the first ``leading`` of them come first."""
        features = [self.encoded.features[index] for index in indices]
        collate = self.task.collation(self.tokenizer, self.opened.config)
        return make_batches(features, collate, batch_size, leading=leading)

    def fingerprint(self, indices: Sequence[int]) -> str:
        """The hash of some tokenised examples: what tells that another machine sees the same."""
        digest = hashlib.sha256()
        for index in indices:
            digest.update(repr(self.encoded.features[index]).encode())
        return digest.hexdigest()


def find_columns(
    rows: Rows, task: Task, opened: Opened, given: Columns, kind: FisherKind | None, use_labels: bool
) -> tuple[Columns, Any]:
    """The columns, and the labels where they are there: checked, though Gram matrices need none.

    Raises:
        DataError: a column that is missing, or a label that is not the model's.
        UserError: ``empirical`` Fisher information without labels.
    """
    if not use_labels and kind == "empirical":
        what = "empirical Fisher information is made of labels"
        raise UserError(what, where="--fisher", mend="use the labels, or collect expected")
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


def annotated_rows(rows: Rows, task: Task, references: Any, kind: FisherKind | None) -> list[int]:
    """The numbers of the rows that count: where labels were read, those of which at least one is annotated.

    Raises:
        DataError: there is no such row.
    """
    if not isinstance(references, np.ndarray):  # of texts and of words, which all have their labels
        return list(range(len(rows)))
    known = annotated(torch.from_numpy(references), task.problem)
    numbers: list[int] = known.reshape(len(rows), -1).any(1).nonzero().flatten().tolist()
    if not numbers:
        mend = "annotate some" if kind == "empirical" else "annotate some, or leave them unread: --ignore-labels"
        raise DataError(f"no row of {len(rows)} has an annotated label", where=rows.source, mend=mend)
    return numbers


def encode(
    rows: Rows,
    task: Task,
    opened: Opened,
    tokenizer: Any,
    columns: Columns,
    references: Any,
    max_length: int | None,
    numbers: Sequence[int],
) -> Examples:
    """Tokenise some rows; their ``references`` (None: none) become the examples' labels.

    Args:
        rows, references: all that were read.
        task, opened, tokenizer, columns, max_length: see :class:`Examples`.
        numbers: of the rows to take.

    Raises:
        DataError: a text that is missing, malformed or without tokens, with file and line.
        UserError: a length that leaves no room for tokens.
    """
    asked = max_length or usual_length(opened, tokenizer)
    length = choose_length(asked, opened.config, tokenizer, pairs=columns.text_pair is not None)
    labels = None if references is None else [references[number] for number in numbers]
    encoded = task.encode(selected(rows, numbers), tokenizer, opened.config, columns, length, labels)
    return Examples(opened, task, columns, tokenizer, encoded, numbers)
