"""Sentences in columns, as the CoNLL shared tasks wrote them: a word a line, its tag beside it.

    Anna    B-PER   news            word, tag, source: the second of two or three columns is the tag
    saw     O       news
    U.N.    NNP  I-NP  I-ORG        of four and more columns the last is the tag

Columns are separated by tabs, or else by spaces. A blank line ends a sentence, and so does a ``-DOCSTART-``
line, which is no word. Bracket escapes of treebanks (``-LRB-`` for ``(``, …) are undone.

Tags are BIO, and stay as they are. IOB1 (as in CoNLL-2003's own files: ``I-`` begins an entity, ``B-`` only
one that directly follows another of its type) and tags without any ``B-`` are turned into BIO. Which of the
two a file has is seen from the whole file: it is BIO where some ``B-`` begins an entity that does not
directly follow one of its type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from merganser.errors import DataError
from merganser.tasks.entities import OUTSIDE, is_bio

_DOCUMENT = "-DOCSTART-"
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_OTHER_SCHEME = re.compile(r"[SELUM]-.+")

Sentence = tuple[int, list[str], list[str]]


def read_sentences(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The sentences of a file as rows.

    Args:
        lines: of the file, with or without their ends.
        path: for messages.

    Yields:
        The line on which a sentence begins, and ``{"tokens": […], "tags": […]}``. The whole file is read
        before the first, since the scheme of its tags shows only then.

    Raises:
        DataError: a line without a word or a tag, with another number of columns than the first one, or with
            a tag that is not BIO; with its line.
    """
    sentences = list(_sentences(lines, path))
    tags = as_bio([found for _, _, found in sentences])
    for (number, words, _), found in zip(sentences, tags, strict=True):
        yield number, {"tokens": words, "tags": found}


def _sentences(lines: Iterable[str], path: Path) -> Iterator[Sentence]:
    width, begun = 0, 0
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(lines, 1):
        columns = _columns(line)
        if columns == [""] or columns[0].startswith(_DOCUMENT):
            if words:
                yield begun, words, tags
            words, tags = [], []
            continue
        where = f"{path}:{number}"
        if len(columns) < 2:
            mend = "give a word and its tag on each line, separated by a tab or a space"
            raise DataError(f"a word without a tag: {columns[0][:40]!r}", where=where, mend=mend)
        if width and len(columns) != width:
            mend = "give each line the same columns, separated by tabs (or all by spaces)"
            raise DataError(f"{len(columns)} columns, but the lines before have {width}", where=where, mend=mend)
        if not columns[0]:
            raise DataError("a tag without a word", where=where, mend="fill the word in, or remove the line")
        width = len(columns)
        if not words:
            begun = number
        words.append(unescape(columns[0]))
        tags.append(check_tag(columns[1 if width < 4 else -1], where))
    if words:
        yield begun, words, tags


def _columns(line: str) -> list[str]:
    """The columns of a line; one empty column where the line is blank."""
    line = line.rstrip("\r\n")
    if not line.strip():
        return [""]
    if "\t" in line:
        return [column.strip(" ") for column in line.split("\t")]
    return re.split(" +", line.strip(" "))


def unescape(word: str) -> str:
    """The bracket that a treebank escape stands for; any other word as it is."""
    return _BRACKETS.get(word, word)


def check_tag(tag: Any, where: str) -> str:
    """A BIO tag.

    Raises:
        DataError: anything else; tags of other schemes (BIOES, BILOU) are named as such.
    """
    if isinstance(tag, str) and is_bio(tag):
        return tag
    other = isinstance(tag, str) and _OTHER_SCHEME.fullmatch(tag)
    what = f"{tag!r} is a tag of {'another scheme (BIOES, BILOU)' if other else 'no known scheme'}, not of BIO"
    mend = "give the tags O, B-TYPE and I-TYPE: in the second of two or three columns, else the last"
    raise DataError(what, where=where, mend=mend)


def as_bio(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tags of a whole file as BIO; those of a file that is BIO already are returned as they are.

    Args:
        sentences: the tags of each sentence, ``O``, ``B-TYPE`` or ``I-TYPE``.
    """
    pairs = [list(pairwise((OUTSIDE, *tags))) for tags in sentences]  # each tag after the one before it
    already = any(tag[0] == "B" and tag[2:] != before[2:] for tags in pairs for before, tag in tags)
    if already:
        return [list(tags) for tags in sentences]
    return [
        [f"B-{tag[2:]}" if tag[0] == "I" and tag[2:] != before[2:] else tag for before, tag in tags] for tags in pairs
    ]
