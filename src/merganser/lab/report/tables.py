"""Tables of a grid, as values: what the page, the Markdown, the CSV and the terminal all show.

Means are over seeds of the per-seed averages, the deviation (n − 1) is over those same averages. The best merge of a
line or column is marked, and the second best, each with those tied with it; comparators are never marked.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
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
    ranked = rankable(cells)
    best = leaders(ranked) if len(ranked) > 1 else []
    rest = {method: value for method, value in ranked.items() if method not in best}
    second = leaders(rest) if best else []
    marks = {**dict.fromkeys(best, "best"), **dict.fromkeys(second, "second")}
    return {method: replace(cell, mark=marks.get(method, "")) for method, cell in cells.items()}


def rankable(cells: Mapping[Method, Cell]) -> dict[Method, float]:
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


def significance_table(
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


def with_stars(
    cells: Mapping[Method, Cell], found: Mapping[tuple[str, Method], Paired], column: str
) -> dict[Method, Cell]:
    return {
        method: replace(cell, stars=found[column, method].marker) if (column, method) in found else cell
        for method, cell in cells.items()
    }


def method_lines(grid: Grid, columns: Sequence[Mapping[Method, Cell]]) -> tuple[Line, ...]:
    """Lines = methods, comparators in a group of their own."""
    lines = []
    for method in grid.methods:
        cells = tuple(column.get(method, Cell()) for column in columns)
        if any(cell.value is not None or cell.text for cell in cells):
            group = "Merged into one model" if method.kind == "merge" else "For comparison"
            lines.append(Line(method.title, cells, group))
    return tuple(lines)


def spread(cells: Mapping[Method, Cell], methods: Sequence[Method]) -> tuple[Cell, ...]:
    return tuple(cells.get(method, Cell()) for method in methods)


def method_spans(methods: Sequence[Method]) -> tuple[tuple[str, int], ...]:
    merges = sum(method.kind == "merge" for method in methods)
    spans = (("For comparison", len(methods) - merges), ("Merged into one model", merges))
    return tuple(span for span in spans if span[1])
