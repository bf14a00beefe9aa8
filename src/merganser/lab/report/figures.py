"""Figures of a grid: growth curves, one method against another, and the map of pairs.

Lines and marks differ in colour, marker and dash, so that they can be told apart in print and by everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from merganser.lab.report.dots import dot_plot
from merganser.lab.report.grid import Grid, Method, Values
from merganser.lab.report.rows import Domain
from merganser.lab.report.svg import DOWN, INK, LINE, MARKERS, MUTED, PAPER, SERIES, STYLES, UP, Figure, draw
from merganser.lab.report.tables import DOMAIN_TITLES, Cell, compare, find_method
from merganser.lab.report.ties import RULE, Tally, and_tied, sign, signed, tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: At most so many maps of pairs.
MOST_MAPS = 4
#: Sign of a difference → its colour.
_TINTS = {1: UP, 0: MUTED, -1: DOWN}


def grid_figures(grid: Grid, against: str, prefix: str) -> list[Figure]:
    """The figures that a grid's layout calls for.

    Args:
        grid: the scores.
        against: the merge that others are compared with.
        prefix: unique in the page.
    """
    if grid.layout == "greedy":
        found = [growth(grid, prefix)]
    elif grid.layout == "pairs":
        found = [scatter(grid, against, prefix), pair_map(grid, against, prefix)]
    else:
        found = [dot_plot(grid, domain, prefix, _metric(grid)) for domain in grid.domains]
    return [figure for figure in found if figure]


def growth(grid: Grid, prefix: str) -> Figure | None:
    """Number of models against score, a line a method; None where there is a single number."""
    sizes = sorted({len(unit.contributors) for unit in grid.units})
    if len(sizes) < 2:
        return None
    curves: dict[Domain, dict[Method, list[tuple[int, Cell]]]] = {}
    for domain in grid.domains:
        values = grid.by_domain(domain, grid.units)
        curves[domain] = {method: [] for method in grid.methods}
        for size in sizes:
            of_size = {
                m: {u: v for u, v in found.items() if len(u.contributors) == size} for m, found in values.items()
            }
            for method, cell in compare(of_size).items():
                if cell.value is not None:
                    curves[domain][method].append((size, cell))

    def paint(wide: bool) -> Canvas:
        count = len(curves)
        legend = _legend_rows(grid.methods, wide)
        height = (3.1 if wide else 2.7 * count) + 0.24 * legend
        canvas = Canvas(figsize=(7.6 if wide else 3.6, height))
        room = 1 - (0.24 * legend + 0.1) / height
        canvas.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, room), wspace=0.08, hspace=0.1))
        axes = canvas.subplots(1 if wide else count, count if wide else 1, squeeze=False).flatten()
        for ax, (domain, lines) in zip(axes, curves.items(), strict=True):
            for method in reversed(grid.methods):
                _curve(ax, grid, method, lines[method], sizes)
            ax.set_title(DOMAIN_TITLES[domain], loc="left", fontsize=9.5, color=MUTED)
            ax.set_xlabel("number of models merged", color=MUTED)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.margins(x=0.06, y=0.08)
            _quiet(ax)
        _legend(canvas, grid, wide)
        return canvas

    told = "; ".join(
        f"{DOMAIN_TITLES[domain]}: "
        + ", ".join(
            f"{m.title} from {points[0][1].value:.1f} at {points[0][0]} to {points[-1][1].value:.1f} "
            f"at {points[-1][0]} models"
            for m, points in lines.items()
            if points
        )
        for domain, lines in curves.items()
    )
    wide, narrow = draw(f"{prefix}-growth", f"Line chart. {told}", paint)
    return Figure(
        key="growth",
        title="As more models are merged",
        caption=f"{_metric(grid)} (vertical) by how many models are merged, in the order given above. Each marked "
        "line is a merging method, its band one deviation over seeds; lines without marks are for comparison. A "
        "comparator known at one number of models only is drawn as a level line. Where a band is missing there is "
        "one seed.",
        wide=wide,
        narrow=narrow,
    )


def _curve(ax: Axes, grid: Grid, method: Method, points: Sequence[tuple[int, Cell]], sizes: Sequence[int]) -> None:
    if not points:
        return
    x = [size for size, _ in points]
    y = [cell.value or 0.0 for _, cell in points]
    if method.kind != "merge" and len(points) == 1:
        x, y = [sizes[0], sizes[-1]], y * 2
    ax.plot(x, y, **_look(grid, method), zorder=3 if method.kind == "merge" else 2)
    if method.kind == "merge" and all(cell.std is not None for _, cell in points):
        low = [(cell.value or 0) - (cell.std or 0) for _, cell in points]
        high = [(cell.value or 0) + (cell.std or 0) for _, cell in points]
        ax.fill_between(x, low, high, color=_look(grid, method)["color"], alpha=0.13, linewidth=0, zorder=1)


def _look(grid: Grid, method: Method) -> dict[str, Any]:
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
    others = [m for m in grid.methods if m.kind != "merge"]
    return {
        "color": INK if method.kind == "multitask" else MUTED,
        "linestyle": (":", "--", "-.", "-")[others.index(method) % 4],
        "linewidth": 1.3,
    }


def _legend_rows(methods: Sequence[Method], wide: bool) -> int:
    per_row = 4 if wide else 2
    return -(-len(methods) // per_row)


def _legend(canvas: Canvas, grid: Grid, wide: bool) -> None:
    handles = [Line2D([], [], label=method.title, **_look(grid, method)) for method in grid.methods]
    canvas.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.01, 1),
        borderaxespad=0,
        ncols=4 if wide else 2,
        frameon=False,
        labelcolor=INK,
        handlelength=3,
        columnspacing=1.5,
        fontsize=9,
    )


def _quiet(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LINE)
    ax.tick_params(length=0, labelcolor=MUTED, pad=5)
    ax.grid(color=LINE, linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)


def _metric(grid: Grid) -> str:
    return f"{grid.metrics[0]} × 100" if len(grid.metrics) == 1 else "key scores × 100"


def _focus(grid: Grid, against: str) -> tuple[Method, Method] | None:
    """The reference merge, and the one to hold against it: RegMean, else the last merge."""
    reference = find_method(grid, against)
    others = [method for method in grid.merges if method != reference]
    if reference is None or not others:
        return None
    return reference, next((m for m in others if m.name == "regmean" and not m.searched), others[-1])


def scatter(grid: Grid, against: str, prefix: str) -> Figure | None:
    """A point a unit: the reference's score across, the other method's up."""
    chosen = _focus(grid, against)
    if chosen is None:
        return None
    reference, other = chosen
    points: dict[Domain, list[tuple[float, float]]] = {}
    for domain in grid.domains:
        values = grid.by_domain(domain, grid.units)
        both = [unit for unit in grid.units if unit in values[reference] and unit in values[other]]
        if both:
            points[domain] = [(values[reference][u].points, values[other][u].points) for u in both]
    if not points:
        return None
    counts = {domain: tally(y - x for x, y in pairs) for domain, pairs in points.items()}

    def paint(wide: bool) -> Canvas:
        count = len(points)
        size = (3.8 * count, 3.7) if wide else (3.6, 3.5 * count)
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.subplots(1 if wide else count, count if wide else 1, squeeze=False).flatten()
        for ax, (domain, pairs) in zip(axes, points.items(), strict=True):
            _scatter(ax, pairs, domain, counts[domain], _look(grid, other))
            ax.set_xlabel(reference.title, color=INK)
            ax.set_ylabel(other.title, color=INK)
        return canvas

    told = "; ".join(
        f"{DOMAIN_TITLES[d].lower()}: {of.above} of {len(points[d])} above, {of.below} below{and_tied(of.tied)}"
        for d, of in counts.items()
    )
    alt = f"Scatter plot of {other.title} against {reference.title} and the diagonal, {told}"
    wide, narrow = draw(f"{prefix}-scatter", alt, paint)
    return Figure(
        key="scatter",
        title=f"{other.title} against {reference.title}",
        caption=f"A point is one pair and seed: {_metric(grid)} of {reference.title} across, of {other.title} up. "
        f"Above the diagonal {other.title} is better; the numbers in the corners count the points on each side "
        f"and those tied ({RULE}).",
        wide=wide,
        narrow=narrow,
    )


def _scatter(
    ax: Axes, pairs: Sequence[tuple[float, float]], domain: Domain, counts: Tally, look: Mapping[str, Any]
) -> None:
    flat = [value for pair in pairs for value in pair]
    room = max(1.0, 0.06 * (max(flat) - min(flat)))
    low, high = min(flat) - room, max(flat) + room
    ax.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
    xs, ys = zip(*pairs, strict=True)
    ax.plot(
        xs,
        ys,
        linestyle="none",
        marker=look["marker"],
        markersize=4.8,
        color=look["color"],
        markeredgecolor=PAPER,
        markeredgewidth=0.5,
        zorder=3,
    )
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_title(DOMAIN_TITLES[domain], loc="left", fontsize=9.5, color=MUTED)
    above = f"{counts.above} above{and_tied(counts.tied)}"
    ax.text(0.03, 0.97, above, transform=ax.transAxes, va="top", color=INK, fontsize=9)
    ax.text(0.97, 0.03, f"{counts.below} below", transform=ax.transAxes, ha="right", color=INK, fontsize=9)
    _quiet(ax)


def pair_map(grid: Grid, against: str, prefix: str) -> Figure | None:
    """Contributors × contributors: a merge's score less the reference's, mean over seeds."""
    reference = find_method(grid, against)
    others = [method for method in grid.merges if method != reference][-MOST_MAPS:]
    if reference is None or not others or len(grid.contributors) < 3:
        return None
    values = {domain: grid.by_domain(domain, grid.units) for domain in grid.domains}
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
            title = f"{method.title} − {reference.title}"
            ax.set_title(title, loc="left", fontsize=9.5, color=MUTED)
        return canvas

    told = "; ".join(
        f"{method.title}, {DOMAIN_TITLES[domain].lower()}: "
        + ", ".join(f"{grid.show(a)} and {grid.show(b)} {signed(x)}" for (a, b), x in found.items())
        for method, of_method in maps.items()
        for domain, found in of_method.items()
    )
    where = (
        "below the diagonal in-domain, above it out-of-domain"
        if len(grid.domains) == 2
        else f"{DOMAIN_TITLES[grid.domains[0]].lower()}"
    )
    wide, narrow = draw(f"{prefix}-map", f"Map of pairs, difference to {reference.title}. {told}", paint)
    return Figure(
        key="map",
        title="Pair by pair",
        caption=f"Difference to {reference.title} in points, mean over seeds, for every pair of contributors: {where}. "
        "The tint grows with the difference: blue and + where the method is better, orange and − where it is worse, "
        f"grey and 0.0 where they are tied ({RULE}).",
        wide=wide,
        narrow=narrow,
    )


def _differences(grid: Grid, base: Values, own: Values) -> dict[tuple[str, str], float]:
    """(Later contributor, earlier contributor) → mean difference over the seeds that both have."""
    place = {name: index for index, name in enumerate(grid.contributors)}
    found: dict[tuple[str, str], list[float]] = {}
    for unit in grid.units:
        if unit in base and unit in own and len(unit.contributors) == 2:
            first, second = sorted(unit.contributors, key=lambda name: place[name])
            found.setdefault((second, first), []).append(own[unit].points - base[unit].points)
    return {pair: sum(all_) / len(all_) for pair, all_ in found.items()}


def _map(ax: Axes, grid: Grid, maps: Mapping[Domain, Mapping[tuple[str, str], float]], most: float) -> None:
    count = len(grid.contributors)
    place = {name: index for index, name in enumerate(grid.contributors)}
    names = [grid.show(name) for name in grid.contributors]
    for index, (_, found) in enumerate(sorted(maps.items())):
        for (second, first), value in found.items():
            row, column = (place[second], place[first]) if index == 0 else (place[first], place[second])
            ax.add_patch(
                Rectangle(
                    (column - 0.48, row - 0.48),
                    0.96,
                    0.96,
                    facecolor=_TINTS[sign(value)],
                    alpha=round(0.06 + 0.54 * abs(value) / most, 3),
                    linewidth=0,
                )
            )
            ax.text(
                column, row, signed(value), ha="center", va="center", color=INK, fontsize=8.5 if count <= 6 else 6.5
            )
    for index in range(count):
        ax.add_patch(Rectangle((index - 0.48, index - 0.48), 0.96, 0.96, facecolor=LINE, alpha=0.5, linewidth=0))
    ax.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    ax.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    ax.set_yticks(range(count), names, fontsize=8.5)
    ax.tick_params(length=0, labelcolor=INK, pad=3)
    for spine in ax.spines.values():
        spine.set_visible(False)
