"""A report as one HTML page that loads nothing and runs nothing; it follows light, dark and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser import __version__
from merganser.errors import require
from merganser.lab.report.sections import Section, anchor
from merganser.lab.report.tables import Cell, Table

#: A number over more cells names the first of them and counts the rest.
MOST_CELLS = 12


@dataclass(frozen=True)
class Note:
    """A part of the page that says what the rows do not: paragraphs, then shell commands, then tables."""

    title: str
    paragraphs: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Introduction:
    """What stands above the results, and the notes that follow them.

    Attributes:
        title: of the page.
        eyebrow: the line above it.
        lead: what came out, in a few sentences.
        notes: after the results of the last experiment.
    """

    title: str
    eyebrow: str = "merganser report"
    lead: str = ""
    notes: tuple[Note, ...] = ()


def render_page(sections: Sequence[Section], against: str, introduction: Introduction | None = None) -> str:
    """The page.

    Args:
        sections: the experiments, at least one.
        against: the merge that figures compare others with.
        introduction: the page's title and what is to be said beside the rows; by default the experiment's name.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    require("lab", "the page of a report", "jinja2", "matplotlib")
    import jinja2

    from merganser.lab.report.figures import grid_figures

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("merganser.lab.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["trace"] = trace
    environment.filters["anchor"] = anchor
    figures = {
        block.key: grid_figures(block.grid, against, block.key) for section in sections for block in section.blocks
    }
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} experiments"
    return environment.get_template("report.html.j2").render(
        introduction=introduction or Introduction(title), sections=sections, figures=figures, version=__version__
    )


def trace(cell: Cell) -> str:
    """What a number is made of: how many units and seeds, and the ids of the cells."""
    if not cell.cells:
        return ""
    rest = len(cell.cells) - MOST_CELLS
    ids = " ".join(cell.cells[:MOST_CELLS]) + (f" and {rest} more" if rest > 0 else "")
    seeds = f", {cell.seeds} seeds" if cell.seeds > 1 else ""
    return f"n = {cell.n}{seeds}; cells {ids}"
