"""A report as one HTML page that loads nothing and runs nothing; it follows light, dark and print."""

from __future__ import annotations

from collections.abc import Sequence

from merganser import __version__
from merganser.errors import UserError
from merganser.lab.old_report import page_environment
from merganser.lab.report.sections import Section, anchor
from merganser.lab.report.tables import Cell

#: A number over more cells names the first of them and counts the rest.
MOST_CELLS = 12


def render_page(sections: Sequence[Section], against: str) -> str:
    """The page.

    Args:
        sections: the experiments, at least one.
        against: the merge that figures compare others with.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    try:
        from merganser.lab.report.figures import grid_figures

        environment = page_environment("merganser.lab.report")
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed", mend="pip install 'merganser[report]'"
        ) from error
    environment.globals["trace"] = trace
    environment.filters["anchor"] = anchor
    figures = {
        block.key: grid_figures(block.grid, against, block.key)
        for section in sections
        for block in section.blocks
    }
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} experiments"
    return environment.get_template("report.html.j2").render(
        title=title, sections=sections, figures=figures, version=__version__
    )


def trace(cell: Cell) -> str:
    """What a number is made of: how many units and seeds, and the ids of the cells."""
    if not cell.cells:
        return ""
    rest = len(cell.cells) - MOST_CELLS
    ids = " ".join(cell.cells[:MOST_CELLS]) + (f" and {rest} more" if rest > 0 else "")
    seeds = f", {cell.seeds} seeds" if cell.seeds > 1 else ""
    return f"n = {cell.n}{seeds}; cells {ids}"
