"""Data files as numbered rows: JSON lines, JSON, CSV, TSV, Parquet, CoNLL, plain text; each error has file and line.

A reader yields ``(number, row)``: the line on which the row begins (its number, for Parquet) and a
dictionary.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from merganser.errors import DataError, require
from merganser.tasks.conll import read_sentences

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]

_SPACE = re.compile(r"[ \t\r\n]+")
_LONGEST_LINE = 1 << 26  # bytes: the longest book has a tenth of that, and a damaged file may have no line at all
_CSV_FIELD_LIMIT = 1 << 30  # characters; Python's own limit of 131,072 is less than a long document


def read_file(path: Path) -> Numbered:
    """The rows of a data file, by its ending (see :data:`READERS`).

    Raises:
        DataError: an ending that is not known, or a row that cannot be read, with its line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        mend = f"give a file ending in {', '.join(READERS)}"
        raise DataError(f"a data file ending in {path.suffix!r} cannot be read", where=path, mend=mend)
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path, mend="check the file") from None


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, split at newlines only: JSON strings may hold U+2028 and kin."""
    with path.open("rb") as stream:
        for number, line in enumerate(iter(partial(stream.readline, _LONGEST_LINE + 1), b""), 1):
            if len(line) > _LONGEST_LINE:
                what = f"a line of more than {_LONGEST_LINE} bytes"
                raise DataError(what, where=f"{path}:{number}", mend="give one row a line; is this a text file?")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"not UTF-8 text: {error.reason} at byte {error.start + 1} of the line"
                raise DataError(what, where=f"{path}:{number}", mend="save the file as UTF-8") from None


def _read_lines(path: Path) -> Numbered:
    """A text a line."""
    for number, line in enumerate(_text_lines(path), 1):
        if not line.isspace():
            yield number, {"text": line.rstrip("\r\n")}


def _object(value: Any, path: Path, line: int) -> Row:
    if not isinstance(value, dict):
        what, mend = f"not an object but {json.dumps(value)[:60]}", "each row must be a JSON object {…}"
        raise DataError(what, where=f"{path}:{line}", mend=mend)
    return value


def _unreadable(error: Exception | str, path: Path, line: int) -> DataError:
    detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error) or type(error).__name__
    return DataError(f"unreadable JSON: {detail}", where=f"{path}:{line}", mend="correct or remove the row")


def _read_jsonl(path: Path) -> Numbered:
    for number, line in enumerate(_text_lines(path), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _unreadable(error, path, number) from None
        yield number, _object(value, path, number)


def _read_json(path: Path) -> Numbered:
    """A list of objects, or one object a line (as JSON lines are often named)."""
    text = "".join(_text_lines(path))
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield from _read_jsonl(path)
        return
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _after_space(text, start + 1)
    first = True
    while not text.startswith("]", position):
        if not first and not text.startswith(",", position):
            raise _unreadable("expected ',' or ']'", path, text.count("\n", 0, position) + 1)
        position = position if first else _after_space(text, position + 1)
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _unreadable(error, path, getattr(error, "lineno", line)) from None
        yield line, _object(value, path, line)
        position, first = _after_space(text, position), False
    end = _after_space(text, position + 1)
    if end < len(text):
        raise _unreadable("text after the end of the list", path, text.count("\n", 0, end) + 1)


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _read_tsv(path: Path) -> Numbered:
    """Quoted as spreadsheets write it, or else raw: many corpora hold quotation marks that quote nothing."""
    try:
        rows = list(_read_separated(path, "\t", csv.QUOTE_MINIMAL))
    except DataError:
        yield from _read_separated(path, "\t", csv.QUOTE_NONE)
    else:
        yield from rows


def _read_separated(path: Path, delimiter: str, quoting: int) -> Numbered:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    reader = csv.reader(_text_lines(path), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not header:
                header = fields
                twice = sorted(name for name, count in Counter(header).items() if count > 1)
                if twice:
                    what = f"the header names {', '.join(map(repr, twice[:20]))} twice"
                    mend = "the first line must name each column once"
                    raise DataError(what, where=f"{path}:{line}", mend=mend)
            elif fields and len(fields) != len(header):
                what = f"{len(fields)} fields, but the header has {len(header)}: {', '.join(header)}"
                mend = "correct the row, or quote a field that holds the separator"
                raise DataError(what, where=f"{path}:{line}", mend=mend)
            elif fields:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        mend = "correct the row's quotation marks"
        raise DataError(f"unreadable row: {error}", where=f"{path}:{line}", mend=mend) from None


def _read_parquet(path: Path) -> Numbered:
    require("data", "a Parquet file", "pyarrow", where=path)
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        mend = "copy or write it again"
        raise DataError(f"unreadable Parquet file: {str(error).splitlines()[0]}", where=path, mend=mend) from None


def read_conll(path: Path) -> Numbered:
    """The sentences of a file in columns (see :mod:`merganser.tasks.conll`), whatever its ending."""
    yield from read_sentences(_text_lines(path), path)


#: How each ending is read.
READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_separated, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".conll": read_conll,
    ".txt": _read_lines,
}
