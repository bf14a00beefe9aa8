"""Figures of a grid: growth curves, one method against another, and the map of pairs.

Lines and marks differ in colour, marker and dash, so that they can be told apart in print and by everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from merganser.lab.report.dots import dot_plot
from merganser.lab.report.grid import ResultGrid, TableLine, Values
from merganser.lab.report.rows import Domain
from merganser.lab.report.svg import DOWN, INK, LINE, MARKERS, MUTED, PAPER, SERIES, STYLES, UP, Figure, draw
from merganser.lab.report.tables import DOMAIN_TITLES, compare_groups
from merganser.lab.report.ties import RULE, PairCounts, and_tied, sign, signed, tally
from merganser.methods.regression.regmean import REGMEAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: At most so many maps of pairs.
MOST_MAPS = 4
#: Sign of a difference → its colour.
_TINTS = {1: UP, 0: MUTED, -1: DOWN}
#: A curve: number of models, score, and its deviation over seeds where there are several.
Points = Sequence[tuple[int, float, float | None]]


def grid_figures(grid: ResultGrid, prefix: str) -> list[Figure]:
    """The figures that a grid's layout calls for; ``prefix`` is unique in the page."""
    if grid.layout == "greedy":
        found = [growth(grid, prefix)]
    elif grid.layout == "pairs":
        found = [scatter(grid, prefix), pair_map(grid, prefix)]
    else:
        found = [dot_plot(grid, domain, prefix, _metric(grid)) for domain in grid.domains]
    return [figure for figure in found if figure]


def growth(grid: ResultGrid, prefix: str) -> Figure | None:
    """Number of models against score, a line a method; None where there is a single number."""
    sizes = sorted({len(unit.contributors) for unit in grid.units})
    if len(sizes) < 2:
        return None
    curves: dict[Domain, dict[TableLine, Points]] = {}
    for domain in grid.domains:
        found = compare_groups(grid, grid.by_domain(domain), lambda unit: len(unit.contributors))
        points = {
            method: [
                (size, cell.value, cell.std)
                for size, cells in found.items()
                if (cell := cells[method]).value is not None
            ]
            for method in grid.methods
        }
        curves[domain] = {method: own for method, own in points.items() if own}

    def paint(wide: bool) -> Canvas:
        per_row = 4 if wide else 2
        legend = 0.24 * -(-len(grid.methods) // per_row)
        height = (3.1 if wide else 2.7 * len(curves)) + legend
        canvas = Canvas(figsize=(7.6 if wide else 3.6, height))
        room = 1 - (legend + 0.1) / height
        canvas.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, room), wspace=0.08, hspace=0.1))
        for ax, (domain, lines) in zip(_panels(canvas, len(curves), wide), curves.items(), strict=True):
            for method, own in reversed(lines.items()):
                _curve(ax, method, own, sizes, _look(grid, method))
            ax.set_title(DOMAIN_TITLES[domain])
            ax.set_xlabel("number of models merged")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.margins(x=0.06, y=0.08)
        handles = [Line2D([], [], label=method.title, **_look(grid, method)) for method in grid.methods]
        canvas.legend(
            handles=handles, bbox_to_anchor=(0.01, 1), ncols=per_row, labelcolor=INK, handlelength=3, columnspacing=1.5
        )
        return canvas

    told = "; ".join(
        f"{DOMAIN_TITLES[domain]}: "
        + ", ".join(
            f"{method.title} from {own[0][1]:.1f} at {own[0][0]} to {own[-1][1]:.1f} at {own[-1][0]} models"
            for method, own in lines.items()
        )
        for domain, lines in curves.items()
    )
    return draw(
        prefix,
        "growth",
        title="As more models are merged",
        caption=f"{_metric(grid)} (vertical) by how many models are merged, in the order given above. Each marked "
        "line is a merging method, its band one deviation over seeds; lines without marks are for comparison. A "
        "comparator known at one number of models only is drawn as a level line. Where a band is missing there is "
        "one seed.",
        alt=f"Line chart. {told}",
        paint=paint,
    )


def _panels(canvas: Canvas, count: int, wide: bool) -> Iterable[Axes]:
    """Axes with grid lines, side by side in a wide figure, and below each other in a narrow one."""
    axes: Any = canvas.subplots(1 if wide else count, count if wide else 1, squeeze=False).flatten()
    for ax in axes:
        ax.tick_params(pad=5)
        ax.grid(linewidth=0.6, zorder=0)
        ax.set_axisbelow(True)
    return axes


def _curve(ax: Axes, method: TableLine, points: Points, sizes: Sequence[int], look: Mapping[str, Any]) -> None:
    x, y = [size for size, *_ in points], [value for _, value, _ in points]
    bands = [(size, value - std, value + std) for size, value, std in points if std is not None]
    if method.kind == "merge" and len(bands) == len(points):
        at, low, high = zip(*bands, strict=True)
        ax.fill_between(at, low, high, color=look["color"], alpha=0.13, linewidth=0, zorder=1)
    elif method.kind != "merge" and len(points) == 1:
        x, y = [sizes[0], sizes[-1]], y * 2
    ax.plot(x, y, **look, zorder=3 if method.kind == "merge" else 2)


def _look(grid: ResultGrid, method: TableLine) -> dict[str, Any]:
    """Colour, dash and marker of a method's line."""
    if method.kind == "merge":
        index = grid.merges.index(method)
        return {
            "color": SERIES[index % len(SERIES)],
            "linestyle": STYLES[index % len(STYLES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5.5,
            "linewidth": 1.7,
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.6,
        }
    dash = (":", "--", "-.", "-")[grid.methods.index(method) % 4]  # comparators are the first of the methods
    return {"color": INK if method.kind == "multitask" else MUTED, "linestyle": dash, "linewidth": 1.3}


def _metric(grid: ResultGrid) -> str:
    return f"{grid.metrics[0]} × 100" if len(grid.metrics) == 1 else "key scores × 100"


def scatter(grid: ResultGrid, prefix: str) -> Figure | None:
    """A point a unit: the reference's score across, up that of RegMean, or of the last merge where there is none."""
    reference = grid.reference
    others = [method for method in grid.merges if method != reference]
    if reference is None or not others:
        return None
    other = next((m for m in others if m.name == REGMEAN.name and not m.searched), others[-1])
    points: dict[Domain, list[tuple[float, float]]] = {}
    for domain in grid.domains:
        values = grid.by_domain(domain)
        across, up = values[reference], values[other]
        points[domain] = [(across[unit].points, up[unit].points) for unit in across if unit in up]
    points = {domain: pairs for domain, pairs in points.items() if pairs}
    if not points:
        return None
    counts = {domain: tally(y - x for x, y in pairs) for domain, pairs in points.items()}

    def paint(wide: bool) -> Canvas:
        count = len(points)
        canvas = Canvas(figsize=(3.8 * count, 3.7) if wide else (3.6, 3.5 * count), layout="constrained")
        for ax, (domain, pairs) in zip(_panels(canvas, count, wide), points.items(), strict=True):
            _scatter(ax, pairs, counts[domain], _look(grid, other))
            ax.set_title(DOMAIN_TITLES[domain])
            ax.set_xlabel(reference.title, color=INK)
            ax.set_ylabel(other.title, color=INK)
        return canvas

    told = "; ".join(
        f"{DOMAIN_TITLES[d].lower()}: {of.above} of {len(points[d])} above, {of.below} below{and_tied(of.tied)}"
        for d, of in counts.items()
    )
    return draw(
        prefix,
        "scatter",
        title=f"{other.title} against {reference.title}",
        caption=f"A point is one pair and seed: {_metric(grid)} of {reference.title} across, of {other.title} up. "
        f"Above the diagonal {other.title} is better; the numbers in the corners count the points on each side "
        f"and those tied ({RULE}).",
        alt=f"Scatter plot of {other.title} against {reference.title} and the diagonal, {told}",
        paint=paint,
    )


def _scatter(ax: Axes, pairs: Sequence[tuple[float, float]], counts: PairCounts, look: Mapping[str, Any]) -> None:
    flat = [value for pair in pairs for value in pair]
    room = max(1.0, 0.06 * (max(flat) - min(flat)))
    low, high = min(flat) - room, max(flat) + room
    ax.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
    smaller = {"linestyle": "none", "markersize": 4.8, "markeredgewidth": 0.5}
    ax.plot(*zip(*pairs, strict=True), **{**look, **smaller}, zorder=3)
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    above = f"{counts.above} above{and_tied(counts.tied)}"
    ax.text(0.03, 0.97, above, transform=ax.transAxes, va="top", color=INK, fontsize=9)
    ax.text(0.97, 0.03, f"{counts.below} below", transform=ax.transAxes, ha="right", color=INK, fontsize=9)


def pair_map(grid: ResultGrid, prefix: str) -> Figure | None:
    """Contributors × contributors: a merge's score less the reference's, mean over seeds."""
    reference = grid.reference
    others = [method for method in grid.merges if method != reference][-MOST_MAPS:]
    if reference is None or not others or len(grid.contributors) < 3:
        return None
    values = {domain: grid.by_domain(domain) for domain in grid.domains}
    maps = {m: {d: _differences(grid, values[d][reference], values[d][m]) for d in grid.domains} for m in others}
    numbers = [abs(x) for of_method in maps.values() for found in of_method.values() for x in found.values()]
    if not numbers:
        return None
    most = max(1.0, *numbers)

    def paint(wide: bool) -> Canvas:
        across = min(len(others), 2) if wide else 1
        down = -(-len(others) // across)
        side = (7.6 if wide else 3.6) / (across if across > 1 or not wide else 1.6)
        canvas = Canvas(figsize=(side * across, side * 0.95 * down), layout="constrained")
        axes = canvas.subplots(down, across, squeeze=False).flatten()
        for ax in axes[len(others) :]:
            ax.set_axis_off()
        for ax, (method, of_method) in zip(axes, maps.items(), strict=False):
            _map(ax, grid, of_method, most)
            ax.set_title(f"{method.title} − {reference.title}")
        return canvas

    told = "; ".join(
        f"{method.title}, {DOMAIN_TITLES[domain].lower()}: "
        + ", ".join(f"{grid.show(a)} and {grid.show(b)} {signed(x)}" for (a, b), x in found.items())
        for method, of_method in maps.items()
        for domain, found in of_method.items()
    )
    where = "below the diagonal in-domain, above it out-of-domain"
    if len(grid.domains) == 1:
        where = DOMAIN_TITLES[grid.domains[0]].lower()
    return draw(
        prefix,
        "map",
        title="Pair by pair",
        caption=f"Difference to {reference.title} in points, mean over seeds, for every pair of contributors: {where}. "
        "The tint grows with the difference: blue and + where the method is better, orange and − where it is worse, "
        f"grey and 0.0 where they are tied ({RULE}).",
        alt=f"Map of pairs, difference to {reference.title}. {told}",
        paint=paint,
    )


def _differences(grid: ResultGrid, base: Values, own: Values) -> dict[tuple[str, str], float]:
    """(Later contributor, earlier contributor) → mean difference over the seeds that both have."""
    found: dict[tuple[str, str], list[float]] = {}
    for unit in base:
        if unit in own and len(unit.contributors) == 2:
            first, second = sorted(unit.contributors, key=grid.contributors.index)
            found.setdefault((second, first), []).append(own[unit].points - base[unit].points)
    return {pair: sum(differences) / len(differences) for pair, differences in found.items()}


def _map(ax: Axes, grid: ResultGrid, maps: Mapping[Domain, Mapping[tuple[str, str], float]], most: float) -> None:
    count = len(grid.contributors)

    def fill(row: int, column: int, colour: str, alpha: float) -> None:
        corner = (column - 0.48, row - 0.48)
        ax.add_patch(Rectangle(corner, 0.96, 0.96, facecolor=colour, alpha=alpha, linewidth=0))

    for domain, found in maps.items():
        for pair, value in found.items():
            row, column = map(grid.contributors.index, pair if domain == grid.domains[0] else reversed(pair))
            fill(row, column, _TINTS[sign(value)], round(0.06 + 0.54 * abs(value) / most, 3))
            size = 8.5 if count <= 6 else 6.5
            ax.text(column, row, signed(value), ha="center", va="center", color=INK, fontsize=size)
    for index in range(count):
        fill(index, index, LINE, 0.5)
    names = [grid.show(name) for name in grid.contributors]
    ax.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    ax.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    ax.set_yticks(range(count), names, fontsize=8.5)
    ax.tick_params(labelcolor=INK, pad=3)
    ax.spines[:].set_visible(False)
