"""The tables of each layout: pairs, greedy sequences, all models at once, partitions; and those of single labels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from merganser.lab.report.grid import EVERY, Grid, Method, Unit, Value, Values
from merganser.lab.report.rows import Domain
from merganser.lab.report.tables import (
    DOMAIN_TITLES,
    Cell,
    Line,
    Table,
    compare,
    compare_paired,
    find_method,
    method_lines,
    method_spans,
    rankable,
    significance_table,
    spread,
    summarise,
    with_stars,
)
from merganser.lab.report.ties import RULE, and_tied, leaders


def grid_tables(grid: Grid, against: str) -> list[Table]:
    """All tables of a grid, in the order of the page."""
    builders: dict[str, Callable[[Grid, str], list[Table]]] = {
        "pairs": _pairs,
        "greedy": _greedy,
        "partitions": _tests_by_methods,
        "all": _tests_by_methods,
    }
    tables = builders[grid.layout](grid, against)
    return [table for table in [*tables, _labels(grid)] if table and table.lines]


def _pairs(grid: Grid, against: str) -> list[Table]:
    values = {domain: grid.by_domain(domain, grid.units) for domain in grid.domains}
    titled = {DOMAIN_TITLES[domain]: values[domain] for domain in grid.domains}
    tests = compare_paired(grid, titled, against)
    columns, names = [], []
    for title, found in titled.items():
        columns.append(with_stars(compare(found), tests, title))
        names.append(title)
    for title, found in titled.items():
        columns.append(_wins(grid, found))
        names.append(f"Pairs won, {title.lower()}")
    pairs = list(dict.fromkeys(unit.contributors for unit in grid.units))
    reference = find_method(grid, against)
    starred = f" Stars: differs from {reference.title} (table below)." if tests and reference else ""
    tables: list[Table | None] = [
        Table(
            key="summary",
            title="Averages over pairs",
            corner="Method",
            columns=tuple(names),
            lines=method_lines(grid, columns),
            caption="Average over pairs, mean ± deviation over seeds. A merge wins the pairs on which its mean over "
            f"seeds is the highest of all merges; a pair whose best merges are tied ({RULE}) is won by none, and "
            f"counts as tied for each of these.{starred}",
            main=True,
        ),
        significance_table(grid, titled, against, "pairs and seeds"),
    ]
    for domain in grid.domains:
        lines = []
        for pair in pairs:
            of_pair = {
                method: {u: v for u, v in found.items() if u.contributors == pair}
                for method, found in values[domain].items()
            }
            if any(of_pair.values()):
                lines.append(Line(grid.label(pair), spread(compare(of_pair), grid.methods)))
        total = Line("Average over pairs", spread(compare(values[domain]), grid.methods), total=True)
        tables.append(
            Table(
                key=f"each-{domain}",
                title=f"Each pair, {DOMAIN_TITLES[domain].lower()}",
                corner="Pair",
                columns=tuple(method.title for method in grid.methods),
                lines=(*lines, total),
                caption="Mean ± deviation over seeds of a pair’s average over its tests.",
                spans=method_spans(grid.methods),
            )
        )
    return [table for table in tables if table]


def _wins(grid: Grid, values: Mapping[Method, Values]) -> dict[Method, Cell]:
    """How many pairs (or sets of contributors) each merge wins, by its mean over seeds, and on how many it is tied
    for the best."""
    won, tied = dict.fromkeys(grid.merges, 0), dict.fromkeys(grid.merges, 0)
    total = 0
    for group in dict.fromkeys(unit.contributors for unit in grid.units):
        of_group = {
            method: {u: v for u, v in values[method].items() if u.contributors == group} for method in grid.merges
        }
        ranked = rankable(compare(of_group))
        if len(ranked) > 1:
            total += 1
            best = leaders(ranked)
            for method in best:
                (won if len(best) == 1 else tied)[method] += 1
    if not total:
        return {}
    return {m: Cell(value=won[m], text=f"{won[m]} of {total}{and_tied(tied[m])}") for m in grid.merges}


def _greedy(grid: Grid, against: str) -> list[Table]:
    sizes = sorted({len(unit.contributors) for unit in grid.units})
    tables: list[Table] = []
    for domain in grid.domains:
        values = grid.by_domain(domain, grid.units)
        columns = [compare(_of_size(values, size)) for size in sizes]
        whose = " of the models merged, which differ from column to column" if _differ(grid, domain) else ""
        tables.append(
            Table(
                key=f"greedy-{domain}",
                title=DOMAIN_TITLES[domain],
                corner="Method",
                columns=tuple(str(size) for size in sizes),
                lines=method_lines(grid, columns),
                caption=f"Average over the tests{whose}, mean ± deviation over seeds.",
                spans=(("Number of models", len(sizes)),),
                main=True,
            )
        )
    last = [unit for unit in grid.units if len(unit.contributors) == sizes[-1]] if sizes else []
    return [*tables, *_tests_by_methods(grid, against, last)]


def _differ(grid: Grid, domain: Domain) -> bool:
    """Whether the units of a grid have different tests of a domain."""
    return len({grid.tests(domain, [unit]) for unit in grid.units}) > 1


def _of_size(values: Mapping[Method, Values], size: int) -> dict[Method, Values]:
    return {method: {u: v for u, v in found.items() if len(u.contributors) == size} for method, found in values.items()}


@dataclass(frozen=True)
class OnTests:
    """How the methods do on the tests of a domain.

    Attributes:
        cells: test → method → mean over seeds.
        values: method → (test, contributors) and seed → score: what is compared in pairs.
        average: of the tests, by method; empty where there is one test only.
    """

    cells: Mapping[str, Mapping[Method, Cell]]
    values: Mapping[Method, Values]
    average: Mapping[Method, Cell]


def on_tests(grid: Grid, domain: Domain, units: Sequence[Unit]) -> OnTests:
    """The methods on each test of a domain."""
    cells: dict[str, Mapping[Method, Cell]] = {}
    pooled: dict[Method, dict[Unit, Value]] = {method: {} for method in grid.methods}
    for test in grid.tests(domain, units):
        values = grid.by_test(test, units)
        cells[test] = compare(values)
        for method, found in values.items():
            pooled[method].update({Unit((test, *unit.contributors), unit.seed): v for unit, v in found.items()})
    return OnTests(cells, pooled, compare(_over_tests(pooled)) if len(cells) > 1 else {})


def _tests_by_methods(grid: Grid, against: str, some: Sequence[Unit] | None = None) -> list[Table]:
    """Lines = tests, columns = methods; with an average for each domain."""
    units = list(grid.units if some is None else some)
    lines = []
    paired: dict[str, Mapping[Method, Values]] = {}
    for domain in grid.domains:
        title, found = DOMAIN_TITLES[domain], on_tests(grid, domain, units)
        paired[title] = found.values
        lines += [Line(test, spread(cells, grid.methods), title) for test, cells in found.cells.items()]
        if found.average:
            lines.append(Line("Average", spread(found.average, grid.methods), title, total=True))
    size = {len(unit.contributors) for unit in units}
    every = f"all {size.pop()} models" if grid.layout in ("greedy", "all") and len(size) == 1 else ""
    noun = "task" if grid.layout == "partitions" else "test set"
    table = Table(
        key="tests",
        title=f"Each {noun}{', ' + every + ' merged' if every else ''}",
        corner=noun.capitalize(),
        columns=tuple(method.title for method in grid.methods),
        lines=tuple(lines),
        caption="Mean ± deviation over seeds.",
        spans=method_spans(grid.methods),
        main=grid.layout != "greedy",
    )
    more = [
        _each_model(grid) if grid.layout == "all" else None,
        significance_table(grid, paired, against, f"{noun}s and seeds"),
    ]
    return [table, *filter(None, more)]


def models_on_tests(grid: Grid) -> dict[str, dict[str, Cell]]:
    """Contributor → in-domain test → the score of its model alone; empty where models are scored on their own tests
    only."""
    if EVERY not in grid.methods:
        return {}
    tests = grid.tests("in")
    return {name: {test: summarise(grid.of_model(name, test).items()) for test in tests} for name in grid.contributors}


def _each_model(grid: Grid) -> Table | None:
    """Lines = single models, columns = in-domain tests."""
    found = models_on_tests(grid)
    lines = [Line(grid.show(name), tuple(cells.values())) for name, cells in found.items()]
    if not lines:
        return None
    return Table(
        key="models",
        title="Each model alone",
        corner="Model",
        columns=grid.tests("in"),
        lines=_tinted(lines),
        caption=f"Each model on every test before anything is merged, mean ± deviation over seeds. {_TINT}",
        main=True,
    )


#: What a caption says of tinted cells.
_TINT = "The tint runs from the lowest to the highest number of the table."


def _tinted(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Lines whose numbers are tinted by how high they are."""
    numbers = [cell.value for line in lines for cell in line.cells if cell.value is not None]
    low, width = min(numbers, default=0.0), (max(numbers, default=0.0) - min(numbers, default=0.0)) or 1.0

    def tint(cell: Cell) -> Cell:
        return replace(cell, shade=None if cell.value is None else (cell.value - low) / width)

    return tuple(replace(line, cells=tuple(map(tint, line.cells))) for line in lines)


def _over_tests(pooled: Mapping[Method, Values]) -> dict[Method, Values]:
    """Test and seed → seed: the mean over the tests that every method with the seed's tests has.

    A seed counts for a method only where the method has all tests that any method has with that seed.
    """
    expected: dict[int, set[str]] = {}
    for found in pooled.values():
        for unit in found:
            expected.setdefault(unit.seed, set()).add(unit.contributors[0])
    averaged: dict[Method, Values] = {}
    for method, found in pooled.items():
        by_seed: dict[int, dict[str, list[Value]]] = {}
        for unit, value in found.items():
            by_seed.setdefault(unit.seed, {}).setdefault(unit.contributors[0], []).append(value)
        averaged[method] = {
            Unit((), seed): Value(
                statistics.fmean(statistics.fmean(v.points for v in values) for values in tests.values()),
                tuple(dict.fromkeys(c for values in tests.values() for v in values for c in v.cells)),
            )
            for seed, tests in by_seed.items()
            if set(tests) == expected[seed]
        }
    return averaged


def _labels(grid: Grid) -> Table | None:
    """Per-label scores: labels × methods, over the in-domain tests that have the label."""
    sizes = {len(unit.contributors) for unit in grid.units}
    units = [u for u in grid.units if grid.layout != "greedy" or len(u.contributors) == max(sizes)]
    found: dict[str, dict[Method, dict[Unit, Value]]] = {}
    for method in grid.methods:
        for unit in units:
            for (test, label), value in grid.label_scores(method, unit).items():
                key = Unit((test, *unit.contributors), unit.seed)
                found.setdefault(label, {}).setdefault(method, {})[key] = value
    if not found:
        return None
    methods = [method for method in grid.methods if any(method in of_label for of_label in found.values())]
    lines = [
        Line(label, spread(compare({method: of_label.get(method, {}) for method in methods}), methods))
        for label, of_label in sorted(found.items())
    ]
    return Table(
        key="labels",
        title="Each label, in-domain" + (f", {max(sizes)} models merged" if grid.layout == "greedy" else ""),
        corner="Label",
        columns=tuple(method.title for method in methods),
        lines=_tinted(lines),
        caption="F1 × 100 of each label, average over the in-domain tests that have it, mean ± deviation over seeds. "
        + _TINT,
        spans=method_spans(methods),
    )
