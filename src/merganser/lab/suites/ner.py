"""Named entities: persons, places and organisations in sentences of many sources.

NER(Path("corpora/ner")).read("wnut17", "train")        wnut17/train.conll
NER(Path("corpora/ner")).read("onto-bc", "dev")         onto.development.bc.ner
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from merganser.errors import DataError
from merganser.lab.suites.base import DEV, SPLITS, TEST, TRAIN, Suite
from merganser.tasks.base import Task
from merganser.tasks.conll import as_bio, check_tag, unescape
from merganser.tasks.data import Rows
from merganser.tasks.entities import OUTSIDE
from merganser.tasks.files import Numbered, read_conll, read_file
from merganser.tasks.token_classification import TokenClassification

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")

_KINDS = {kind: kind for kind in ("PER", "LOC", "ORG")} | {"PERSON": "PER"}
_GENRES, _TWITTER = "onto-", "twitter"
_ONTONOTES = {TRAIN: "train", DEV: "development", TEST: "test"}
_CONLL_2003 = {TRAIN: "eng.train", DEV: "eng.testa", TEST: "eng.testb"}


@dataclass(frozen=True)
class NER(Suite):
    """Words and BIO tags over PER, LOC and ORG.

    Other types become ``O``, OntoNotes' PERSON becomes PER. An ``I-`` that continues an entity of such
    another type becomes ``O``, too, whatever its own type. Files in IOB1 are turned into BIO first, see
    :mod:`merganser.tasks.conll`; tags of any other scheme are an error. Bracket escapes are undone.

    Files, for a data set ``x`` in the folder: ``x/{train,dev,test}.conll`` (word, tag and anything, or
    CoNLL-2003's four columns), ``x/{eng.train,eng.testa,eng.testb}`` (CoNLL-2003 under its own names),
    ``x/{train,dev,test}.json`` or ``.jsonl`` (an object a line, with ``tokens`` and ``labels`` or ``tags``).
    The data set ``twitter`` may have its published names,
    ``annotated.twitter-ner-20-21-tweet-{train,dev,test}-withcleaned.json``, in its folder or beside it.
    The data set ``onto-bc`` is ``onto.{train,development,test}.bc.ner``, in the folder or its subfolder
    ``ontonotes``.

    Attributes:
        root: the folder.
        gpe_as_loc: whether OntoNotes' GPE (countries, cities: CoNLL-2003's LOC has them) becomes LOC, not
            ``O``.
    """

    gpe_as_loc: bool = False

    name: ClassVar[str] = "ner"
    layout: ClassVar[str] = (
        "{set}/{{train,dev,test}}.conll, {set}/{{train,dev,test}}.json, {set}/{{eng.train,eng.testa,"
        "eng.testb}}, or for a set onto-<genre> onto.{{train,development,test}}.<genre>.ner, or for the set twitter "
        "annotated.twitter-ner-20-21-tweet-{{train,dev,test}}-withcleaned.json"
    )

    def sets(self) -> tuple[str, ...]:
        """The folders that hold a file of any split, and the genres of OntoNotes."""
        if self.root is None:
            return ()
        names = set(super().sets())
        if any(self.files(_TWITTER, split) for split in SPLITS):
            names.add(_TWITTER)
        for split in _ONTONOTES.values():
            for folder in self._ontonotes():
                for path in folder.glob(f"onto.{split}.*.ner"):
                    names.add(_GENRES + path.name.split(".", 2)[2].removesuffix(".ner"))
        return tuple(sorted(names))

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        """Rows of ``{"tokens": [...], "tags": [...]}``; their places are where sentences begin."""
        path = next(iter(self.files(set_name, split)), None)
        if path is None:
            what = f"the data set {set_name!r} has no file of the split {split!r}"
            raise DataError(what, where=self.root, mend=f"expected files:\n{self.layout.format(set=set_name)}")
        read = _read_objects if path.suffix in (".json", ".jsonl") else _read_conll
        numbered = list(read(path))
        if not numbered:
            raise DataError("no data: not a single sentence", where=path, mend="give at least one sentence")
        rows = tuple({"tokens": row["tokens"], "tags": self._tags(row["tags"])} for _, row in numbered)
        return Rows(f"{set_name}[{split}]", rows, tuple((str(path), number) for number, _ in numbered))

    def task(self, set_name: str) -> Task:
        """A tag for each word, scored by micro entity F1."""
        return TokenClassification()

    def labels(self, set_name: str) -> tuple[str, ...]:
        """The seven tags; the same for every data set."""
        return LABELS

    def _ontonotes(self) -> tuple[Path, ...]:
        return () if self.root is None else (self.root, self.root / "ontonotes")

    def files(self, set_name: str, split: str) -> list[Path]:
        """The files of a split under any of the names that it may have."""
        folder = (self.root or Path()) / set_name
        names = (f"{split}.conll", _CONLL_2003[split], f"{split}.json", f"{split}.jsonl")
        choices = [folder / name for name in names]
        if set_name == _TWITTER:
            name = f"annotated.twitter-ner-20-21-tweet-{split}-withcleaned.json"
            choices += [folder / name, folder.parent / name]
        if set_name.startswith(_GENRES):
            name = f"onto.{_ONTONOTES[split]}.{set_name.removeprefix(_GENRES)}.ner"
            choices += [place / name for place in self._ontonotes()]
        return [path for path in choices if path.is_file()]

    def _tags(self, tags: Sequence[str]) -> list[str]:
        """BIO tags over the three types; what belongs to an entity of another type is ``O``."""
        kinds = {**_KINDS, "GPE": "LOC"} if self.gpe_as_loc else _KINDS
        found: list[str] = []
        dropped = False  # whether the word before belongs to an entity of another type
        for tag in tags:
            kind = kinds.get(tag[2:])
            continues = dropped and tag.startswith("I-")
            dropped = tag != OUTSIDE and (kind is None or continues)
            found.append(OUTSIDE if kind is None or continues else tag[:2] + kind)
        return found


def _read_conll(path: Path) -> Numbered:
    try:
        yield from read_conll(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path, mend="check the file") from None


def _read_objects(path: Path) -> Numbered:
    """Objects with ``tokens`` and ``labels`` (or ``tags``, ``ner_tags``), as sentences of a CoNLL file."""
    found: list[tuple[int, list[str], list[str]]] = []
    for number, row in read_file(path):
        where = f"{path}:{number}"
        words = _texts(row.get("tokens"), "tokens", where)
        column = next((name for name in ("labels", "tags", "ner_tags") if name in row), "labels")
        given = _texts(row.get(column), column, where)
        if len(words) != len(given):
            what = f"{len(words)} tokens but {len(given)} {column}"
            raise DataError(what, where=where, mend="give one tag for each token")
        found.append((number, [unescape(word) for word in words], [check_tag(tag, where) for tag in given]))
    for (number, words, _), tags in zip(found, as_bio([tags for _, _, tags in found]), strict=True):
        yield number, {"tokens": words, "tags": tags}


def _texts(value: Any, column: str, where: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        what = f"{column!r} is not a list of texts, each with something in it"
        raise DataError(what, where=where, mend='give {"tokens": ["Anna", "left"], "labels": ["B-PER", "O"]}')
    return list(value)
