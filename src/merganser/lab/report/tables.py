"""Tables of a grid, as values: what the page, the Markdown, the CSV and the terminal all show.

Means are over seeds of the per-seed averages, the deviation (n − 1) is over those same averages. The best merge of a
line or column is marked, and the second best, each with those tied with it; comparators are never marked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from merganser.lab.report.grid import Comparison, ResultGrid, TableLine, Values, common_units
from merganser.lab.report.rows import Domain
from merganser.lab.report.significance import Paired, holm, sign_flip
from merganser.lab.report.ties import RULE, and_tied, leaders, signed

DOMAIN_TITLES: dict[Domain, str] = {"in": "In-domain", "out": "Out-of-domain"}

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class TableCell:
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
    cells: tuple[TableCell, ...]
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
    numeric: tuple[bool, ...] = ()

    def is_numeric(self, column: int) -> bool:
        """Whether a column is set flush right."""
        return self.numeric[column] if self.numeric else True


def summarise(values: Values) -> TableCell:
    """Mean over seeds of the per-seed means, and the sample deviation of these."""
    by_seed: dict[int, list[float]] = {}
    for unit, value in sorted(values.items()):
        by_seed.setdefault(unit.seed, []).append(value.points)
    means = [statistics.fmean(points) for _, points in sorted(by_seed.items())]
    if not means:
        return TableCell()
    deviation = statistics.stdev(means) if len(means) > 1 else None
    cells = dict.fromkeys(cell for _, value in sorted(values.items()) for cell in value.cells)
    return TableCell(statistics.fmean(means), deviation, len(values), len(means), tuple(cells))


def compare(values: Mapping[TableLine, Values]) -> dict[TableLine, TableCell]:
    """A cell a method, over the units that the merges share; best and second best merge are marked.

    A method that lacks some of these units is averaged over those that it has and is ``partial``; it gets no mark.
    """
    common, full = common_units(values)
    cells, ranked = {}, {}
    for method, found in values.items():
        own = {unit: value for unit, value in found.items() if unit in common} or found
        cell = cells[method] = replace(summarise(own), partial=method not in full)
        if method.kind == "merge" and not cell.partial and cell.value is not None:
            ranked[method] = cell.value
    best = leaders(ranked) if len(ranked) > 1 else []
    second = leaders({method: value for method, value in ranked.items() if method not in best}) if best else []
    marks = {**dict.fromkeys(best, "best"), **dict.fromkeys(second, "second")}
    return {method: replace(cell, mark=marks.get(method, "")) for method, cell in cells.items()}


def compare_groups(
    grid: ResultGrid, values: Mapping[TableLine, Values], key: Callable[[Comparison], Group]
) -> dict[Group, dict[TableLine, TableCell]]:
    """Key → cells: a comparison of its own for all units with the same key, in the order of the grid's units."""

    def only(group: Group) -> dict[TableLine, Values]:
        return {method: {u: v for u, v in found.items() if key(u) == group} for method, found in values.items()}

    return {group: compare(only(group)) for group in dict.fromkeys(map(key, grid.units))}


def compare_paired(
    grid: ResultGrid, columns: Mapping[str, Mapping[TableLine, Values]]
) -> dict[tuple[str, TableLine], Paired]:
    """Every other merge against the reference, on the units that both have; p-values adjusted together (Holm)."""
    found: dict[tuple[str, TableLine], Paired] = {}
    for column, values in columns.items():
        base = values[grid.reference] if grid.reference else {}
        for method in grid.merges:
            units = sorted(set(base) & set(values[method]))
            if method != grid.reference and len(units) > 1:
                found[column, method] = sign_flip([values[method][u].points - base[u].points for u in units])
    adjusted = holm([paired.p for paired in found.values()])
    return {key: replace(found[key], adjusted=p) for key, p in zip(found, adjusted, strict=True)}


def significance_table(grid: ResultGrid, found: Mapping[tuple[str, TableLine], Paired], what: str) -> Table | None:
    """The comparisons behind the stars; None where there are none."""
    if grid.reference is None or not found:
        return None
    reference, lines = grid.reference.title, []
    for (column, method), paired in found.items():
        counts = paired.counts
        cells = (
            TableCell(value=paired.difference, text=signed(paired.difference)),
            TableCell(text=f"{counts.above} / {counts.below}{and_tied(counts.tied)}"),
            TableCell(value=paired.n, text=str(paired.n)),
            TableCell(value=paired.p, text=p_text(paired.p)),
            TableCell(value=paired.adjusted, text=p_text(paired.adjusted), stars=paired.marker),
        )
        lines.append(Line(method.title, cells, group=column))
    return Table(
        key="significance",
        title=f"Compared with {reference}",
        corner="Method",
        columns=("Difference", "Above / below", "n", "p", "p, Holm"),
        lines=tuple(lines),
        caption=f"Mean difference in points over {what}, how many are above and below {reference} or tied with "
        f"it ({RULE}), and p of a two-sided paired sign-flip test of the differences as they are, plain and adjusted "
        f"by Holm over the whole table ({len(found)} p). "
        "* p < 0.05, ** p < 0.01, where the mean difference is no tie.",
    )


def p_text(value: float) -> str:
    """A p-value as tables show it."""
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def method_lines(grid: ResultGrid, columns: Sequence[Mapping[TableLine, TableCell]]) -> tuple[Line, ...]:
    """Lines = methods, comparators in a group of their own."""
    lines = [
        Line(method.title, tuple(column.get(method, TableCell()) for column in columns), method.group)
        for method in grid.methods
    ]
    return tuple(line for line in lines if any(cell.value is not None or cell.text for cell in line.cells))


def spread(cells: Mapping[TableLine, TableCell], methods: Sequence[TableLine]) -> tuple[TableCell, ...]:
    """The cells of methods, in their order."""
    return tuple(cells.get(method, TableCell()) for method in methods)


def method_spans(methods: Sequence[TableLine]) -> tuple[tuple[str, int], ...]:
    """What stands above columns of methods: the comparators, then the merges."""
    return tuple((group, len(list(own))) for group, own in groupby(methods, key=lambda method: method.group))
