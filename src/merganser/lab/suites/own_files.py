"""One's own texts and labels: a folder for each data set, a file for each split.

OwnFiles(Path("reviews")).read("shop-a", "train")       reviews/shop-a/train.csv
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from merganser.errors import DataError, UserError
from merganser.lab.suites.base import TRAIN, Suite
from merganser.tasks.base import Task
from merganser.tasks.classification import TextClassification
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, read_rows
from merganser.tasks.labels import CHOOSE, LabelReader, LabelSpace

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class OwnFiles(Suite):
    """Texts or pairs of texts with one label each, in files of one's own.

    Columns are found by their usual names (``text`` or ``sentence``, ``label`` or ``class``, …). All data
    sets share one head. Its labels are those of all train files together: sorted as text, or by number where
    every label is a whole number (also as text, as in CSV files). Train files are read once by each instance.

    Attributes:
        root: the folder.
        label_names: the labels, in order, instead.
        key: the key metric, one of those of text classification; empty for its first, macro-F1.

    Raises:
        UserError: a key that is no such metric, or label names that are fewer than two or name one twice.
    """

    label_names: tuple[str, ...] = ()
    key: str = ""

    name: ClassVar[str] = "text-classification"
    layout: ClassVar[str] = "{set}/train, {set}/dev and {set}/test, each ending in " + ", ".join(ENDINGS)

    def __post_init__(self) -> None:
        if isinstance(self.label_names, str):
            what = f"label_names is the text {self.label_names!r}"
            raise UserError(what, where="label_names", mend="give a list of names")
        if not isinstance(self.label_names, (list, tuple)) or not all(type(n) in (str, int) for n in self.label_names):
            what = f"label_names is {self.label_names!r}, no list of names"
            raise UserError(what, where="label_names", mend="give texts or whole numbers")
        object.__setattr__(self, "label_names", tuple(str(name) for name in self.label_names))  # of a list, too
        if self.label_names and len(set(self.label_names)) < max(2, len(self.label_names)):
            what = f"not at least two labels, each once: {', '.join(self.label_names)}"
            raise UserError(what, where="label_names", mend="name each label once")
        TextClassification(key=self.key)

    def files(self, set_name: str, split: str) -> list[Path]:
        """The files of a split; more than one is a mistake."""
        folder = (self.root or Path()) / set_name
        return [path for ending in ENDINGS if (path := folder / f"{split}{ending}").is_file()]

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        """The rows of a data set's file.

        Raises:
            DataError: also a split that has no file, or more than one.
        """
        files, folder = self.files(set_name, split), (self.root or Path()) / set_name
        if not files:
            mend = (
                f"put {split}{ENDINGS[0]} there (or ending in {', '.join(ENDINGS[1:])}); where there is no such split, "
                "set examples of the train file aside for it"
            )
            raise DataError(f"the data set {set_name!r} has no {split} file", where=folder, mend=mend)
        if len(files) > 1:
            what = f"several {split} files: {', '.join(path.name for path in files)}"
            raise DataError(what, where=folder, mend="leave one of them there")
        return read_rows(files[0])

    def task(self, set_name: str) -> Task:
        """Text classification with the chosen key metric."""
        return TextClassification(key=self.key)

    def labels(self, set_name: str) -> tuple[str, ...]:
        """The labels of the head that all data sets share.

        Raises:
            DataError: a label that is neither text nor a whole number from 0, numbers beside names (which of
                them a number means would be unclear), or fewer than two labels in all.
        """
        return self.label_names or self._union

    def votes(self, set_name: str) -> tuple[str, ...] | None:
        """The labels of the train file, in the order of :meth:`labels`; None where those are all."""
        if set_name not in self.sets():
            raise self.missing(set_name)
        names = self.labels(set_name)
        reader = LabelReader(LabelSpace(names))
        if set_name not in self._values:
            self.read(set_name, TRAIN)  # says that there is none
        places = {reader.read(value, where) for value, where in self._values[set_name].items()}
        return None if len(places) == len(names) else tuple(names[place] for place in sorted(places))

    @cached_property
    def _values(self) -> dict[str, dict[str | int, str]]:
        """For each data set the values of its train file's labels, each with the first place that has it."""
        found: dict[str, dict[str | int, str]] = {}
        for set_name in self.sets():
            if not self.files(set_name, TRAIN):
                continue  # only tested on
            rows = self.read(set_name, TRAIN)
            column = TextClassification().columns(rows, Columns()).label or "label"
            values = found.setdefault(set_name, {})
            for index in range(len(rows)):
                where = rows.where(index)
                values.setdefault(_value(rows.value(index, column), where), where)
        return found

    @cached_property
    def _union(self) -> tuple[str, ...]:
        names = _ordered(str(value) for values in self._values.values() for value in values)
        if len(names) < 2:
            what = f"fewer than two labels in all train files: {', '.join(names) or 'none'}"
            mend = "give examples of every label, or name the labels with label_names"
            raise DataError(what, where=self.root, mend=mend)
        for values in self._values.values():
            for value, where in values.items():
                if isinstance(value, int) and not all(name.isdecimal() for name in names):
                    what = f"label {value} is a number, but other labels are names: {', '.join(names[:20])}"
                    mend = "give every label by name, or say with label_names what the numbers mean"
                    raise DataError(what, where=where, mend=mend)
        return names


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Label names, each once: by number where all are whole numbers, else as text."""
    once = set(names)
    if all(name.removeprefix("-").isdecimal() for name in once):
        return tuple(sorted(once, key=lambda name: (int(name), name)))
    return tuple(sorted(once))


def _value(value: Any, where: str) -> str | int:
    """A label as text without blanks around it, or as a whole number from 0."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if whole and not isinstance(value, bool) and value >= 0:
        return int(value)
    raise DataError(f"label {value!r} is neither text nor a whole number from 0", where=where, mend=CHOOSE)
