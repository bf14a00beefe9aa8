"""Plots for the report: inline SVG whose colours are CSS variables, so that it follows the page's scheme.

matplotlib draws in placeholder colours, which are replaced by ``var(--…)``; text stays text, in the page's
font. The same rows give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from merganser.lab.old_report import Row

#: Placeholder -> CSS variable of the page.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--paper)",
    "#050505": "var(--individual)",
    "#060606": "var(--ensemble)",
    "#070707": "var(--method)",
}
_INK, _MUTED, _LINE, _PAPER, *_KINDS = _COLOURS
_KIND_COLOURS = dict(zip(("individual", "ensemble", "method"), _KINDS, strict=True))
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def dot_plot(rows: Sequence[Row], columns: Mapping[str, str], *, metric: str, wide: bool = True) -> str:
    """One line a row: a small mark for each column, a large dot and a number for the average.

    Args:
        rows: what to show, from top to bottom in the groups individual, ensemble, method.
        columns: key of the rows' scores -> heading.
        metric: the horizontal axis's label.
        wide: for a desktop page; otherwise a narrow one, with the row's name above its line.

    Returns:
        an ``<svg>`` element.
    """
    ordered = [row for kind in _KIND_COLOURS for row in rows if row.kind == kind]
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"merganser-{wide}", "font.size": 10.0}
    with matplotlib.rc_context(settings):
        height = (0.34 if wide else 0.52) * len(ordered) + (1.1 if wide else 1.5)
        figure = Figure(figsize=(7.6 if wide else 3.6, height))
        figure.patch.set_visible(False)
        axes = figure.add_axes(_margins(figure, ordered, wide))
        axes.patch.set_visible(False)
        for position, row in enumerate(ordered):
            _draw_row(axes, row, -position, columns, wide)
        _finish(axes, ordered, columns, metric, wide)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    label = f"{metric}: " + "; ".join(f"{row.name} {row.average:.1f}" for row in ordered)
    return _inline(stream.getvalue(), "wide" if wide else "narrow", label)


def _margins(figure: Figure, rows: Sequence[Row], wide: bool) -> tuple[float, float, float, float]:
    """Axes in figure shares: room for the names on the left, the legend above and the axis label below."""
    width, height = figure.get_size_inches()
    left = min(0.4 * width, 0.35 + 0.073 * max(len(row.name) for row in rows)) if wide else 0.12
    bottom, top, right = 0.55, (0.4 if wide else 0.6), (0.5 if wide else 0.45)
    return left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height


def _draw_row(axes: Axes, row: Row, y: int, columns: Mapping[str, str], wide: bool) -> None:
    colour = _KIND_COLOURS[row.kind]
    scores = [row.scores[column] for column in columns if column in row.scores]
    if scores:
        axes.plot(
            [min(scores), max(scores)], [y, y], color=_LINE, linewidth=2, solid_capstyle="round", zorder=2
        )
    for shape, column in zip(_cycle(len(columns)), columns, strict=True):
        if column in row.scores:
            axes.plot(
                row.scores[column],
                y,
                marker=shape,
                markersize=4.6,
                markerfacecolor=_PAPER,
                markeredgecolor=_MUTED,
                markeredgewidth=1,
                linestyle="none",
                zorder=3,
            )
    axes.plot(
        row.average,
        y,
        marker="o",
        markersize=8.5,
        color=colour,
        markeredgecolor=_PAPER,
        linestyle="none",
        zorder=4,
    )
    strong = "bold" if row.kind == "method" else "normal"
    axes.annotate(
        f"{row.average:.1f}",
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center_baseline",
        color=colour,
        fontweight=strong,
    )
    axes.annotate(
        row.name,
        (0, y),
        xycoords=("axes fraction", "data"),
        xytext=(-8, 0) if wide else (0, 9),
        textcoords="offset points",
        ha="right" if wide else "left",
        va="center_baseline" if wide else "baseline",
        color=_INK,
        fontweight=strong,
    )


def _finish(axes: Axes, rows: Sequence[Row], columns: Mapping[str, str], metric: str, wide: bool) -> None:
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_yticks([])
    axes.set_ylim(-len(rows) + (0.4 if wide else 0.6), 0.6 if wide else 0.85)
    values = [score for row in rows for score in (*row.scores.values(), row.average)]
    room = max(1.0, 0.04 * (max(values) - min(values)))
    axes.set_xlim(min(values) - room, max(values) + room)
    axes.tick_params(axis="x", length=0, labelcolor=_MUTED, pad=6)
    axes.grid(axis="x", color=_LINE, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel(metric, color=_MUTED, labelpad=6)
    for position in _group_borders(rows):
        axes.axhline(
            -position + 0.5, color=_LINE, linewidth=0.7, xmin=-1 if wide else 0, xmax=1.2, clip_on=False
        )
    handles = [
        axes.plot(
            [],
            [],
            marker=shape,
            markersize=4.6,
            markerfacecolor=_PAPER,
            markeredgecolor=_MUTED,
            linestyle="none",
            label=title,
        )[0]
        for shape, title in zip(_cycle(len(columns)), columns.values(), strict=True)
    ]
    handles.append(
        axes.plot([], [], marker="o", markersize=8, color=_INK, linestyle="none", label="average")[0]
    )
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        bbox_transform=axes.figure.transFigure,
        borderaxespad=0,
        ncols=len(handles) if wide else 3,
        frameon=False,
        borderpad=0,
        handletextpad=0.2,
        columnspacing=1.2,
        labelcolor=_MUTED,
        fontsize=9,
    )


def _group_borders(rows: Sequence[Row]) -> list[int]:
    return [index for index in range(1, len(rows)) if rows[index].kind != rows[index - 1].kind]


def _cycle(count: int) -> list[str]:
    return [_SHAPES[index % len(_SHAPES)] for index in range(count)]


def _inline(document: str, prefix: str, label: str) -> str:
    """Cut the ``<svg>`` out of matplotlib's document, make its ids unique and its colours the page's."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}" class="{prefix}"', 1
    )
