"""Which options a method is tested with: the candidate with the best recovery on development data, over all suites.

The recovery on a suite is the mean score of the merge, as a share of the mean score of the individual models on the
same data. A method's options are chosen once for all suites, and no test is looked at. ``choice.json`` keeps every
candidate's figures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from merganser.documents import read_json
from merganser.errors import DataError, validated
from merganser.files import write_text
from merganser.lab.benchmark.config import Benchmark, Entry, Family
from merganser.lab.benchmark.summary import SuiteScores, recovery

FILE_NAME, FORMAT = "choice.json", 1  # of its contents


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CandidateFigures(_Frozen):
    """A candidate, and what it recovers of each suite's individual models on development data.

    Attributes:
        name: what its rows call the method.
        recovery: suite → share of the individual models' mean score; suites without a row of it are not there.
        mean: over these suites; None where there are none.
    """

    name: str
    options: dict[str, Any]
    recovery: dict[str, float]
    mean: float | None


class ChosenMethod(_Frozen):
    """A method with its candidates.

    Attributes:
        base, statistics: what it needs.
        best: the index of the candidate that is tested.
    """

    title: str
    method: str
    family: Family
    base: bool
    statistics: str | None
    candidates: tuple[CandidateFigures, ...] = Field(min_length=1)
    best: int = Field(ge=0)

    @property
    def chosen(self) -> CandidateFigures:
        """The candidate that is tested."""
        return self.candidates[self.best]

    @property
    def needs(self) -> str:
        """In words, what is needed beside the weights."""
        kinds = {"gram": "Gram matrices", "fisher": "Fisher information", "kfac": "Kronecker factors"}
        wanted = ["base"] * self.base + ([kinds[self.statistics]] if self.statistics else [])
        return ", ".join(wanted) or "nothing"


class Choice(_Frozen):
    """What was chosen, on which suites.

    Attributes:
        seeds: suite → the seeds whose models were looked at.
    """

    format: Literal[1] = 1
    suites: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    methods: tuple[ChosenMethod, ...]


def choose(benchmark: Benchmark, scores: Sequence[SuiteScores]) -> Choice:
    """The best candidate of each method, as far as there are rows of it; a method with one has it without any.

    Only candidates with rows on the most suites are compared, so that a merge that failed on a hard suite gains
    nothing by it; the first of several equally good ones is taken.

    Args:
        benchmark: its methods and their candidates.
        scores: of the suites' development data.
    """
    found = [_figures(entry, scores) for entry in benchmark.known]
    return Choice(
        suites=tuple(suite.name for suite in benchmark.suites),
        seeds={suite.name: suite.seeds for suite in scores},
        methods=tuple(
            ChosenMethod(
                title=entry.title,
                method=entry.method,
                family=entry.family,
                base=entry.candidates[best].needs.base,
                statistics=entry.candidates[best].needs.statistics,
                candidates=candidates,
                best=best,
            )
            for entry, candidates in zip(benchmark.known, found, strict=True)
            if len(candidates) == 1 or any(candidate.recovery for candidate in candidates)
            for best in [max(range(len(candidates)), key=lambda i: (_strength(candidates[i]), -i))]
        ),
    )


def _figures(entry: Entry, scores: Sequence[SuiteScores]) -> tuple[CandidateFigures, ...]:
    figures = []
    for candidate in entry.candidates:
        shares: Mapping[str, float | None] = {suite.name: recovery(suite, candidate.title) for suite in scores}
        known = {name: share for name, share in shares.items() if share is not None}
        mean = statistics.fmean(known.values()) if known else None
        figures.append(CandidateFigures(name=candidate.title, options=candidate.options, recovery=known, mean=mean))
    return tuple(figures)


def _strength(candidate: CandidateFigures) -> tuple[int, float]:
    return len(candidate.recovery), candidate.mean or 0.0


def write_choice(choice: Choice, results: Path) -> None:
    """Write ``choice.json`` into the results of a benchmark."""
    text = json.dumps(choice.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_text(results / FILE_NAME, text + "\n")


def read_choice(results: Path) -> Choice:
    """What :func:`write_choice` has written.

    Raises:
        DataError: it cannot be read, or says what no benchmark writes.
    """
    place = results / FILE_NAME
    mend = "run the benchmark again: only missing cells are computed"
    values = read_json(place, DataError, mend=mend)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        what = f"a choice of format {found!r}; this version reads format {FORMAT}"
        raise DataError(what, where=place, mend=mend)
    return validated(Choice, values, str(place), DataError)


def is_benchmark(results: Path) -> bool:
    """Whether a folder holds the results of a benchmark."""
    return (results / FILE_NAME).is_file()
