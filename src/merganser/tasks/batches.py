"""Padded batches of texts of similar length, so that little of the work is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that transformers' losses leave out

Label = int | float | list[int] | list[float]


@dataclass(frozen=True)
class Feature:
    """One tokenised example.

    Attributes:
        input_ids: its tokens, without padding.
        token_type_ids: 0 for the first text and 1 for the second, where the model tells them apart.
        labels: an integer, a float, a label for each token, a float for each output, or the target's tokens.
        words: for each word of a pre-tokenised text the position of its first sub-word, -1 where it was cut
            off.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None = None
    labels: Label | None = None
    words: list[int] | None = None


@dataclass(frozen=True)
class Collation:
    """How features become tensors.

    Attributes:
        pad_id: fills the rows up; always masked.
        decoder_mask: add the mask of the decoder's tokens. ``"labels"``: they are the labels'; ``"inputs"``:
            the decoder reads the inputs once more, as in encoder-decoder classifiers; None: there is no
            decoder.
        most: examples in a batch; None: as many as are asked for.
    """

    pad_id: int
    decoder_mask: str | None = None
    most: int | None = None

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Tensors (batch, longest) of int64, ready for ``model(**batch)``; padded on the right.

        Right padding keeps absolute positions and the causal attention of real tokens as they are without
        padding.
        """
        ids = [feature.input_ids for feature in features]
        batch = {"input_ids": pad(ids, self.pad_id), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
        types = [feature.token_type_ids for feature in features if feature.token_type_ids is not None]
        if len(types) == len(features):
            batch["token_type_ids"] = pad(types, 0)
        labels = [feature.labels for feature in features if feature.labels is not None]
        if len(labels) == len(features):
            batch["labels"] = _label_tensor(labels)
        if self.decoder_mask == "labels" and "labels" in batch:
            batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        elif self.decoder_mask == "inputs":
            batch["decoder_attention_mask"] = batch["attention_mask"]
        return batch


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of integers as an int64 tensor (rows, longest), filled up on the right with ``value``."""
    wide = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        wide[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return wide


def _label_tensor(labels: Sequence[Any]) -> Tensor:
    first = labels[0]
    if not isinstance(first, list):
        return torch.tensor(labels, dtype=torch.float32 if isinstance(first, float) else torch.int64)
    if any(isinstance(value, float) for row in labels for value in row):
        return torch.tensor(labels, dtype=torch.float32)
    return pad(labels, IGNORED)


@dataclass(frozen=True)
class Batches:
    """Batches that can be iterated over more than once: the places of their rows in the data, and their tensors.

    The tensors are made as they are needed.
    """

    features: Sequence[Feature]
    collate: Collation
    plan: tuple[tuple[int, ...], ...]

    @property
    def positions(self) -> tuple[int, int]:
        """How many there are in all batches, without and with padding."""
        lengths = [len(feature.input_ids) for feature in self.features]
        return sum(lengths), sum(len(group) * max(lengths[i] for i in group) for group in self.plan)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], dict[str, Tensor]]]:
        for indices in self.plan:
            yield indices, self.collate([self.features[index] for index in indices])


def make_batches(features: Sequence[Feature], collate: Collation, batch_size: int, *, leading: int = 0) -> Batches:
    """Group features of similar length into batches, the longest first: too large a batch fails at once.

    Args:
        features: in the order of the data.
        collate: makes the tensors.
        batch_size: rows in a batch; the last one of a group may be smaller.
        leading: the first so many features make the first batches: whoever looks at a part of the batches
            then sees the first of the data, and not the longest.
    """
    lengths = [len(feature.input_ids) for feature in features]
    batch_size = min(batch_size, collate.most or batch_size)
    plan: list[tuple[int, ...]] = []
    for group in (range(len(lengths))[:leading], range(len(lengths))[leading:]):
        order = sorted(group, key=lambda index: -lengths[index])
        plan += [tuple(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    return Batches(features, collate, tuple(plan))
