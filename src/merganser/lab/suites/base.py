"""What a suite is: several data sets of one kind under one folder, each with its splits, task and metric.

An experiment trains a model on each data set of a suite and merges the models. A suite only reads: its rows are
plain :class:`~merganser.tasks.data.Rows` that its tasks understand, so that ``collect`` and ``evaluate`` need to
know nothing of it. A new suite is one file with a subclass and one line in this package.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from merganser.errors import DataError, UserError, did_you_mean
from merganser.paths import expanded
from merganser.tasks.base import Task
from merganser.tasks.data import Rows, joined

TRAIN, DEV, TEST, ALL = "train", "dev", "test", "all"
SPLITS = (TRAIN, DEV, TEST)
_KINDS: dict[type, str] = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


@dataclass(frozen=True)
class Suite(ABC):
    """Data sets of one kind.

    Attributes:
        root: the folder that holds them; None where the ``datasets`` library finds them.
    """

    root: Path | None = None

    name: ClassVar[str]
    #: What the folder must look like, for messages; ``{set}`` stands for a data set's name.
    layout: ClassVar[str]
    #: Options that change how outputs are judged, and neither the rows nor what a model is trained on.
    scoring: ClassVar[frozenset[str]] = frozenset()

    def files(self, set_name: str, split: str) -> list[Path]:
        """The files that a split can be read from, the one to be preferred first."""
        return []

    def sets(self) -> tuple[str, ...]:
        """The data sets that are there, sorted: by default the folders that hold a file of any split."""
        if self.root is None or not self.root.is_dir():
            return ()
        names = (folder.name for folder in self.root.iterdir() if folder.is_dir())
        return tuple(sorted(name for name in names if any(self.files(name, split) for split in SPLITS)))

    def read(self, set_name: str, split: str) -> Rows:
        """The rows of a data set.

        Args:
            set_name: one of :meth:`sets`.
            split: ``train``, ``dev``, ``test``, or ``all`` for these three one after the other.

        Raises:
            DataError: the data set is not there (the message shows the expected files), or a row is malformed
                (with file and line).
        """
        self.check(set_name, split)
        parts = [self._rows(set_name, part, split) for part in (SPLITS if split == ALL else (split,))]
        return joined(parts, f"{set_name}[{split}]")

    @abstractmethod
    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        """The rows of one split; ``asked`` is the one that was asked for, which may be ``all``."""

    @abstractmethod
    def task(self, set_name: str) -> Task:
        """The task of a data set."""

    def metric(self, set_name: str) -> str:
        """The metric that stands for the data set in tables; one of its task's, between 0 and 1 (or -1 and 1)."""
        return self.task(set_name).key_metric

    def labels(self, set_name: str) -> tuple[str, ...]:
        """The names of the head's outputs, in order; empty for tasks without such a head."""
        return ()

    def votes(self, set_name: str) -> tuple[str, ...] | None:
        """The labels that the data set annotates, where those are not all of :meth:`labels`; else None.

        Only these rows of a head are trained, and only they take part in a merge.
        """
        return None

    def remarks(self, set_name: str) -> list[str]:
        """What a reader of a data set should know, such as files that are there and not read."""
        return []

    def check(self, set_name: str, split: str) -> None:
        """Refuse a data set or split that cannot be read.

        Raises:
            DataError: see :meth:`missing`, or an unknown split.
        """
        if set_name not in self.sets():
            raise self.missing(set_name)
        if split not in (*SPLITS, ALL):
            raise DataError(f"there is no split {split!r}", where=set_name, mend=did_you_mean(split, (*SPLITS, ALL)))

    def missing(self, *names: str) -> DataError:
        """The error for data sets that are not there: what is expected, and what is there instead."""
        there = ", ".join(self.sets()) if self.root is not None and self.root.is_dir() else "no such folder"
        listed = ", ".join(map(repr, names))
        none = f"there is no data set {listed}" if len(names) == 1 else f"there are no data sets {listed}"
        like = "" if len(names) == 1 else f", {names[0]} for one"
        what = f"{none} of the suite {self.name} (found: {there or 'nothing'})"
        files = self.layout.format(set=names[0])
        mend = f"put {'it' if len(names) == 1 else 'them'} there; expected files{like}:\n{files}"
        return DataError(what, where=self.root, mend=mend)


def with_options(suite: type[Suite], root: str | Path | None, options: Mapping[str, Any]) -> Suite:
    """A suite over a folder, with its options.

    Raises:
        UserError: an option that it does not have, or a value of another kind.
    """
    known = [field.name for field in fields(suite) if field.name != "root"]
    for option in options:
        if option not in known:
            mend = did_you_mean(option, known) if known else "this suite has no options"
            raise UserError(f"suite {suite.name!r} has no option {option!r}", where="suite", mend=mend)
    hints = get_type_hints(suite)
    for option, value in options.items():
        kind = hints[option]
        number = kind is float and type(value) in (int, float) and -math.inf < value < math.inf
        if kind in _KINDS and not (number or type(value) is kind):
            what = f"option {option!r} is {value!r}, which is not {_KINDS[kind]}"
            raise UserError(what, where="suite.options", mend=f"give {_KINDS[kind]}")
    return suite(None if root is None else expanded(root), **options)
