"""Rows of several texts for a bi-encoder: it reads each alone, the query with its prompt and the document with its own.

``config_sentence_transformers.json`` says the prompts. Where it names none, or the model is no sentence-transformers
model, texts are as they are in the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merganser.checkpoints.reader import read_json
from merganser.errors import DataError
from merganser.tasks.columns import PAIRS, USUAL, Columns, another_column, column_values
from merganser.tasks.data import Rows
from merganser.tasks.files import Row
from merganser.tasks.models import Opened

QUERIES = ("query", "anchor", "question")
DOCUMENTS = ("positive", "negative", "document", "passage", "answer", "response")
_NUMBERED = re.compile(r"(?P<name>.+?)[_-]?\d+")
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # as sentence-transformers looks for them


@dataclass(frozen=True)
class SeparateTexts:
    """How rows become texts that are read alone.

    Attributes:
        prompts: what stands before the texts of each column, which may be nothing.
    """

    prompts: Mapping[str, str]

    def apply(self, rows: Rows) -> Rows:
        """A row for each text, in the column ``text``, that remembers where it was.

        Raises:
            DataError: a value that is neither a text nor a list of texts, with file and line.
        """
        found = list(self._texts(rows))
        places = tuple(rows.places[index] for index, _ in found)
        texts: tuple[Row, ...] = tuple({"text": text} for _, text in found)
        return Rows(rows.source, texts, places, by_line=rows.by_line)

    def __str__(self) -> str:
        each = (f"{name!r}" + (f" after {prompt!r}" if prompt else "") for name, prompt in self.prompts.items())
        return f"columns, each text alone: {', '.join(each)}"

    def _texts(self, rows: Rows) -> Iterator[tuple[int, str]]:
        columns = [(prompt, list(column_values(rows, name, "text")), name) for name, prompt in self.prompts.items()]
        for index in range(len(rows)):
            for prompt, values, name in columns:
                value, where = values[index]
                for text in value if isinstance(value, list) else [value]:
                    if not isinstance(text, str):
                        what = f"{name!r} is {type(text).__name__} {str(text)[:40]!r}, not text"
                        raise DataError(what, where=where, mend=another_column("text"))
                    yield index, prompt + text


def separate_texts(rows: Rows, opened: Opened, given: Columns) -> SeparateTexts | None:
    """The columns whose texts a bi-encoder reads alone; None where the model is none, or the data are no such texts.

    Args:
        rows: the data.
        opened: a model of sentence-transformers, if it has that library's list of modules.
        given: columns that the user named: one text, or two that are read one by one.
    """
    folder = opened.root / opened.subfolder
    if not (folder / "modules.json").is_file():
        return None
    settings: Mapping[str, Any] = read_json(folder / "config_sentence_transformers.json", missing={})
    prompts = {name: text for name, text in (settings.get("prompts") or {}).items() if isinstance(text, str)}
    usual = prompts.get(str(settings.get("default_prompt_name")), "")
    query = prompts.get("query", usual)
    document = next((prompts[name] for name in _DOCUMENT_PROMPTS if name in prompts), usual)
    names = [name for name in (given.text, given.text_pair) if name is not None] or _columns(rows)
    by_role = {name: query if _is(name, QUERIES) else document if _is(name, DOCUMENTS) else usual for name in names}
    return SeparateTexts(by_role) if len(names) > 1 or any(by_role.values()) else None


def _columns(rows: Rows) -> list[str]:
    """The columns of texts by their usual names: a query with its documents, a pair, or a single text."""
    queries = [name for name in rows.columns if _is(name, QUERIES)]
    documents = [name for name in rows.columns if _is(name, DOCUMENTS)]
    if queries and documents:
        return [*queries[:1], *documents]
    lower = {name.lower(): name for name in rows.columns}
    pair = next((pair for pair in PAIRS if all(name in lower for name in pair)), None)
    if pair is not None:
        return [lower[name] for name in pair]
    return [lower[name] for name in USUAL["text"] if name in lower][:1] or queries[:1] or documents


def _is(name: str, roles: tuple[str, ...]) -> bool:
    """Whether a column has one of these names, maybe with a number, as ``negative_2``."""
    numbered = _NUMBERED.fullmatch(name.lower())
    return name.lower() in roles or (numbered is not None and numbered["name"] in roles)
