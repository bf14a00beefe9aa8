"""Tables of a grid, as values: what the page, the Markdown, the CSV and the terminal all show.

Means are over seeds of the per-seed averages, the deviation (n − 1) is over those same averages. The best merge of a
line or column is marked, and the second best, each with those tied with it; comparators are never marked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merganser.lab.report.grid import Grid, Method, Unit, Value, Values, common_units
from merganser.lab.report.rows import Domain
from merganser.lab.report.significance import Paired, holm, sign_flip
from merganser.lab.report.ties import RULE, and_tied, leaders, signed

DOMAIN_TITLES: dict[Domain, str] = {"in": "In-domain", "out": "Out-of-domain"}


@dataclass(frozen=True)
class Cell:
    """A number (points, × 100) with its deviation over seeds, or ``text``.

    ``n`` counts the units behind it; ``partial`` says that these are fewer than its neighbours have; ``mark`` is
    ``best`` or ``second``; ``stars`` mark a significant difference; ``shade`` in 0–1 tints the cell.
    """

    value: float | None = None
    std: float | None = None
    n: int = 0
    seeds: int = 0
    cells: tuple[str, ...] = ()
    partial: bool = False
    mark: str = ""
    stars: str = ""
    text: str | None = None
    shade: float | None = None

    @property
    def shown(self) -> str:
        """The number with one decimal, a dash where there is none, or the text."""
        if self.text is not None:
            return self.text
        return "–" if self.value is None else f"{self.value:.1f}"

    @property
    def counted(self) -> bool:
        """Whether the number has to say over how many units it is."""
        return self.partial and self.value is not None

    @property
    def deviation(self) -> str:
        """``± 0.4``, or nothing."""
        return "" if self.std is None or self.text is not None else f"± {self.std:.1f}"


@dataclass(frozen=True)
class Line:
    """A line of a table; lines of one ``group`` stand together."""

    title: str
    cells: tuple[Cell, ...]
    group: str = ""
    total: bool = False


@dataclass(frozen=True)
class Table:
    """A table; ``corner`` heads the column of line titles, ``spans`` group the columns (title, count)."""

    key: str
    title: str
    corner: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    caption: str = ""
    spans: tuple[tuple[str, int], ...] = ()
    main: bool = False
    numeric: tuple[bool, ...] = field(default=())

    def is_numeric(self, column: int) -> bool:
        """Whether a column is set flush right."""
        return self.numeric[column] if self.numeric else True


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


def summarise(values: Iterable[tuple[Unit, Value]]) -> Cell:
    """Mean over seeds of the per-seed means, and the sample deviation of these."""
    by_seed: dict[int, list[float]] = {}
    cells: dict[str, None] = {}
    count = 0
    for unit, value in values:
        by_seed.setdefault(unit.seed, []).append(value.points)
        cells.update(dict.fromkeys(value.cells))
        count += 1
    means = [statistics.fmean(points) for _, points in sorted(by_seed.items())]
    if not means:
        return Cell()
    deviation = statistics.stdev(means) if len(means) > 1 else None
    return Cell(statistics.fmean(means), deviation, count, len(means), tuple(cells))


def compare(values: Mapping[Method, Values]) -> dict[Method, Cell]:
    """A cell a method, over the units that the merges share; best and second best merge are marked.

    A method that lacks some of these units is averaged over those that it has and is ``partial``; it gets no mark.
    """
    common, full = common_units(values)
    cells = {}
    for method, found in values.items():
        own = {unit: value for unit, value in found.items() if unit in common} or found
        cells[method] = replace(summarise(sorted(own.items(), key=_first)), partial=method not in full)
    return _marked(cells)


def _first(item: tuple[Unit, Value]) -> Unit:
    return item[0]


def _marked(cells: Mapping[Method, Cell]) -> dict[Method, Cell]:
    ranked = _ranked(cells)
    best = leaders(ranked) if len(ranked) > 1 else []
    rest = {method: value for method, value in ranked.items() if method not in best}
    second = leaders(rest) if best else []
    marks = {**dict.fromkeys(best, "best"), **dict.fromkeys(second, "second")}
    return {method: replace(cell, mark=marks.get(method, "")) for method, cell in cells.items()}


def _ranked(cells: Mapping[Method, Cell]) -> dict[Method, float]:
    """The numbers of the merges that can be the best."""
    return {
        method: cell.value
        for method, cell in cells.items()
        if method.kind == "merge" and not cell.partial and cell.value is not None
    }


def find_method(grid: Grid, name: str) -> Method | None:
    """The merge of a name or title; without a coefficient search rather than with."""
    found = [method for method in grid.merges if name.lower() in (method.name.lower(), method.title.lower())]
    return min(found, key=lambda method: method.searched, default=None)


def compare_paired(
    grid: Grid, columns: Mapping[str, Mapping[Method, Values]], against: str
) -> dict[tuple[str, Method], Paired]:
    """Every other merge against one, on the units that both have; p-values adjusted together (Holm)."""
    reference = find_method(grid, against)
    found: dict[tuple[str, Method], Paired] = {}
    for column, values in columns.items():
        for method in grid.merges:
            if reference is None or method == reference:
                continue
            base, own = values.get(reference, {}), values.get(method, {})
            units = sorted(set(base) & set(own))
            if len(units) > 1:
                found[column, method] = sign_flip([own[u].points - base[u].points for u in units])
    adjusted = holm([paired.p for paired in found.values()])
    return {key: replace(found[key], adjusted=p) for key, p in zip(found, adjusted, strict=True)}


def _significance(
    grid: Grid, columns: Mapping[str, Mapping[Method, Values]], against: str, what: str
) -> Table | None:
    """The comparisons behind the stars."""
    reference = find_method(grid, against)
    found = compare_paired(grid, columns, against)
    if reference is None or not found:
        return None
    lines = []
    for (column, method), paired in found.items():
        cells = (
            Cell(value=paired.difference, text=signed(paired.difference)),
            Cell(text=f"{paired.above} / {paired.below}{and_tied(paired.tied)}"),
            Cell(value=paired.n, text=str(paired.n)),
            Cell(value=paired.p, text=_p(paired.p)),
            Cell(value=paired.adjusted, text=_p(paired.adjusted), stars=paired.marker),
        )
        lines.append(Line(method.title, cells, group=column))
    return Table(
        key="significance",
        title=f"Compared with {reference.title}",
        corner="Method",
        columns=("Difference", "Above / below", "n", "p", "p, Holm"),
        lines=tuple(lines),
        caption=f"Mean difference in points over {what}, how many are above and below {reference.title} or tied with "
        f"it ({RULE}), and p of a two-sided paired sign-flip test of the differences as they are, plain and adjusted "
        f"by Holm over the whole table ({len(found)} p). "
        "* p < 0.05, ** p < 0.01, where the mean difference is no tie.",
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _starred(
    cells: Mapping[Method, Cell], found: Mapping[tuple[str, Method], Paired], column: str
) -> dict[Method, Cell]:
    return {
        method: replace(cell, stars=found[column, method].marker) if (column, method) in found else cell
        for method, cell in cells.items()
    }


def _by_methods(grid: Grid, columns: Sequence[Mapping[Method, Cell]]) -> tuple[Line, ...]:
    """Lines = methods, comparators in a group of their own."""
    lines = []
    for method in grid.methods:
        cells = tuple(column.get(method, Cell()) for column in columns)
        if any(cell.value is not None or cell.text for cell in cells):
            group = "Merged into one model" if method.kind == "merge" else "For comparison"
            lines.append(Line(method.title, cells, group))
    return tuple(lines)


def _spread(cells: Mapping[Method, Cell], methods: Sequence[Method]) -> tuple[Cell, ...]:
    return tuple(cells.get(method, Cell()) for method in methods)


def _spans(methods: Sequence[Method]) -> tuple[tuple[str, int], ...]:
    merges = sum(method.kind == "merge" for method in methods)
    spans = (("For comparison", len(methods) - merges), ("Merged into one model", merges))
    return tuple(span for span in spans if span[1])


def _pairs(grid: Grid, against: str) -> list[Table]:
    values = {domain: grid.by_domain(domain, grid.units) for domain in grid.domains}
    titled = {DOMAIN_TITLES[domain]: values[domain] for domain in grid.domains}
    tests = compare_paired(grid, titled, against)
    columns, names = [], []
    for title, found in titled.items():
        columns.append(_starred(compare(found), tests, title))
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
            lines=_by_methods(grid, columns),
            caption="Average over pairs, mean ± deviation over seeds. A merge wins the pairs on which its mean over "
            f"seeds is the highest of all merges; a pair whose best merges are tied ({RULE}) is won by none, and "
            f"counts as tied for each of these.{starred}",
            main=True,
        ),
        _significance(grid, titled, against, "pairs and seeds"),
    ]
    for domain in grid.domains:
        lines = []
        for pair in pairs:
            of_pair = {
                method: {u: v for u, v in found.items() if u.contributors == pair}
                for method, found in values[domain].items()
            }
            if any(of_pair.values()):
                lines.append(Line(grid.label(pair), _spread(compare(of_pair), grid.methods)))
        total = Line("Average over pairs", _spread(compare(values[domain]), grid.methods), total=True)
        tables.append(
            Table(
                key=f"each-{domain}",
                title=f"Each pair, {DOMAIN_TITLES[domain].lower()}",
                corner="Pair",
                columns=tuple(method.title for method in grid.methods),
                lines=(*lines, total),
                caption="Mean ± deviation over seeds of a pair’s average over its tests.",
                spans=_spans(grid.methods),
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
            method: {u: v for u, v in values[method].items() if u.contributors == group}
            for method in grid.merges
        }
        ranked = _ranked(compare(of_group))
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
                lines=_by_methods(grid, columns),
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
    return {
        method: {u: v for u, v in found.items() if len(u.contributors) == size}
        for method, found in values.items()
    }


def _tests_by_methods(grid: Grid, against: str, some: Sequence[Unit] | None = None) -> list[Table]:
    """Lines = tests, columns = methods; with an average for each domain."""
    units = list(grid.units if some is None else some)
    lines = []
    paired: dict[str, dict[Method, dict[Unit, Value]]] = {}
    for domain in grid.domains:
        title = DOMAIN_TITLES[domain]
        tests = grid.tests(domain, units)
        pooled: dict[Method, dict[Unit, Value]] = {method: {} for method in grid.methods}
        for test in tests:
            values = grid.by_test(test, units)
            lines.append(Line(test, _spread(compare(values), grid.methods), group=title))
            for method, found in values.items():
                pooled[method].update(
                    {Unit((test, *unit.contributors), unit.seed): v for unit, v in found.items()}
                )
        paired[title] = pooled
        if len(tests) > 1:
            cells = compare(_over_tests(pooled))
            lines.append(Line("Average", _spread(cells, grid.methods), group=title, total=True))
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
        spans=_spans(grid.methods),
        main=grid.layout != "greedy",
    )
    return [table, *filter(None, [_significance(grid, paired, against, f"{noun}s and seeds")])]


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
    compared = {
        label: compare({method: of_label.get(method, {}) for method in methods})
        for label, of_label in sorted(found.items())
    }
    numbers = [c.value for cells in compared.values() for c in cells.values() if c.value is not None]
    low, width = min(numbers), (max(numbers) - min(numbers)) or 1.0
    lines = [
        Line(
            label,
            tuple(
                replace(cell, shade=None if cell.value is None else (cell.value - low) / width)
                for cell in _spread(cells, methods)
            ),
        )
        for label, cells in compared.items()
    ]
    return Table(
        key="labels",
        title="Each label, in-domain" + (f", {max(sizes)} models merged" if grid.layout == "greedy" else ""),
        corner="Label",
        columns=tuple(method.title for method in methods),
        lines=tuple(lines),
        caption="F1 × 100 of each label, average over the in-domain tests that have it, mean ± deviation over seeds. "
        "The tint runs from the lowest to the highest number of the table.",
        spans=_spans(methods),
    )
