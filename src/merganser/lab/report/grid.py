"""From rows to grids: which method has which score on which unit, and what is missing.

A **grid** is what one set of tables is about: the rows of an experiment that share model, layout and heads. A
**unit** is what methods are compared on: contributors and a seed. Individual models have one contributor each; on a
unit they stand for its contributors: an in-domain test is scored by the models whose own test it is, an
out-of-domain test by the mean over all of the unit's contributors.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from merganser.lab.report.rows import Domain, Kind, ResultRow
from merganser.methods.averages.simple import SIMPLE
from merganser.methods.regression.fisher import FISHER
from merganser.methods.regression.regmean import REGMEAN

DOMAINS: tuple[Domain, ...] = ("in", "out")
KINDS: tuple[Kind, ...] = ("individual", "ensemble", "multitask", "merge")
#: The merges of the paper, in its order.
PUBLISHED = (SIMPLE.name, FISHER.name, REGMEAN.name)
HEADS = {"same": "same head initialisation", "different": "different head initialisation", "separate": "separate heads"}
METRICS = {
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


@dataclass(frozen=True)
class TableLine:
    """A line of the tables; ``searched`` ones had their coefficients chosen on development data."""

    kind: Kind
    name: str
    title: str
    searched: bool = False

    @property
    def rank(self) -> tuple[int, int, str, str, bool]:
        """Comparators first, then merges: the published ones, and the others by name."""
        place = PUBLISHED.index(self.name) if self.name in PUBLISHED else len(PUBLISHED)
        return KINDS.index(self.kind), place, self.name, self.title, self.searched

    @property
    def group(self) -> str:
        """What methods of its kind stand under."""
        return "Merged into one model" if self.kind == "merge" else "For comparison"


#: Each test by the models whose own test it is; out-of-domain tests by all.
INDIVIDUAL = TableLine("individual", "individual", "Individual")
#: Each in-domain test by every model.
EVERY = TableLine("individual", "individual-every", "Individual, all")


@dataclass(frozen=True, order=True)
class Comparison:
    """What methods are compared on. ``contributors`` are sorted: their order does not matter to a merge."""

    contributors: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Value:
    """A score × 100 and the ids of the cells that it comes from."""

    points: float
    cells: tuple[str, ...]


Values = Mapping[Comparison, Value]
Unit = TypeVar("Unit", bound=Hashable)


@dataclass(frozen=True)
class ResultGrid:
    """The rows of an experiment that share model, layout and heads, without superseded ones.

    ``against`` is the name or title of the merge that the others are compared with.
    """

    model: str
    layout: str
    heads: str
    rows: tuple[ResultRow, ...]
    against: str

    @cached_property
    def _also_plain(self) -> frozenset[tuple[str, str]]:
        """Names and titles of methods that ran without a coefficient search."""
        return frozenset((row.method, row.title) for row in self.rows if row.chosen is None)

    def method(self, row: ResultRow) -> TableLine:
        """The method of a row. Searched ones say so in the title where the method also ran without."""
        if row.kind == "individual":
            return INDIVIDUAL
        chosen = row.chosen is not None
        both = chosen and (row.method, row.title) in self._also_plain
        title = f"{row.title}, searched" if both else row.title
        return TableLine(row.kind, row.method, title, chosen)

    @cached_property
    def methods(self) -> tuple[TableLine, ...]:
        """Individual, ensemble and multi-task first, then the merges."""
        found = {self.method(row) for row in self.rows}
        if any(score.domain == "other" for row in self._individuals.values() for score in row.scores.values()):
            found.add(EVERY)
        return tuple(sorted(found, key=lambda method: method.rank))

    @property
    def merges(self) -> tuple[TableLine, ...]:
        """The merging methods alone."""
        return tuple(method for method in self.methods if method.kind == "merge")

    @cached_property
    def reference(self) -> TableLine | None:
        """The merge that the others are compared with; without a coefficient search rather than with."""
        name = self.against.lower()
        found = [method for method in self.merges if name in (method.name.lower(), method.title.lower())]
        return min(found, key=lambda method: method.searched, default=None)

    @cached_property
    def _cells(self) -> dict[tuple[TableLine, Comparison], ResultRow]:
        return {(self.method(row), unit_of(row)): row for row in self.rows if row.kind != "individual"}

    @cached_property
    def _individuals(self) -> dict[tuple[str, int], ResultRow]:
        return {(row.contributors[0], row.seed): row for row in self.rows if row.kind == "individual"}

    @cached_property
    def units(self) -> tuple[Comparison, ...]:
        """The units of the merges; of the comparators where nothing was merged."""
        kinds: tuple[Iterable[Kind], ...] = (("merge",), ("ensemble", "multitask"), ("individual",))
        for some in kinds:
            found = {unit_of(row) for row in self.rows if row.kind in some}
            if found:

                def order(unit: Comparison) -> tuple[int, list[int], int]:
                    return len(unit.contributors), sorted(map(self.contributors.index, unit.contributors)), unit.seed

                return tuple(sorted(found, key=order))
        return ()

    @cached_property
    def last(self) -> tuple[Comparison, ...]:
        """The units whose tests are shown one by one: all; where models are merged one after the other, the largest."""
        most = max((len(unit.contributors) for unit in self.units), default=0)
        return tuple(unit for unit in self.units if self.layout != "greedy" or len(unit.contributors) == most)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the units."""
        return tuple(sorted({unit.seed for unit in self.units}))

    @cached_property
    def contributors(self) -> tuple[str, ...]:
        """All contributors, by the mean of their places in the rows: the order that the experiment names them in."""
        places: dict[str, list[int]] = {name: [] for row in self.rows for name in row.contributors}
        for row in self.rows:
            if len(row.contributors) > 1:
                for position, name in enumerate(row.contributors):
                    places[name].append(position)
        return tuple(sorted(places, key=lambda name: (statistics.fmean(places[name] or [math.inf]), name)))

    @cached_property
    def sets(self) -> dict[str, str]:
        """Contributor → its data set, where the rows agree on one.

        A contributor that no row gives a set for has that of its individual row's only in-domain test.
        """
        said: dict[str, set[str]] = {}
        tested: dict[str, set[str]] = {}
        for row in self.rows:
            for name, own in zip(row.contributors, row.sets, strict=False):
                if own:
                    said.setdefault(name, set()).add(own)
            inside = [_bare(test) for test, score in row.scores.items() if score.domain == "in"]
            if row.kind == "individual" and len(inside) == 1:
                tested.setdefault(row.contributors[0], set()).add(inside[0])
        return {name: next(iter(found)) for name, found in {**tested, **said}.items() if len(found) == 1}

    def show(self, contributor: str) -> str:
        """A contributor as people are to read it: by its data set, where that is known.

        With several contributors of one data set the name follows in brackets. A part such as ``rte/1`` has the set
        in its name already.
        """
        own = self.sets.get(contributor)
        if own is None or own in (contributor, _stem(contributor)):
            return contributor
        claims = [self.sets.get(name, name) for name in self.contributors].count(own)
        return own if claims == 1 else f"{own} ({contributor})"

    def label(self, contributors: Iterable[str]) -> str:
        """Contributors as tables name them."""
        return " + ".join(map(self.show, sorted(contributors, key=self.contributors.index)))

    @cached_property
    def orders(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The longest contributor list of each seed, as its rows give it → the seeds that have it."""
        longest: dict[int, tuple[str, ...]] = {}
        for row in self.rows:
            if row.kind == "merge" and len(row.contributors) > len(longest.get(row.seed, ())):
                longest[row.seed] = row.contributors
        return {order: tuple(sorted(s for s in longest if longest[s] == order)) for order in sorted(longest.values())}

    @cached_property
    def _tests(self) -> dict[Comparison, dict[str, Domain]]:
        found: dict[Comparison, dict[str, Domain]] = {unit: {} for unit in self.units}
        for row in self.rows:
            if unit_of(row) in found:
                found[unit_of(row)].update({name: score.domain for name, score in row.scores.items()})
        return found

    def tests(self, domain: Domain, units: Sequence[Comparison] | None = None) -> tuple[str, ...]:
        """The tests of a domain: those of the contributors' data sets in their order, then by name."""
        chosen = self.units if units is None else units
        names = {name for unit in chosen for name, own in self._tests[unit].items() if own == domain}
        own: list[str] = []
        for name in self.contributors:
            own += [self.sets[name]] if name in self.sets else [name, _stem(name)]
        place = {name: own.index(_bare(name)) if _bare(name) in own else len(own) for name in names}
        return tuple(sorted(names, key=lambda name: (place[name], name)))

    @property
    def domains(self) -> tuple[Domain, ...]:
        """``in``, ``out`` or both: those with tests."""
        return tuple(domain for domain in DOMAINS if self.tests(domain))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The key metrics of the tests, as people write them."""
        names = {score.metric for row in self.rows for score in row.scores.values()}
        return tuple(sorted(METRICS.get(name, name.replace("_", " ")) for name in names))

    def on_test(self, method: TableLine, unit: Comparison, test: str) -> Value | None:
        """A method's score on one test of a unit; None where it is missing."""
        if method.kind != "individual":
            return _score(self._cells.get((method, unit)), test)
        rows = [self._individuals.get((name, unit.seed)) for name in unit.contributors]
        domain = self._tests[unit].get(test)
        if method == EVERY:
            return mean_of([_score(row, test) for row in rows]) if domain == "in" else None
        has = [row for row in rows if row is None or (test in row.scores and row.scores[test].domain == domain)]
        return mean_of([_score(row, test) for row in has])

    def of_model(self, contributor: str, test: str) -> dict[Comparison, Value]:
        """The score of a single model on any test, by seed."""
        rows = {
            Comparison((name,), seed): row for (name, seed), row in self._individuals.items() if name == contributor
        }
        return {unit: value for unit, row in sorted(rows.items()) if (value := _score(row, test))}

    def on_domain(self, method: TableLine, unit: Comparison, domain: Domain) -> Value | None:
        """A method's average over the tests of a domain; None where one is missing."""
        if method.kind != "individual":
            row = self._cells.get((method, unit))
            average = row.domain_average(domain) if row else None
            return Value(100 * average, (row.cell,)) if row and average is not None else None
        return mean_of([self.on_test(method, unit, test) for test in self.tests(domain, [unit])])

    def label_scores(self, method: TableLine, unit: Comparison) -> dict[tuple[str, str], Value]:
        """(In-domain test, label) → score; of an individual model only on its own test."""
        if method == EVERY:
            return {}
        rows = [self._cells.get((method, unit))]
        if method.kind == "individual":
            rows = [self._individuals.get((name, unit.seed)) for name in unit.contributors]
        return {
            (test, label): Value(100 * value, (row.cell,))
            for row in rows
            if row
            for test, score in row.scores.items()
            if score.domain == "in"
            for label, value in score.per_label.items()
            if value is not None
        }

    def by_domain(self, domain: Domain) -> dict[TableLine, Values]:
        """Method → unit → average over the tests of a domain."""
        return self._by_method(self.units, lambda method, unit: self.on_domain(method, unit, domain))

    def by_test(self, test: str) -> dict[TableLine, Values]:
        """Method → unit → score on a test."""
        return self._by_method(self.last, lambda method, unit: self.on_test(method, unit, test))

    def _by_method(
        self, units: Sequence[Comparison], score: Callable[[TableLine, Comparison], Value | None]
    ) -> dict[TableLine, Values]:
        return {method: {u: v for u in units if (v := score(method, u)) is not None} for method in self.methods}

    def gaps(self) -> list[str]:
        """What is missing, a sentence each: methods without some units, and units without some seeds.

        A comparator is expected only at the numbers of models at which it is known at all.
        """
        told = []
        for method in self.methods:
            has = {u for u in self.units if any(self.on_domain(method, u, d) is not None for d in self.domains)}
            sizes = {len(u.contributors) for u in has}
            due = [u for u in self.units if method.kind == "merge" or len(u.contributors) in sizes or not sizes]
            missing: dict[str, list[str]] = {}
            for unit in due:
                if unit not in has:
                    missing.setdefault(self.label(unit.contributors), []).append(str(unit.seed))
            if missing:
                listed = [
                    f"{label} (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})" for label, seeds in missing.items()
                ]
                shown = "; ".join(listed[:4]) + (f"; and {len(listed) - 4} more" if len(listed) > 4 else "")
                told.append(f"{method.title} has {len(has)} of {len(due)} cells. Missing: {shown}.")
        greedy = self.layout == "greedy"
        found = {(len(unit.contributors) if greedy else unit.contributors, unit.seed) for unit in self.units}
        expected = len({merged for merged, _ in found}) * len(self.seeds)
        if len(found) < expected:
            what = {"greedy": "numbers of models", "pairs": "pairs"}.get(self.layout, "sets of models")
            told.append(f"Only {len(found)} of {expected} {what} × seeds have been computed by any method.")
        return told


def unit_of(row: ResultRow) -> Comparison:
    """The unit that a row belongs to."""
    return Comparison(tuple(sorted(row.contributors)), row.seed)


def _score(row: ResultRow | None, test: str) -> Value | None:
    """The score of a row on a test; None where it is missing."""
    score = row.scores.get(test) if row else None
    return Value(100 * score.value, (row.cell,)) if row and score and score.value is not None else None


def mean_of(values: Sequence[Value | None]) -> Value | None:
    """The mean of values, with the cells of all; None where there are none, or one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    cells = dict.fromkeys(cell for value in known for cell in value.cells)
    return Value(statistics.fmean(value.points for value in known), tuple(cells))


def _bare(test: str) -> str:
    """The data set of a test: ``isear[test]`` → ``isear``."""
    return re.sub(r"(?<=.)\[\w+\]$", "", test)


def _stem(contributor: str) -> str:
    """What a part is part of: ``rte/1`` → ``rte``; any other name as it is."""
    return contributor.rpartition("/")[0] or contributor


def common_units(values: Mapping[TableLine, Mapping[Unit, object]]) -> tuple[frozenset[Unit], frozenset[TableLine]]:
    """The units that the merges are compared on, and the methods that have them all.

    A merge with less than half of the units of the fullest one does not take part, so that a method that has just
    begun does not throw away everybody else's cells.
    """
    merges = [frozenset(found) for method, found in values.items() if method.kind == "merge" and found]
    sets = merges or [frozenset(found) for found in values.values() if found]
    if not sets:
        return frozenset(), frozenset()
    most = sorted(sets, key=len)[-1]
    common = frozenset.intersection(*(found for found in sets if 2 * len(found) >= len(most))) or most
    return common, frozenset(method for method, found in values.items() if common <= set(found))


def make_grids(rows: Sequence[ResultRow], against: str = SIMPLE.name) -> tuple[list[ResultGrid], list[ResultRow]]:
    """Grids of one experiment's rows, and the rows that a later one of the same cell supersedes.

    A later row of an individual model that says nothing new is left out without being one of these: an experiment
    with fewer contributors scores the same models on fewer tests.
    """
    newest: dict[tuple[object, ...], ResultRow] = {}
    old = []
    for row in sorted(rows, key=lambda row: (row.provenance.finished, row.cell)):
        title = "" if row.kind == "individual" else row.title
        key = (row.model, row.layout, row.heads, row.kind, row.method, title, row.chosen is None, unit_of(row))
        if key in newest:
            if _repeats(newest[key], row):
                continue
            old.append(newest[key])
        newest[key] = row
    groups: dict[tuple[str, str, str], list[ResultRow]] = {}
    for row in sorted(newest.values(), key=lambda row: row.cell):
        groups.setdefault((row.model, row.layout, row.heads), []).append(row)
    order = list(HEADS)
    keys = sorted(groups, key=lambda key: (key[0], key[1], order.index(key[2])))
    return [ResultGrid(*key, tuple(groups[key]), against) for key in keys], old


def _repeats(older: ResultRow, row: ResultRow) -> bool:
    """Whether a row is of the same individual model as an older one that has all of its scores."""
    weights = _weights(row)
    return (
        row.kind == "individual"
        and bool(weights)
        and weights == _weights(older)
        and row.scores.items() <= older.scores.items()
    )


def _weights(row: ResultRow) -> list[str]:
    """The hashes of the weights of a row's contributors, as far as they are known."""
    return [origin.weights for origin in row.provenance.contributors if origin.weights]
