"""``merganser report``: tables and figures of an experiment's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merganser.cli.common import warn

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from merganser.lab.report.sections import Section

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("report")
@click.argument("results", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=_FILE,
    help="A .html, .md, .tex, .csv or .jsonl file.  [default: report.html beside the results]",
)
@click.option("--markdown", type=_FILE, metavar="FILE", help="Write the tables as Markdown, too.")
@click.option("--latex", type=_FILE, metavar="FILE", help="Write the tables as LaTeX (booktabs), too.")
@click.option("--csv", type=_FILE, metavar="FILE", help="Write the numbers as CSV, too: one a line.")
@click.option("--rows", type=_FILE, metavar="FILE.jsonl", help="Write the result rows as one file, too.")
@click.option(
    "--against",
    metavar="METHOD",
    help="The merge that others are compared with.  [default: simple; of a benchmark the best published one]",
)
@click.option("--overwrite", is_flag=True, help="Replace CSV and rows of an earlier report, too.")
def report_command(
    results: Path, output: Path | None, against: str | None, overwrite: bool, **also: Path | None
) -> None:
    """Write the report of RESULTS: what an experiment or a benchmark wrote, or a .json or .jsonl file of its rows.

    \b
    merganser report results -o report.html
    merganser report results/emotion-pairwise --markdown tables.md --csv numbers.csv
    merganser report results/emotion-pairwise -o tables.tex

    A page, Markdown or LaTeX file of an earlier report is replaced, unless somebody has edited it; CSV and rows with
    --overwrite. Any other file is never replaced.
    """
    from merganser.lab.benchmark.choice import is_benchmark
    from merganser.lab.report import form_of, write_report
    from merganser.lab.report.text import rich_table
    from merganser.methods.averages.simple import SIMPLE

    output = output or (results.parent if results.is_file() else results) / "report.html"
    outputs = {form_of(output): output}
    for form in ("markdown", "latex", "csv", "rows"):
        path = also[form]
        if path and form in outputs:
            raise click.UsageError(f"-o and --{form} both name a file for {form}; give one of them")
        if path:
            outputs[form] = path
    if is_benchmark(results):
        from merganser.lab.benchmark.page import write_leaderboard

        print_tables(rich_table(write_leaderboard(results, outputs, against=against or "", overwrite=overwrite)[0]))
    else:
        print_sections(write_report(results, outputs, against=against or SIMPLE.name, overwrite=overwrite))
    for path in outputs.values():
        warn(f"wrote {path}")
        click.echo(str(path))


def print_sections(sections: Sequence[Section]) -> None:
    """The main tables of a report on standard output."""
    from merganser.lab.report.text import terminal_tables

    print_tables(*terminal_tables(sections))


def print_tables(*tables: str | RichTable) -> None:
    """Tables of rich's and what stands between them, on standard output."""
    from rich.console import Console

    console = Console()
    for shown in tables:
        if isinstance(shown, str):
            console.print(shown)
        else:  # a table that is wider than the terminal is left to it, rather than cut
            wide = Console(width=1000).measure(shown).maximum
            Console(width=max(wide, console.width)).print(shown)
            console.print()
