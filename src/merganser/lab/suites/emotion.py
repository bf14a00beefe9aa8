"""The emotion suite: corpora of the unified emotion format, many labels a text, not every label in every corpus.

    corpora = Emotion(Path("emotion_splits"))
    corpora.read("isear", "test")      # rows {"text": …, "labels": {"joy": 0, …, "trust": None, …}}
    corpora.votes("isear")             # the labels that isear annotates

A line of a corpus is ``{"text": …, "emotions": {"joy": 1, "trust": null, …}, "VAD": {"valence": null, …}}``. A
number above 0.1 means that the label holds, another number that it does not; null, or nothing at all, that the
corpus does not annotate the label, which is not the same as no.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from merganser.errors import DataError, did_you_mean
from merganser.lab.suites.base import SPLITS, TRAIN, Suite
from merganser.tasks.base import Task
from merganser.tasks.data import Rows
from merganser.tasks.files import read_file
from merganser.tasks.multi_label import MultiLabel

EMOTIONS = (
    "joy", "anger", "sadness", "disgust", "fear", "trust", "surprise", "love", "noemo", "confusion",
    "anticipation", "shame", "guilt",
)  # fmt: skip
VAD = ("valence", "arousal", "dominance")
#: The outputs of a head, in order.
LABELS = (*EMOTIONS, *VAD)
THRESHOLD = 0.1  # above this a label holds; the corpora of graded annotations are read by the same rule
_GROUPS = (("emotions", EMOTIONS), ("VAD", VAD))


@dataclass(frozen=True)
class Record:
    """A text of a corpus.

    Attributes:
        text: the text.
        labels: for each of :data:`LABELS` 1, 0 or None (not annotated).
        place: its file and its line there.
    """

    text: str
    labels: Mapping[str, int | None]
    place: tuple[str, int]


def read_records(path: Path) -> list[Record]:
    """The records of a file in the unified corpus format.

    Raises:
        DataError: a line that is no JSON object, has no text or no emotions, names an emotion that is not known, or
            has something else than a number or null for one (each with file and line); or a file without
            records.
    """
    records = [_record(row, (str(path), number)) for number, row in read_file(path)]
    if not records:
        raise DataError("no data: not a single record", where=path, mend="give a file with at least one record")
    return records


def annotated(records: Sequence[Record]) -> tuple[str, ...]:
    """The labels that any record has a value for, in the order of :data:`LABELS`."""
    return tuple(label for label in LABELS if any(record.labels[label] is not None for record in records))


def _record(row: Mapping[str, Any], place: tuple[str, int]) -> Record:
    where = f"{place[0]}:{place[1]}"
    text = row.get("text")
    if not isinstance(text, str):
        found = "no 'text'" if text is None else f"a {type(text).__name__} as its 'text'"
        raise DataError(f"the record has {found}", where=where, mend="give it a text, or remove the line")
    if row.get("emotions") is None:
        mend = 'give it an object such as {"joy": 1, "anger": 0, "trust": null}, or remove the line'
        raise DataError("the record has no 'emotions'", where=where, mend=mend)
    labels: dict[str, int | None] = dict.fromkeys(LABELS)
    for group, names in _GROUPS:
        values = row.get(group)
        if values is None:
            continue
        if not isinstance(values, dict):
            mend = f'write it as {{"{names[0]}": 1, "{names[1]}": null}}'
            raise DataError(f"{group!r} is a {type(values).__name__}, not an object", where=where, mend=mend)
        for name, value in values.items():
            if name not in names:
                kind = "emotion" if names is EMOTIONS else "name"
                raise DataError(f"unknown {kind} {name!r} in {group!r}", where=where, mend=did_you_mean(name, names))
            labels[name] = _mark(name, value, where)
    return Record(text, labels, place)


def _mark(name: str, value: Any, where: str) -> int | None:
    if value is None:
        return None
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not number:
        mend = f"give a number (above {THRESHOLD}: the emotion is there), or null for not annotated"
        raise DataError(f"{name} is {value!r}, neither a number nor null", where=where, mend=mend)
    return int(value > THRESHOLD)


@dataclass(frozen=True)
class EmotionCorpora(Suite):
    """The folder of corpora that every emotion suite reads: ``<root>/<set>/{train,dev,test}.jsonl``."""

    layout: ClassVar[str] = "\n".join(f"        {{set}}/{split}.jsonl" for split in SPLITS)
    #: Of the published corpora: all splits in one file, which is not read.
    whole: ClassVar[str] = "full.jsonl"

    def files(self, set_name: str, split: str) -> list[Path]:
        """The one file of a split, where it is there."""
        path = (self.root or Path()) / set_name / f"{split}.jsonl"
        return [path] if path.is_file() else []

    def file(self, set_name: str, split: str) -> Path:
        """The file of a split, one of ``train``, ``dev`` and ``test``.

        Raises:
            DataError: a data set without this split.
        """
        if found := self.files(set_name, split):
            return found[0]
        folder = (self.root or Path()) / set_name
        what = f"data set {set_name!r} has no split {split!r}"
        if (folder / self.whole).is_file():
            what += f" ({self.whole} is not read)"
        mend = f"put the file there; expected files:\n{self.layout.format(set=set_name)}"
        raise DataError(what, where=folder / f"{split}.jsonl", mend=mend)

    def missing(self, *names: str) -> DataError:
        """As of every suite; folders with nothing but the file of all splits are named as such."""
        error = super().missing(*names)
        whole = [name for name in names if ((self.root or Path()) / name / self.whole).is_file()]
        if not whole:
            return error
        what = f"{error.what}; {', '.join(f'{name}/{self.whole}' for name in whole)} is there and is not read"
        mend = f'cut it by its records\' "split"; {error.mend}'
        return DataError(what, where=error.where, mend=mend)

    def remarks(self, set_name: str) -> list[str]:
        """That the file of all splits is not read, where there is one."""
        path = (self.root or Path()) / set_name / self.whole
        return [f"{path} is ignored: the splits are files of their own"] if path.is_file() else []


@dataclass(frozen=True)
class Emotion(EmotionCorpora):
    """Emotions as multi-label classification over :data:`LABELS`; key metric macro-F1 over the labels present.

    Attributes:
        threshold_on: as of :class:`~merganser.tasks.multi_label.MultiLabel`: the ``probability``, or the raw
            ``logit``.
    """

    threshold_on: str = "probability"
    threshold: float = 0.5

    name: ClassVar[str] = "emotion"
    scoring: ClassVar[frozenset[str]] = frozenset({"threshold", "threshold_on"})

    def __post_init__(self) -> None:
        MultiLabel(self.threshold, self.threshold_on)  # refuses what it does not know

    def task(self, set_name: str) -> Task:
        """Multi-label classification."""
        return MultiLabel(self.threshold, self.threshold_on)

    def labels(self, set_name: str) -> tuple[str, ...]:
        """All of :data:`LABELS`: the head is the same for every corpus."""
        return LABELS

    def votes(self, set_name: str) -> tuple[str, ...]:
        """The labels that the train split annotates; the file is read once for as long as it stays as it is."""
        self.check(set_name, TRAIN)
        path = self.file(set_name, TRAIN)
        state = path.stat()
        return _annotated_in(path, state.st_size, state.st_mtime_ns)

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        records = read_records(self.file(set_name, split))
        return Rows(
            f"{set_name}[{split}]",
            tuple({"text": record.text, "labels": dict(record.labels)} for record in records),
            tuple(record.place for record in records),
        )


@lru_cache(maxsize=64)
def _annotated_in(path: Path, size: int, modified: int) -> tuple[str, ...]:
    """:func:`annotated` of a file; size and time of change tell its versions apart."""
    return annotated(read_records(path))
