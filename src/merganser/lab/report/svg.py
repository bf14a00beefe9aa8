"""matplotlib figures as inline SVG: text stays text in the page's font, colours are the page's CSS variables.

matplotlib draws in placeholder colours; each becomes ``var(--…)``, so that a figure follows light, dark and print. The
same values give the same bytes. Every figure is drawn twice, for wide and narrow pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.figure import Figure as Canvas

INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
UP, DOWN = "#050505", "#060606"
#: One a merging method, repeated past the last.
SERIES = tuple(f"#{0x10 + index:02x}{0x10 + index:02x}{0x10 + index:02x}" for index in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1)))
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "paper",
    UP: "up",
    DOWN: "down",
    **{colour: f"s{index}" for index, colour in enumerate(SERIES)},
}


_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "merganser",
    "text.parse_math": False,  # names are not formulas
    "font.size": 9.5,
    "axes.linewidth": 0.7,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlecolor": MUTED,
    "axes.labelcolor": MUTED,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "legend.fontsize": 9,
    "legend.loc": "upper left",
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (("major.size", 0), ("labelcolor", MUTED))},
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page: two drawings of the same, and what a reader needs to read them."""

    key: str
    title: str
    caption: str
    wide: str
    narrow: str


def draw(prefix: str, key: str, *, title: str, caption: str, alt: str, paint: Callable[[bool], Canvas]) -> Figure:
    """A figure with its wide and its narrow ``<svg>``.

    Args:
        prefix: with ``key``, makes the ids of the drawings unique in the page.
        key: which of a grid's figures it is.
        title: stands above the figure.
        caption: stands below it.
        alt: what the figure says, for those who do not see it.
        paint: draws it, given whether it is wide.
    """
    drawn = {}
    with matplotlib.rc_context(_SETTINGS):
        for shape in ("wide", "narrow"):
            canvas = paint(shape == "wide")
            for patch in (canvas.patch, *(axes.patch for axes in canvas.axes)):
                patch.set_visible(False)
            stream = io.StringIO()
            canvas.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
            drawn[shape] = _inline(stream.getvalue(), f"{prefix}-{key}-{shape}", shape, alt)
    return Figure(key, title, caption, **drawn)


def _inline(document: str, prefix: str, shape: str, alt: str) -> str:
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    size = f' style="max-width:{float(width.group(1)) * 4 / 3:.0f}px"' if width else ""
    for dimension in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {dimension}="[^"]*"', r"\1", svg, count=1)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}" class="{shape}"{size}', 1)
