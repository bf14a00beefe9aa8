"""From plain result rows to a table for the terminal, ``results.json`` and a self-contained HTML page.

    rows = [Row(name="RegMean", kind="method", scores={"tweets": 58.1, "nyt": 49.0}), ...]
    write_results(Path("results.json"), rows, metric="macro-F1 × 100")
    Path("report.html").write_text(render_html(Report(title="…", columns={"tweets": "Tweets", ...},
    rows=rows)))

Nothing here knows an experiment: every number and every sentence comes with the rows. The page loads nothing,
runs no script, and follows the reader's light or dark scheme.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from rich import box
from rich.table import Table as RichTable

from merganser.errors import DataError, UserError

Kind = Literal["individual", "method", "ensemble"]
#: Order and headings of the groups in tables and plots.
GROUPS: dict[Kind, str] = {
    "individual": "Specialists",
    "ensemble": "Ensemble",
    "method": "Merged into one model",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Frozen):
    """The scores of one model, ensemble or merging method.

    ``scores`` maps column to score, in the unit of the report's metric; ``average`` is their mean unless
    given; ``note`` explains the row to a reader.
    """

    name: str
    kind: Kind
    scores: dict[str, float]
    average: float = 0.0
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_average(cls, values: Any) -> Any:
        if isinstance(values, dict) and "average" not in values and values.get("scores"):
            values = {**values, "average": statistics.fmean(values["scores"].values())}
        return values


class Table(_Frozen):
    """A table of a section; ``numeric`` lists the columns (by index) that are set flush right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    numeric: tuple[int, ...] = ()
    code: tuple[int, ...] = ()


class Section(_Frozen):
    """A part of the report: paragraphs, then shell commands, then tables; ``folded`` ones open on a click."""

    title: str
    paragraphs: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: bool = False


class Report(_Frozen):
    """All that the page shows.

    ``columns`` maps the keys of the rows' scores to headings; ``lead`` is the sentence under the title;
    ``notes`` stand under the result table.
    """

    title: str
    columns: dict[str, str]
    rows: tuple[Row, ...]
    eyebrow: str = "merganser"
    lead: str = ""
    metric: str = "score"
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    footer: str = ""


def write_results(path: Path, rows: Sequence[Row], **more: Any) -> Path:
    """Write ``{"rows": [{"name", "kind", "scores", "average"}, …], **more}``, whole or not at all."""
    listed = [row.model_dump(include={"name", "kind", "scores", "average"}) for row in rows]
    return write_text(path, json.dumps({"rows": listed, **more}, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> tuple[Row, ...]:
    """The rows of a ``results.json``.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    try:
        return tuple(Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"not a results file: {error}", where=path, mend="give a results.json") from error


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp's is private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def best_scores(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, float]:
    """The highest score of a merging method in each column, and in ``"average"``."""
    methods = [row for row in rows if row.kind == "method"]
    best = {c: max((r.scores[c] for r in methods if c in r.scores), default=float("nan")) for c in columns}
    return {**best, "average": max((row.average for row in methods), default=float("nan"))}


def results_table(rows: Sequence[Row], columns: Mapping[str, str], *, metric: str = "score") -> RichTable:
    """The result table for a terminal; the best method of each column is bold."""
    table = RichTable(
        title=metric,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="dim",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for heading in (*columns.values(), "average"):
        table.add_column(heading, justify="right")
    best = best_scores(rows, list(columns))
    groups = [[row for row in rows if row.kind == kind] for kind in GROUPS]
    for group in filter(None, groups):
        for row in group:
            cells = [_rich(row, row.scores.get(column), best[column]) for column in columns]
            table.add_row(row.name, *cells, _rich(row, row.average, best["average"]))
        table.add_section()
    return table


def _rich(row: Row, score: float | None, best: float) -> str:
    shown = show(score)
    return f"[bold]{shown}[/bold]" if row.kind == "method" and score == best else shown


def show(score: float | None) -> str:
    """A score as every table writes it: one decimal, a dash where there is none."""
    return "–" if score is None else f"{score:.1f}"


def page_environment(package: str) -> Any:
    """The jinja2 environment of a package's ``templates``: escaped, and strict about what is undefined.

    Raises:
        ImportError: jinja2 is not installed.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render_html(report: Report) -> str:
    """The report as one HTML page that needs nothing else.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    try:
        from merganser.lab.plots import dot_plot

        environment = page_environment("merganser.lab")
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed", mend="pip install 'merganser[report]'"
        ) from error
    environment.filters["show"] = show
    groups = [
        (kind, title, [row for row in report.rows if row.kind == kind]) for kind, title in GROUPS.items()
    ]
    values = [score for row in report.rows for score in (*row.scores.values(), row.average)]
    return environment.get_template("report.html.j2").render(
        report=report,
        groups=[group for group in groups if group[2]],
        best=best_scores(report.rows, list(report.columns)),
        plots={
            "wide": dot_plot(report.rows, report.columns, metric=report.metric, wide=True) if values else "",
            "narrow": dot_plot(report.rows, report.columns, metric=report.metric, wide=False)
            if values
            else "",
        },
    )
