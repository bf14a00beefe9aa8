"""GLUE: nine tasks on sentences and pairs of sentences, from a local folder or through ``datasets``.

Glue(Path("corpora/glue")).read("cola", "train")        cola/train.jsonl, less what is held out
Glue().read("mnli", "test")                             glue:mnli[validation_matched]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from merganser.errors import DataError, UserError, did_you_mean
from merganser.lab.suites.base import DEV, TEST, Suite
from merganser.tasks.base import Task
from merganser.tasks.classification import TextClassification
from merganser.tasks.data import Rows, read_rows, selected
from merganser.tasks.regression import Regression

_ENTAILMENT = ("entailment", "not_entailment")

#: The names of each task's classes, numbered as in the GLUE release.
LABELS: dict[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": _ENTAILMENT,
    "qqp": ("not_duplicate", "duplicate"),
    "rte": _ENTAILMENT,
    "sst2": ("negative", "positive"),
    "stsb": ("score",),
    "wnli": ("not_entailment", "entailment"),
}


@dataclass(frozen=True)
class Glue(Suite):
    """The nine tasks of GLUE that have training data.

    The labels of GLUE's own test files are hidden, so that scores are reported on its validation files (for
    MNLI the matched one): these are the split ``test`` here. Nothing may be chosen on what is reported, and
    so ``dev`` is a part of the train file, drawn with a seed and taken out of ``train``: as many examples as
    ``dev_examples`` says, but at most a tenth. STS-B's scores stay as they are, from 0 to 5.

    Attributes:
        root: a folder with a folder for each task; None to read ``glue:<task>`` through ``datasets`` (from
            the Hub, or offline from its cache).
        dev_examples: at most this many examples of the train file are held out, at least 1.
        dev_seed: of the draw, 0 or more.

    Raises:
        UserError: a number out of these ranges.
    """

    dev_examples: int = 1000
    dev_seed: int = 0

    name: ClassVar[str] = "glue"
    layout: ClassVar[str] = "{set}/train.jsonl and {set}/validation.jsonl (mnli: validation_matched.jsonl)"

    def __post_init__(self) -> None:
        for option, least in (("dev_examples", 1), ("dev_seed", 0)):
            if (value := getattr(self, option)) < least:
                raise UserError(f"{option} is {value}", where="suite glue", mend=f"give at least {least}")

    def sets(self) -> tuple[str, ...]:
        """The tasks that have a folder; all nine where ``datasets`` is to find them."""
        if self.root is None:
            return tuple(LABELS)
        return tuple(name for name in LABELS if (self.root / name).is_dir())

    def check(self, set_name: str, split: str) -> None:
        """As of every suite; a name that GLUE does not have is said to be none of its tasks."""
        self._check(set_name)
        super().check(set_name, split)

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        """See the class for what the splits are."""
        if split == TEST:
            return self._file(set_name, "validation_matched" if set_name == "mnli" else "validation")
        return self._part(self._file(set_name, "train"), split)

    def task(self, set_name: str) -> Task:
        """Regression for STS-B, else classification, scored by accuracy (CoLA: Matthews' correlation)."""
        self._check(set_name)
        if set_name == "stsb":
            return Regression()
        return TextClassification(key="matthews" if set_name == "cola" else "accuracy")

    def labels(self, set_name: str) -> tuple[str, ...]:
        """The names of the classes as in the GLUE release; ``score`` for STS-B."""
        self._check(set_name)
        return LABELS[set_name]

    def _check(self, set_name: str) -> None:
        if set_name not in LABELS:
            raise DataError(f"{set_name!r} is no task of GLUE", where=self.root, mend=did_you_mean(set_name, LABELS))

    def _file(self, set_name: str, split: str) -> Rows:
        """A file of the release, its integer labels named; train files are read once for train and dev."""
        if self.root is not None:
            folder = self.root / set_name
            stats = [path.stat() for path in sorted(folder.iterdir())] if folder.is_dir() else []
            rows = _read(str(folder), split, tuple((s.st_size, s.st_mtime_ns) for s in stats))
        else:
            try:
                rows = _read(f"glue:{set_name}", split, ())
            except DataError as error:
                call = f"datasets.load_dataset('glue', {set_name!r}).save_to_disk('glue/{set_name}')"
                mend = (
                    f"where there is a network, run {call} in Python, copy the folder glue to this machine and give it "
                    "as the folder of the suite"
                )
                raise DataError(error.what, where=error.where, mend=mend) from None
        if set_name == "stsb":
            return rows
        return replace(rows, class_names={"label": LABELS[set_name], **rows.class_names})

    def _part(self, train: Rows, split: str) -> Rows:
        """What is held out of the train file, or what is left of it; in the order of the file."""
        size = min(self.dev_examples, len(train) // 10)
        if size == 0:
            what = f"{len(train)} examples are too few to hold out a tenth for development"
            raise DataError(what, where=train.source, mend="give at least 10 examples")
        order = np.random.default_rng(self.dev_seed).permutation(len(train)).tolist()
        return selected(train, sorted(order[:size] if split == DEV else order[size:]))


@lru_cache(maxsize=2)
def _read(source: str, split: str, state: tuple[tuple[int, int], ...]) -> Rows:
    """A file as it is while ``state``, the sizes and times of change of its folder's files, stays the same."""
    return read_rows(source, split=split)
