"""The tables of each layout: pairs, greedy sequences, all models at once, partitions; and those of single labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from merganser.lab.report.grid import EVERY, Comparison, ResultGrid, TableLine, Value, Values, mean_of
from merganser.lab.report.rows import Domain, ResultRow
from merganser.lab.report.tables import (
    DOMAIN_TITLES,
    Line,
    Table,
    TableCell,
    compare,
    compare_groups,
    compare_paired,
    method_lines,
    method_spans,
    significance_table,
    spread,
    summarise,
)
from merganser.lab.report.ties import RULE, and_tied


def grid_tables(grid: ResultGrid) -> list[Table]:
    """All tables of a grid, in the order of the page; that of the chosen coefficients is the last."""
    builders: dict[str, Callable[[ResultGrid], list[Table | None]]] = {"pairs": _pairs, "greedy": _greedy}
    tables = builders.get(grid.layout, _tests_by_methods)(grid)
    return [table for table in [*tables, _labels(grid), _chosen(grid)] if table and table.lines]


def _pairs(grid: ResultGrid) -> list[Table | None]:
    values = {DOMAIN_TITLES[domain]: grid.by_domain(domain) for domain in grid.domains}
    each = {title: compare_groups(grid, found, lambda unit: unit.contributors) for title, found in values.items()}
    whole = {title: compare(found) for title, found in values.items()}
    tests = compare_paired(grid, values)
    stars = {title: {m: tests[title, m].marker for m in grid.merges if (title, m) in tests} for title in values}
    columns: dict[str, Mapping[TableLine, TableCell]] = {
        title: {m: replace(cell, stars=stars[title].get(m, "")) for m, cell in cells.items()}
        for title, cells in whole.items()
    }
    columns |= {f"Pairs won, {title.lower()}": _wins(grid, each[title].values()) for title in values}
    starred = f" Stars: differs from {grid.reference.title} (table below)." if tests and grid.reference else ""
    tables: list[Table | None] = [
        Table(
            key="summary",
            title="Averages over pairs",
            corner="Method",
            columns=tuple(columns),
            lines=method_lines(grid, list(columns.values())),
            caption="Average over pairs, mean ± deviation over seeds. A merge wins the pairs on which its mean over "
            f"seeds is the highest of all merges; a pair whose best merges are tied ({RULE}) is won by none, and "
            f"counts as tied for each of these.{starred}",
            main=True,
        ),
        significance_table(grid, tests, "pairs and seeds"),
    ]
    for domain in grid.domains:
        title = DOMAIN_TITLES[domain]
        lines = [
            Line(grid.label(pair), spread(cells, grid.methods))
            for pair, cells in each[title].items()
            if any(cell.value is not None for cell in cells.values())
        ]
        tables.append(
            Table(
                key=f"each-{domain}",
                title=f"Each pair, {title.lower()}",
                corner="Pair",
                columns=tuple(method.title for method in grid.methods),
                lines=(*lines, Line("Average over pairs", spread(whole[title], grid.methods), total=True)),
                caption="Mean ± deviation over seeds of a pair’s average over its tests.",
                spans=method_spans(grid.methods),
            )
        )
    return tables


def _wins(grid: ResultGrid, pairs: Iterable[Mapping[TableLine, TableCell]]) -> dict[TableLine, TableCell]:
    """How many pairs each merge wins, by its mean over seeds, and on how many it is tied for the best."""
    best = [[method for method, cell in cells.items() if cell.mark == "best"] for cells in pairs]
    total = sum(map(bool, best))
    won = Counter(methods[0] for methods in best if len(methods) == 1)
    tied = Counter(method for methods in best if len(methods) > 1 for method in methods)
    shown = {method: f"{won[method]} of {total}{and_tied(tied[method])}" for method in grid.merges}
    return {method: TableCell(value=won[method], text=text) for method, text in shown.items()} if total else {}


def _greedy(grid: ResultGrid) -> list[Table | None]:
    tables: list[Table | None] = []
    for domain in grid.domains:
        sizes = compare_groups(grid, grid.by_domain(domain), lambda unit: len(unit.contributors))
        differ = len({grid.tests(domain, [unit]) for unit in grid.units}) > 1
        whose = " of the models merged, which differ from column to column" if differ else ""
        tables.append(
            Table(
                key=f"greedy-{domain}",
                title=DOMAIN_TITLES[domain],
                corner="Method",
                columns=tuple(map(str, sizes)),
                lines=method_lines(grid, list(sizes.values())),
                caption=f"Average over the tests{whose}, mean ± deviation over seeds.",
                spans=(("Number of models", len(sizes)),),
                main=True,
            )
        )
    return [*tables, *_tests_by_methods(grid)]


def on_tests(grid: ResultGrid, domain: Domain) -> dict[str, dict[TableLine, Values]]:
    """Test → method → unit → score, for each test of a domain."""
    return {test: grid.by_test(test) for test in grid.tests(domain, grid.last)}


def average_over_tests(grid: ResultGrid, tests: Mapping[str, Mapping[TableLine, Values]]) -> dict[TableLine, TableCell]:
    """Method → the average over tests (:func:`on_tests`).

    A seed counts for a method only where the method has all tests that any method has with that seed.
    """
    averages: dict[TableLine, dict[Comparison, Value]] = {method: {} for method in grid.methods}
    for seed in grid.seeds:
        of_seed = [
            {method: [v for u, v in found.items() if u.seed == seed] for method, found in values.items()}
            for values in tests.values()
        ]
        due = [found for found in of_seed if any(found.values())]
        for method in grid.methods:
            average = mean_of([mean_of(found[method]) for found in due])
            if average is not None:
                averages[method][Comparison((), seed)] = average
    return compare(averages)


def _tests_by_methods(grid: ResultGrid) -> list[Table | None]:
    """Lines = tests, columns = methods; with an average for each domain."""
    lines = []
    paired: dict[str, Mapping[TableLine, Values]] = {}
    for domain in grid.domains:
        title, found = DOMAIN_TITLES[domain], on_tests(grid, domain)
        paired[title] = _pooled(grid, found)
        lines += [Line(test, spread(compare(values), grid.methods), title) for test, values in found.items()]
        if len(found) > 1:
            lines.append(Line("Average", spread(average_over_tests(grid, found), grid.methods), title, total=True))
    size = {len(unit.contributors) for unit in grid.last}
    every = f", all {size.pop()} models merged" if grid.layout in ("greedy", "all") and len(size) == 1 else ""
    noun = "task" if grid.layout == "partitions" else "test set"
    table = Table(
        key="tests",
        title=f"Each {noun}{every}",
        corner=noun.capitalize(),
        columns=tuple(method.title for method in grid.methods),
        lines=tuple(lines),
        caption="Mean ± deviation over seeds.",
        spans=method_spans(grid.methods),
        main=grid.layout != "greedy",
    )
    significance = significance_table(grid, compare_paired(grid, paired), f"{noun}s and seeds")
    return [table, _each_model(grid) if grid.layout == "all" else None, significance]


def _pooled(grid: ResultGrid, tests: Mapping[str, Mapping[TableLine, Values]]) -> dict[TableLine, Values]:
    """Method → (test, contributors) and seed → score: what is compared in pairs."""
    return {
        method: {
            Comparison((test, *unit.contributors), unit.seed): value
            for test, values in tests.items()
            for unit, value in values[method].items()
        }
        for method in grid.methods
    }


def models_on_tests(grid: ResultGrid) -> dict[str, dict[str, TableCell]]:
    """Contributor → in-domain test → the score of its model alone; empty where models are scored on their own tests
    only."""
    if EVERY not in grid.methods:
        return {}
    tests = grid.tests("in")
    return {name: {test: summarise(grid.of_model(name, test)) for test in tests} for name in grid.contributors}


def _each_model(grid: ResultGrid) -> Table:
    """Lines = single models, columns = in-domain tests."""
    return Table(
        key="models",
        title="Each model alone",
        corner="Model",
        columns=grid.tests("in"),
        lines=_tinted([Line(grid.show(name), tuple(own.values())) for name, own in models_on_tests(grid).items()]),
        caption=f"Each model on every test before anything is merged, mean ± deviation over seeds. {_TINT}",
        main=True,
    )


#: What a caption says of tinted cells.
_TINT = "The tint runs from the lowest to the highest number of the table."


def _tinted(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Lines whose numbers are tinted by how high they are."""
    numbers = [cell.value for line in lines for cell in line.cells if cell.value is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)

    def tint(cell: TableCell) -> TableCell:
        return cell if cell.value is None else replace(cell, shade=(cell.value - low) / ((high - low) or 1.0))

    return tuple(replace(line, cells=tuple(map(tint, line.cells))) for line in lines)


def _labels(grid: ResultGrid) -> Table:
    """Per-label scores: labels × methods, over the in-domain tests that have the label."""
    found: dict[str, dict[TableLine, dict[Comparison, Value]]] = {}
    for method, unit in product(grid.methods, grid.last):
        for (test, label), value in grid.label_scores(method, unit).items():
            of_label = found.setdefault(label, {method: {} for method in grid.methods})
            of_label[method][Comparison((test, *unit.contributors), unit.seed)] = value
    methods = [method for method in grid.methods if any(of_label[method] for of_label in found.values())]
    lines = [Line(label, spread(compare(of_label), methods)) for label, of_label in sorted(found.items())]
    merged = f", {len(grid.last[0].contributors)} models merged" if grid.layout == "greedy" else ""
    return Table(
        key="labels",
        title=f"Each label, in-domain{merged}",
        corner="Label",
        columns=tuple(method.title for method in methods),
        lines=_tinted(lines),
        caption="F1 × 100 of each label, average over the in-domain tests that have it, mean ± deviation over seeds. "
        + _TINT,
        spans=method_spans(methods),
    )


def _chosen(grid: ResultGrid) -> Table:
    """The coefficients of searched cells."""

    def order(row: ResultRow) -> tuple[Any, ...]:
        places = list(map(grid.contributors.index, row.contributors))
        return grid.method(row).rank, len(places), places, row.seed

    lines, by = [], set()
    for row in sorted(grid.rows, key=order):
        if row.chosen is None:
            continue
        by.add(row.chosen.by)
        best = row.chosen.candidates[row.chosen.best]
        known = [c.dev for c in row.chosen.candidates if c.dev is not None]
        span = f"{100 * min(known):.1f} – {100 * max(known):.1f}" if known else "–"
        weights = zip(row.contributors, best.coefficients, strict=False)
        cells = (
            TableCell(text=" + ".join(f"{weight:.2g} {grid.show(name)}" for name, weight in weights)),
            TableCell(text=str(row.seed)),
            TableCell(value=None if best.dev is None else 100 * best.dev, cells=(row.cell,), n=1, seeds=1),
            TableCell(text=span),
            TableCell(text=str(len(row.chosen.candidates))),
        )
        lines.append(Line(grid.label(row.contributors), cells, group=grid.method(row).title))
    return Table(
        key="chosen",
        title="Chosen coefficients",
        corner="Models",
        columns=("Coefficients", "Seed", "Score when chosen", "Lowest – highest", "Tried"),
        lines=tuple(lines),
        caption=f"The coefficients with the highest score on {' and '.join(sorted(by))} data, that score, and the "
        "range of all that were tried. The scores of the other tables are of test data.",
        numeric=(False, True, True, True, True),
    )
