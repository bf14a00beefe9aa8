"""The report of an experiment's results: tables in the paper's shape, figures, and where each number comes from.

merganser report RESULTS -o report.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from merganser.errors import ErrorCollector, UserError
from merganser.lab.report.latex import render_latex
from merganser.lab.report.outputs import marked, report_output, same_files
from merganser.lab.report.page import render_page
from merganser.lab.report.rows import read_rows, render_rows
from merganser.lab.report.sections import Section, make_sections
from merganser.lab.report.text import render_csv, render_markdown
from merganser.methods.averages.simple import SIMPLE

#: Ending of a file → the form of a report that it holds.
FORMS = {".html": "html", ".htm": "html", ".md": "markdown", ".tex": "latex", ".csv": "csv", ".jsonl": "rows"}


def form_of(path: Path) -> str:
    """What to write into a file, by its ending.

    Raises:
        UserError: the ending is none of .html, .md, .tex, .csv and .jsonl.
    """
    form = FORMS.get(path.suffix.lower())
    if form is None:
        what = f"a report is no {path.suffix or 'file without an ending'!r}"
        mend = "end the name in .html, .md, .tex, .csv or .jsonl (the rows themselves)"
        raise UserError(what, where=path, mend=mend)
    return form


def write_report(
    results: Path, outputs: Mapping[str, Path], *, against: str = SIMPLE.name, overwrite: bool = False
) -> list[Section]:
    """Read results and write their report, in one or more forms; each file whole or not at all.

    Args:
        results: a results folder, the folder of one experiment, or a .json or .jsonl file of rows.
        outputs: form → file; a page, Markdown or LaTeX file that is there is replaced where it is a report that nobody
            has edited.
        against: name or title of the merge that the others are compared with.
        overwrite: replace CSV and rows of an earlier report, too; nothing else is ever replaced.

    Returns:
        the sections of the report.

    Raises:
        DataError: the rows cannot be read.
        RecipeError: no experiment has the merge ``against``.
        UserError: jinja2 or matplotlib is not installed.
        FileError: a file cannot be written, or holds something else.
    """
    found: list[Section] = []

    def make() -> Mapping[str, Callable[[], str]]:
        rows = read_rows(results)
        found.extend(make_sections(rows, against))
        return {
            "html": lambda: render_page(found),
            "markdown": lambda: render_markdown(found),
            "latex": lambda: render_latex(found),
            "csv": lambda: render_csv(found),
            "rows": lambda: render_rows(rows),
        }

    write_forms(results, outputs, make, overwrite=overwrite)
    return found


def write_forms(
    results: Path,
    outputs: Mapping[str, Path],
    make: Callable[[], Mapping[str, Callable[[], str]]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a report in one or more forms.

    Args:
        results: what it is made of.
        outputs: form → file.
        make: reads the results and returns what renders each form; called once it is known that all can be written.
        overwrite: see :func:`write_report`.

    Raises:
        UserError: what ``make`` and the renderers raise, or a form that they do not have.
        FileError: a file cannot be written, or holds something else.
    """
    places = {form: report_output(path, form, results, overwrite=overwrite) for form, path in outputs.items()}
    errors = ErrorCollector()
    errors.add(*same_files(list(outputs.values())))
    for place in places.values():
        errors.add(*place.problems())
    errors.raise_all()
    renderers = make()
    for form in outputs:
        if form not in renderers:
            what, mend = f"this report has no form {form!r}", f"choose among {', '.join(renderers)}"
            raise UserError(what, where=outputs[form], mend=mend)
    texts = {form: marked(form, renderers[form]()) for form in outputs}  # all of them before the first is written
    for form, place in places.items():
        with place.new() as work:
            work.write_text(texts[form], encoding="utf-8")
