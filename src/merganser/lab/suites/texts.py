"""Texts for decoders: the corpora of the other suites without their labels, each token predicted from those before.

corpora = Texts(Path("resources"))
corpora.read("tales-emotion", "train")  # rows {"text": …} of resources/emotion_splits/tales-emotion
corpora.read("mrpc", "test")  # both sentences of each pair, a row each
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from merganser.lab.suites.base import Suite
from merganser.lab.suites.emotion import Emotion
from merganser.lab.suites.glue import Glue
from merganser.lab.suites.ner import NER
from merganser.tasks.base import Metric, Task
from merganser.tasks.causal_lm import CausalLM, accuracy, nll, perplexity
from merganser.tasks.data import Rows

_FOLDERS: dict[str, type[Suite]] = {"emotion_splits": Emotion, "glue": Glue, "ner": NER}
#: Columns of GLUE and of the emotion corpora that are texts.
_COLUMNS = ("text", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "question", "question1", "question2")


@dataclass(frozen=True)
class NextToken(CausalLM):
    """Causal language modelling by the share of tokens that are the likeliest, of which more is better."""

    metrics: ClassVar[Mapping[str, Metric]] = {"accuracy": accuracy, "nll": nll, "perplexity": perplexity}


@dataclass(frozen=True)
class Texts(Suite):
    """Every corpus of the emotion, GLUE and NER suites below one folder, as texts; key metric token accuracy.

    Splits are those of the suite that a corpus belongs to.
    """

    name: ClassVar[str] = "texts"
    layout: ClassVar[str] = "\n".join(f"        {folder}/{{set}}, as of the suite" for folder in _FOLDERS)

    def sets(self) -> tuple[str, ...]:
        """The data sets of the three suites."""
        return tuple(sorted(self._owners()))

    def files(self, set_name: str, split: str) -> list[Path]:
        """The files of the suite that the data set belongs to."""
        owner = self._owners().get(set_name)
        return [] if owner is None else owner.files(set_name, split)

    def task(self, set_name: str) -> Task:
        """Causal language modelling."""
        return NextToken()

    def _owners(self) -> dict[str, Suite]:
        """The suite of each data set."""
        root = self.root
        suites = [] if root is None else [suite(root / folder) for folder, suite in _FOLDERS.items()]
        return {name: suite for suite in suites for name in suite.sets()}

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        read = self._owners()[set_name].read(set_name, split)
        found = [(text, place) for row, place in zip(read.rows, read.places, strict=True) for text in _texts(row)]
        rows, places = [{"text": text} for text, _ in found], [place for _, place in found]
        return Rows(read.source, tuple(rows), tuple(places))


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a row: its words joined by spaces, or its columns that are texts; blank ones are left out."""
    if "tokens" in row:
        yield " ".join(row["tokens"])
    for column in _COLUMNS:
        if text := str(row.get(column) or "").strip():
            yield text
