"""The report of an experiment's results: tables in the paper's shape, figures, and where each number comes from.

merganser report RESULTS -o report.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from merganser.errors import UserError
from merganser.files import write_text
from merganser.lab.report.latex import render_latex
from merganser.lab.report.page import Introduction, Note, render_page
from merganser.lab.report.rows import ResultRow, read_rows, render_rows
from merganser.lab.report.sections import Section, make_sections
from merganser.lab.report.text import render_csv, render_markdown, terminal_tables

Form = Literal["html", "markdown", "latex", "csv", "rows"]
_FORMS: dict[str, Form] = {
    ".html": "html",
    ".htm": "html",
    ".md": "markdown",
    ".tex": "latex",
    ".csv": "csv",
    ".jsonl": "rows",
}

__all__ = [
    "Introduction",
    "Note",
    "ResultRow",
    "Section",
    "form_of",
    "make_sections",
    "read_rows",
    "render_csv",
    "render_latex",
    "render_markdown",
    "render_page",
    "render_rows",
    "terminal_tables",
    "write_report",
]


def form_of(path: Path) -> Form:
    """What to write into a file, by its ending.

    Raises:
        UserError: the ending is none of .html, .md, .tex, .csv and .jsonl.
    """
    try:
        return _FORMS[path.suffix.lower()]
    except KeyError:
        raise UserError(
            f"a report is no {path.suffix or 'file without an ending'!r}",
            where=path,
            mend="end the name in .html, .md, .tex, .csv or .jsonl (the rows themselves)",
        ) from None


def write_report(
    results: Path, outputs: Mapping[Form, Path], *, against: str = "simple"
) -> tuple[list[Section], list[Path]]:
    """Read results and write their report, in one or more forms; each file whole or not at all.

    Args:
        results: a results folder, the folder of one experiment, or a .json or .jsonl file of rows.
        outputs: form → file; a file that is there is replaced.
        against: name or title of the merge that the others are compared with.

    Returns:
        the sections of the report, and the files written.

    Raises:
        DataError: the rows cannot be read.
        RecipeError: no experiment has the merge ``against``.
        UserError: jinja2 or matplotlib is not installed.
        FileError: a file cannot be written.
    """
    rows = read_rows(results)
    sections = make_sections(rows, against)
    renderers: dict[Form, Callable[[], str]] = {
        "html": lambda: render_page(sections, against),
        "markdown": lambda: render_markdown(sections),
        "latex": lambda: render_latex(sections),
        "csv": lambda: render_csv(sections),
        "rows": lambda: render_rows(rows),
    }
    texts = {form: renderers[form]() for form in outputs}
    written = []
    for form, path in outputs.items():
        written.append(write_text(path, texts[form]))
    return sections, written
