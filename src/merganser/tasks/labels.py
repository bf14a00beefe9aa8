"""Label spaces: the names of a head's outputs, and how the labels of data are read as places in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merganser.errors import CheckpointError, DataError, did_you_mean
from merganser.tasks.columns import another_column, column_values
from merganser.tasks.data import Rows

UNKNOWN = -1
CHOOSE = another_column("label")


@dataclass(frozen=True)
class LabelSpace:
    """The names of a head's outputs, in order.

    Attributes:
        names: a name for each output.
        aliases: other names of outputs (what ``label2id`` has beyond ``id2label``).
        numbered: whether integers may stand for labels; not so in a union of spaces that number labels
            differently.
    """

    names: tuple[str, ...]
    aliases: tuple[tuple[str, int], ...] = ()
    numbered: bool = True

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LabelSpace:
        """The label space of a ``config.json``: its ``id2label``, or transformers' default of two outputs.

        Raises:
            CheckpointError: ``id2label`` does not number the outputs from 0.
        """
        id2label = config.get("id2label")
        if isinstance(id2label, Mapping) and id2label:
            by_id = {str(key): str(name) for key, name in id2label.items()}
            if set(by_id) != {str(index) for index in range(len(by_id))}:
                what = f"id2label must name 0 … {len(by_id) - 1}, but has {', '.join(list(by_id)[:9])}"
                raise CheckpointError(what, where="config.json", mend="correct id2label in the model's configuration")
            names = tuple(by_id[str(index)] for index in range(len(by_id)))
        else:
            names = tuple(f"LABEL_{index}" for index in range(int(config.get("num_labels") or 2)))
        extra = config.get("label2id")
        pairs = extra.items() if isinstance(extra, Mapping) else ()
        aliases = tuple(
            (str(name), int(index)) for name, index in pairs if name not in names and 0 <= int(index) < len(names)
        )
        return cls(names, aliases)

    def find(self, name: str) -> int:
        """The place of a name, or :data:`UNKNOWN`."""
        if name in self.names:
            return self.names.index(name)
        return dict(self.aliases).get(name, UNKNOWN)

    def valid(self) -> str:
        """The labels, for messages."""
        shown = [f"{index} = {name}" for index, name in enumerate(self.names[:30])]
        return ", ".join(shown) + (", …" if len(self.names) > 30 else "")


def union(spaces: Iterable[LabelSpace]) -> LabelSpace:
    """The labels of several models, each once, in the order of appearance."""
    spaces = list(spaces)
    names = tuple(dict.fromkeys(name for space in spaces for name in space.names))
    aliases = spaces[0].aliases if len(set(spaces)) == 1 else ()
    return LabelSpace(names, aliases, all(space.names == names[: len(space)] for space in spaces))


def spread(scores: np.ndarray, own: LabelSpace, space: LabelSpace) -> np.ndarray:
    """Scores (n, own labels) as columns of another space (n, labels); NaN where the model knows none."""
    if own.names == space.names:
        return scores
    wide = np.full((len(scores), len(space)), np.nan, scores.dtype)
    for column, name in enumerate(own.names):
        place = space.find(name)
        if place != UNKNOWN:  # a label that the space does not have has no column
            wide[:, place] = scores[:, column]
    return wide


class LabelReader:
    """Reads values of a label column as places in a label space.

    Text is a name, an integer is a place, and digits as text (all there is in a CSV file) are a name if there
    is such a name and else a place. Where all names of the space are numbers, a number is always a name: the
    rule depends on the space alone, so that no two samples of the same data are read differently.

    Args:
        space: the label space.
        class_names: the data set's own names of integer labels; used when the label space has all of them.
    """

    def __init__(self, space: LabelSpace, class_names: Sequence[str] | None = None) -> None:
        self.space = space
        self.class_names = class_names if class_names and all(space.find(n) >= 0 for n in class_names) else None
        self._numeric = all(name.isdecimal() for name in space.names)
        self._cache: dict[Any, int] = {}

    def read(self, value: Any, where: str) -> int:
        """The place of ``value``.

        Raises:
            DataError: it is outside the label space; the message names the valid labels.
        """
        if not isinstance(value, str | int | float):
            raise DataError(f"the label is a {type(value).__name__}, not a name or a number", where=where, mend=CHOOSE)
        key = (type(value), value)
        if key not in self._cache:
            self._cache[key] = self._place(value)
        place = self._cache[key]
        if place == UNKNOWN:
            near = f"{did_you_mean(value, self.space.names)}. " if isinstance(value, str) else ""
            hint = "a split without labels often has -1 everywhere; " if value in (-1, "-1") else ""
            if not self.space.numbered and not isinstance(value, str):
                what = f"label {value!r} is a number, and the models number their labels differently"
                raise DataError(what, where=where, mend=f"give labels by name: {', '.join(self.space.names[:30])}")
            what = f"label {value!r} is outside the model's label space: {self.space.valid()}"
            raise DataError(what, where=where, mend=near + hint + CHOOSE)
        return place

    def _place(self, value: str | int | float) -> int:
        if isinstance(value, str):
            name = value.strip()
            place = self.space.find(name)
            if place != UNKNOWN or self._numeric or not name.isdecimal() or len(name) > 9:
                return place
            number = int(name)
        elif not math.isfinite(value) or value != int(value):
            return UNKNOWN
        else:
            number = int(value)
            if self.class_names is not None and 0 <= number < len(self.class_names):
                return self.space.find(self.class_names[number])
            if self._numeric:
                return self.space.find(str(number))
        return number if self.space.numbered and 0 <= number < len(self.space) else UNKNOWN


def read_classes(rows: Rows, column: str, space: LabelSpace) -> np.ndarray:
    """The label of each row as its place in ``space``: int64 (rows,).

    Raises:
        DataError: a row without a label, or with one outside the space, with file and line.
    """
    values = list(column_values(rows, column, "label"))
    reader = LabelReader(space, rows.class_names.get(column))
    return np.array([reader.read(value, where) for value, where in values], np.int64)
