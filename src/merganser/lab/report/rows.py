"""Result rows: the files that an experiment leaves, read and checked before anything is computed of them.

    rows = read_rows(Path("results"))         # results/<experiment>/cells/<id>.json
    rows = read_rows(Path("results/ner"))     # one experiment: cells/<id>.json
    rows = read_rows(Path("rows.jsonl"))      # or .json with a list of rows

Scores are in 0–1 here as in the files; the tables show them × 100.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from merganser.documents import parse_json, read_text
from merganser.errors import DataError, ErrorCollector, UserError, raise_all

FORMAT = 1
#: More broken files than this are counted, not listed.
MOST_PROBLEMS = 10
_AGAIN = "delete the file and run the experiment again: only missing cells are computed"

Layout = Literal["pairs", "greedy", "all", "partitions"]
Kind = Literal["individual", "ensemble", "multitask", "merge"]
Heads = Literal["same", "different", "separate"]
#: ``other``: an individual model on the test of another contributor; it counts in no average of the row.
Domain = Literal["in", "out", "other"]


def _finite(value: Any) -> Any:
    """NaN and infinity (an undefined correlation) are no score."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class _Part(BaseModel):
    """Frozen; keys that a newer writer of the same format adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RowScore(_Part):
    """The score on one test set: ``value`` is of ``metric``, ``all`` has every metric of the task.

    ``standard_error`` is that of the value, by bootstrap over the examples, where the experiment asks for it.
    """

    domain: Domain
    metric: str
    value: Number
    all: dict[str, Number] = Field(default_factory=dict)
    per_label: dict[str, Number] = Field(default_factory=dict)
    examples: int | None = None
    truncated: int | None = None
    standard_error: Number = None


class Candidate(_Part):
    """Coefficients that were tried, and their score on development data."""

    coefficients: tuple[float, ...]
    dev: Number = None


class Chosen(_Part):
    """A coefficient search; ``best`` is the index of the candidate that the scores belong to."""

    by: str = "dev"
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    best: int = Field(ge=0)


class ContributorOrigin(_Part):
    """Where a contributor came from; ``score`` is its own on development data, ``examples`` counts its training
    examples."""

    name: str
    zoo: str | None = None
    seed: int | None = None
    weights: str | None = None
    statistics: str | None = None
    score: Number = None
    examples: int | None = None


class Provenance(_Part):
    """What the scores can be traced to."""

    base: str | None = None
    contributors: tuple[ContributorOrigin, ...] = ()
    data: dict[str, str | None] = Field(default_factory=dict)
    tensors: dict[str, int] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    finished: str = ""


class Merged(_Part):
    """How a merge was made and what it cost: the method with all its options, the seconds of the merge alone, what each
    contributor publishes beyond its weights, and whether the pretrained model is needed."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    statistics: str | None = None
    statistics_bytes: tuple[int, ...] = ()
    base: bool = False


class ResultRow(_Part):
    """One cell of an experiment's grid.

    ``contributors`` are their names, which units and other rows know them by; ``sets`` are their data sets, in the same
    order. ``split`` says whether the contributors' tests or their development data were scored. Rows of older writers
    have neither sets nor costs (``merged``).
    """

    format: Literal[1]
    cell: str = Field(min_length=1)
    experiment: str = Field(min_length=1)
    suite: str
    model: str
    layout: Layout
    kind: Kind
    method: str
    title: str
    contributors: tuple[str, ...] = Field(min_length=1)
    sets: tuple[str, ...] = ()
    seed: int
    heads: Heads = "same"
    split: Literal["test", "dev"] = "test"
    scores: dict[str, RowScore]
    average: dict[Domain, Number] = Field(default_factory=dict)
    chosen: Chosen | None = None
    merged: Merged | None = None
    provenance: Provenance = Provenance()

    @property
    def origins(self) -> tuple[ContributorOrigin, ...]:
        """Where the contributors came from, in their order, then whoever else had a part."""
        known = {origin.name: origin for origin in self.provenance.contributors}
        return (*(known.pop(name, ContributorOrigin(name=name)) for name in self.contributors), *known.values())

    def domain_average(self, domain: Domain) -> float | None:
        """The row's own average, else the mean over its tests of a domain; None where a score is missing."""
        if domain in self.average:
            return self.average[domain]
        values = [score.value for score in self.scores.values() if score.domain == domain]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


def read_rows(path: Path) -> tuple[ResultRow, ...]:
    """All rows under a results folder, or of one file, sorted by experiment and cell.

    Raises:
        DataError: there are no rows, or one cannot be read; several such files come as one
            :class:`~merganser.errors.Problems`.
    """
    if not path.exists():
        raise DataError("there is no such file or folder", where=path, mend="check the path of the results")
    rows: dict[tuple[str, str], ResultRow] = {}
    problems = ErrorCollector()
    for where, value in _values(path, problems):
        row = problems.catch(_parse, value, where)
        if row is not None and rows.setdefault((row.experiment, row.cell), row) != row:
            what = f"another row has the cell id {row.cell}, with other contents"
            problems.add(DataError(what, where=where, mend="keep one of the two"))
    shown, rest = problems.found[:MOST_PROBLEMS], problems.found[MOST_PROBLEMS:]
    raise_all([*shown, *([DataError(f"and {len(rest)} more like these", where=path)] if rest else [])])
    if not rows:
        raise DataError(
            "no result rows here",
            where=path,
            mend="give the folder that `merganser experiment` wrote (it holds <experiment>/cells/*.json), "
            "or a .json or .jsonl file of rows",
        )
    return tuple(rows[key] for key in sorted(rows))


def render_rows(rows: Iterable[ResultRow]) -> str:
    """Rows as JSON, a line each, with the fields that they were read with."""
    lines = (row.model_dump(mode="json", exclude_unset=True) for row in rows)
    return "".join(f"{json.dumps(line, ensure_ascii=False, sort_keys=True)}\n" for line in lines)


def _values(path: Path, problems: ErrorCollector) -> Iterator[tuple[str, Any]]:
    """Place and parsed JSON of each row; what cannot be parsed goes to ``problems``."""
    for file in row_files(path):
        try:
            text = read_text(file, DataError, mend="give a UTF-8 JSON file")
        except UserError as error:
            problems.add(error)
            continue
        texts = {str(file): text}
        if file.suffix == ".jsonl":
            texts = {f"{file}:{number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        for where, one in texts.items():
            try:
                value = parse_json(one, where, DataError, mend=_AGAIN, finite=False)
            except UserError as error:
                problems.add(error)
                continue
            if isinstance(value, list):
                yield from ((f"{where}[{index}]", item) for index, item in enumerate(value))
            else:
                yield where, value


def row_files(path: Path) -> list[Path]:
    """The files of rows in a results folder or the folder of one experiment, or the file of rows itself."""
    if path.is_file():
        return [path]
    inside = ["cells/*.json", "rows.jsonl"]  # of an experiment's folder; rows.jsonl is how rows are published
    patterns = ["*.json"] if path.name == "cells" else [*inside, *(f"*/{pattern}" for pattern in inside)]
    found = [file for pattern in patterns for file in path.glob(pattern)]
    return sorted(file for file in found if not file.name.startswith("."))


def _parse(value: Any, where: str) -> ResultRow:
    if not isinstance(value, dict) or "format" not in value:
        raise DataError("not a result row: it has no 'format'", where=where, mend="give files that an experiment wrote")
    if value["format"] != FORMAT:
        raise DataError(
            f"a result row of format {value['format']!r}, written by merganser {_writer(value)}; "
            f"this version reads format {FORMAT}",
            where=where,
            mend="use the merganser that wrote it, or run the experiment again with this one",
        )
    try:
        row = ResultRow.model_validate(value)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors()[:5])
        raise DataError(f"not a result row: {told}", where=where, mend=_AGAIN) from error
    wrong = ""
    if row.sets and len(row.sets) != len(row.contributors):
        wrong = f"there are {len(row.contributors)} contributors, but {len(row.sets)} sets"
    elif row.chosen and row.chosen.best >= len(row.chosen.candidates):
        wrong = f"chosen.best is {row.chosen.best}, but there are {len(row.chosen.candidates)} candidates"
    if wrong:
        raise DataError(wrong, where=where, mend=_AGAIN)
    return row


def _writer(value: Mapping[str, Any]) -> str:
    try:
        return str(value["provenance"]["versions"]["merganser"])
    except (KeyError, TypeError):
        return "(unknown)"
