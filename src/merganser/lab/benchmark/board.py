"""The leaderboard of a benchmark: the rows of its tests, what was chosen, and who is compared with whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from merganser.errors import DataError, RecipeError, did_you_mean
from merganser.lab.benchmark.choice import Choice, ChosenMethod, read_choice
from merganser.lab.benchmark.run import TEST
from merganser.lab.benchmark.summary import Difference, Standing, SuiteScores, differences, standings, suite_scores
from merganser.lab.grid.config import TITLES
from merganser.lab.report.rows import ResultRow, read_rows

_FREE = "the best published one without statistics"


@dataclass(frozen=True)
class Board:
    """What a leaderboard says.

    Attributes:
        choice: of each method's options.
        rows: of the chosen candidates and the comparators, on tests.
        against: title of the method that the others are compared with; empty for the best published one.
    """

    choice: Choice
    rows: tuple[ResultRow, ...]
    against: str = ""

    @cached_property
    def methods(self) -> dict[str, ChosenMethod]:
        """What rows call a method → the method; those that have rows."""
        there = {row.method for row in self.rows}
        return {one.chosen.name: one for one in self.choice.methods if one.chosen.name in there}

    @cached_property
    def comparators(self) -> list[str]:
        """The comparators that have rows."""
        return [kind for kind in TITLES if any(row.kind == kind for row in self.rows)]

    def title(self, name: str) -> str:
        """What tables call a method."""
        return TITLES[name] if name in TITLES else self.methods[name].title

    @cached_property
    def inside(self) -> list[SuiteScores]:
        """In-domain scores."""
        return suite_scores(self.rows)

    @cached_property
    def outside(self) -> list[SuiteScores]:
        """Out-of-domain scores, of the suites that have such tests."""
        return suite_scores(self.rows, "out")

    @cached_property
    def order(self) -> list[Standing]:
        """The methods, the best first."""
        return standings(self.inside, list(self.methods))

    @cached_property
    def differences(self) -> dict[str, list[Difference]]:
        """What a reference is → the methods that are compared with it, the best first."""
        names = [one.method for one in self.order]
        free = [name for name in names if self.methods[name].statistics is None]
        return {
            words: differences(self.inside, free if words == _FREE else names, reference)
            for words, reference in self.references.items()
        }

    def suite(self, name: str) -> str:
        """What tables call a suite: its name without what the names of all suites begin with."""
        return name[self._shared :]

    @cached_property
    def _shared(self) -> int:
        words = zip(*(name.split("-")[:-1] for name in self.choice.suites), strict=False)
        alike = takewhile(lambda same: len(set(same)) == 1, words)
        return sum(len(same[0]) + 1 for same in alike) if len(self.choice.suites) > 1 else 0

    @cached_property
    def references(self) -> dict[str, str]:
        """What a reference is → what rows call it: the best published method, and the best without statistics."""
        if self.against:
            name = self.against.lower()
            known = {n: one for n, one in self.methods.items() if name in (one.title.lower(), one.method, n.lower())}
            if not known:
                valid = {one.method for one in self.methods.values()}
                what = f"no merge {self.against!r} in these results"
                raise RecipeError(what, where="--against", mend=did_you_mean(self.against, valid))
            return {"as asked for": next(iter(known))}
        whole = [one.method for one in self.order if one.average is not None]
        published = [name for name in whole if self.methods[name].family == "published"]
        free = [name for name in published if self.methods[name].statistics is None]
        found = {"the best published method": published[:1], _FREE: free[:1]}
        first = {names[0]: words for words, names in reversed(found.items()) if names}  # one that is both is named once
        return {words: name for name, words in reversed(first.items())}


def read_board(results: Path, against: str = "") -> Board:
    """The leaderboard of a benchmark's results.

    Raises:
        DataError: rows or the choice cannot be read, or there are no rows of what was chosen.
    """
    choice = read_choice(results)
    names = {method.chosen.name for method in choice.methods}
    rows = tuple(
        row
        for row in read_rows(results / TEST)
        if row.experiment in choice.suites and row.split == "test" and (row.kind != "merge" or row.method in names)
    )
    if not any(row.kind == "merge" for row in rows):
        what = "no rows of the chosen methods on the tests"
        raise DataError(what, where=results / TEST, mend="run the benchmark to its end")
    return Board(choice, rows, against)
