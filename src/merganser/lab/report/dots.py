"""The dot plot of a grid: a line for each model and method, a small mark for each test, a large dot for the average."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from merganser.lab.report.grid import ResultGrid
from merganser.lab.report.layouts import models_on_tests, on_tests
from merganser.lab.report.rows import Domain
from merganser.lab.report.svg import INK, LINE, MARKERS, MUTED, PAPER, SERIES, Figure, draw
from merganser.lab.report.tables import DOMAIN_TITLES, TableCell, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """A line of the plot: scores by test, their average, the colour of the dot and whether it is a merge."""

    title: str
    scores: Mapping[str, float]
    average: float
    colour: str
    group: str


def dot_plot(grid: ResultGrid, domain: Domain, prefix: str, metric: str) -> Figure | None:
    """How far every model and method spreads over the tests of a domain; None where there is one test only.

    Args:
        grid: the scores.
        domain: of the tests.
        prefix: unique in the page.
        metric: what the scores are, as the axis says it.
    """
    rows, tests = plot_rows(grid, domain), grid.tests(domain)
    if len(tests) < 2 or not rows:
        return None

    told = "; ".join(f"{row.title} {row.average:.1f}" for row in rows)
    alt = f"Dot plot, {DOMAIN_TITLES[domain].lower()} averages of {metric}: {told}"
    return draw(
        prefix,
        f"dots-{domain}",
        title="From the worst test to the best",
        caption=f"{DOMAIN_TITLES[domain]}, {metric}, mean over seeds. Each line spans the worst and the best test of a "
        "model or method; the large dot and the number are the average of the tests.",
        alt=alt,
        paint=painter(rows, tests, metric),
    )


def painter(rows: Sequence[Row], tests: Sequence[str], metric: str) -> Callable[[bool], Canvas]:
    """What draws lines of a dot plot, given whether it is wide.

    Args:
        rows: each with a score on every test.
        tests: in the order of the legend.
        metric: what the scores are, as the axis says it.
    """

    def paint(wide: bool) -> Canvas:
        width, per_row = (7.6, 6) if wide else (3.6, 3)
        legend = 0.24 * -(-(len(tests) + 1) // per_row)
        height = (0.34 if wide else 0.52) * len(rows) + 0.75 + legend
        # Room for the names on the left, the legend above, the label of the axis below.
        left = min(0.4 * width, 0.35 + 0.073 * max(len(row.title) for row in rows)) if wide else 0.12
        bottom, top, right = 0.55, legend + (0.1 if wide else 0.2), 0.5
        canvas = Canvas(figsize=(width, height))
        shares = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes = canvas.add_axes(shares)
        for position, row in enumerate(rows):
            _draw_row(axes, row, -position, tests, wide)
        _finish(axes, rows, metric, wide)
        handles = [Line2D([], [], label=test, **mark) for mark, test in zip(_marks(), tests, strict=False)]
        handles.append(Line2D([], [], marker="o", markersize=8, color=INK, linestyle="none", label="average"))
        spaces = {"handletextpad": 0.2, "columnspacing": 1.2}
        canvas.legend(handles=handles, bbox_to_anchor=(0, 1), ncols=per_row, labelcolor=MUTED, **spaces)
        return canvas

    return paint


def plot_rows(grid: ResultGrid, domain: Domain) -> list[Row]:
    """Single models, where each is scored on every test, then the comparators, then the merges."""
    alone = models_on_tests(grid) if domain == "in" else {}
    found = [_row(f"{grid.show(name)} alone", cells, MUTED, "model") for name, cells in alone.items()]
    scores = {test: compare(values) for test, values in on_tests(grid, domain).items()}
    for method in grid.methods:
        merge = method.kind == "merge"
        colour = SERIES[grid.merges.index(method) % len(SERIES)] if merge else INK
        cells = {test: of_test[method] for test, of_test in scores.items()}
        found.append(_row(method.title, cells, colour, "merge" if merge else "comparator"))
    return [row for row in found if row]


def _row(title: str, cells: Mapping[str, TableCell], colour: str, group: str) -> Row | None:
    """A line of the plot; None where a test is missing, since its average would be of other tests."""
    scores = {test: cell.value for test, cell in cells.items() if cell.value is not None}
    if not scores or len(scores) < len(cells):
        return None
    return Row(title, scores, statistics.fmean(scores.values()), colour, group)


def _draw_row(axes: Axes, row: Row, y: int, tests: Sequence[str], wide: bool) -> None:
    ends = [min(row.scores.values()), max(row.scores.values())]
    axes.plot(ends, [y, y], color=LINE, linewidth=2, solid_capstyle="round", zorder=2)
    for mark, test in zip(_marks(), tests, strict=False):
        axes.plot(row.scores[test], y, zorder=3, **mark)
    axes.plot(row.average, y, marker="o", markersize=8.5, color=row.colour, markeredgecolor=PAPER, zorder=4)
    weight = "bold" if row.group == "merge" else "normal"  # merges stand out
    common: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "fontweight": weight,
    }
    number = f"{row.average:.1f}"
    axes.annotate(number, (1, y), xytext=(6, 0), va="center_baseline", color=row.colour, **common)
    beside: dict[str, Any] = {"xytext": (-8, 0), "ha": "right", "va": "center_baseline"}
    above: dict[str, Any] = {"xytext": (0, 9), "ha": "left", "va": "baseline"}
    axes.annotate(row.title, (0, y), color=INK, **common, **(beside if wide else above))


def _marks() -> Iterator[dict[str, Any]]:
    """The small marks of the tests, one after the other."""
    common = {"markersize": 4.6, "markerfacecolor": PAPER, "markeredgecolor": MUTED, "linestyle": "none"}
    return ({"marker": marker, **common} for marker in cycle(MARKERS))


def _finish(axes: Axes, rows: Sequence[Row], metric: str, wide: bool) -> None:
    """Axis, grid lines, and rules between models, comparators and merges."""
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.set_ylim(-len(rows) + (0.4 if wide else 0.6), 0.6 if wide else 0.85)
    axes.tick_params(axis="x", pad=6)
    axes.grid(axis="x", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel(metric, labelpad=6)
    for index, (one, other) in enumerate(pairwise(rows)):
        if one.group != other.group:
            axes.axhline(-index - 0.5, color=LINE, linewidth=0.7, xmin=-1 if wide else 0, xmax=1.2, clip_on=False)
