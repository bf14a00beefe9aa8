"""The page of a benchmark: the leaderboard, what it is compared with and at what cost, and the tests of each suite.

    write_leaderboard(Path("results/leaderboard"), {"markdown": Path("docs/leaderboard.md")})

Everything is made of the rows of the tests and of ``choice.json``; the same files give the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merganser.lab.benchmark.board import Board, read_board
from merganser.lab.benchmark.summary import standings
from merganser.lab.benchmark.tables import board_tables
from merganser.lab.report import write_forms
from merganser.lab.report.grid import INDIVIDUAL, ResultGrid
from merganser.lab.report.layouts import average_over_tests, on_tests
from merganser.lab.report.page import render_page
from merganser.lab.report.rows import Domain, render_rows
from merganser.lab.report.sections import Section, make_sections
from merganser.lab.report.tables import DOMAIN_TITLES, Table, compare, method_lines
from merganser.lab.report.text import markdown_table, render_csv
from merganser.methods.averages.simple import SIMPLE
from merganser.text import markdown

if TYPE_CHECKING:
    from merganser.lab.report.svg import Figure


def write_leaderboard(
    results: Path, outputs: Mapping[str, Path], *, against: str = "", overwrite: bool = False
) -> tuple[Table, ...]:
    """Read the results of a benchmark and write its page.

    Args:
        results: the folder of a benchmark's results.
        outputs: form → file: html, markdown, csv (of the suites' tests) or rows.
        against: name or title of the merge that the others are compared with; the best published one unless given.
        overwrite: see :func:`merganser.lab.report.write_report`.

    Returns:
        the tables of the leaderboard.

    Raises:
        UserError: see :func:`merganser.lab.report.write_report`.
    """
    found: list[Table] = []

    def make() -> Mapping[str, Callable[[], str]]:
        board = read_board(results, against)
        sections, tables = suite_sections(board), board_tables(board)
        found.extend(tables)
        return {
            "html": lambda: _html(board, tables, sections),
            "markdown": lambda: _markdown(board, tables, sections),
            "csv": lambda: render_csv(sections),
            "rows": lambda: render_rows(board.rows),
        }

    write_forms(results, outputs, make, overwrite=overwrite)
    return tuple(found)


def suite_sections(board: Board) -> list[Section]:
    """A section for each suite: each method on each test."""
    sections = []
    for section in make_sections(board.rows, SIMPLE.name):
        blocks = []
        for block in section.blocks:
            tables = tuple(_tests(block.grid, domain) for domain in block.grid.domains)
            blocks.append(replace(block, tables=tables))
        sections.append(replace(section, blocks=tuple(blocks), how=_HOW))
    return sections


_HOW = (
    "Scores are × 100, higher is better; means over seeds, ± their standard deviation (n − 1). Bold: the best merge "
    "and those tied with it; underlined: the second best after them.",
    "Individual: each model on its own in-domain test, and the mean of all models out-of-domain.",
    "Point at a number to see the cells it comes from; all are under “Provenance”.",
)


def _tests(grid: ResultGrid, domain: Domain) -> Table:
    tests = on_tests(grid, domain)
    columns = {**{test: compare(values) for test, values in tests.items()}, "Average": average_over_tests(grid, tests)}
    return Table(
        key=f"tests-{domain}",
        title=f"Tests, {DOMAIN_TITLES[domain].lower()}",
        corner="Method",
        columns=tuple(columns),
        lines=method_lines(grid, list(columns.values())),
        caption="Mean ± deviation over seeds.",
        main=True,
    )


def lead(board: Board) -> str:
    """What the leaderboard says in a sentence or two."""
    whole = [one for one in board.order if one.average is not None]
    if not whole:
        return "No method has rows on all suites yet."
    count = len(board.inside)
    first = whole[0]
    tied = [board.title(one.method) for one in whole if one.average == first.average]
    who = f"{tied[0]} comes first" if len(tied) == 1 else f"{', '.join(tied[:-1])} and {tied[-1]} tie for first place"
    told = f"{who} of {len(whole)} methods: {first.average:.1f} points on average over "
    told += "one suite" if count == 1 else f"{count} suites"
    told += "." if first.recovery is None else f", {100 * first.recovery:.1f} % of the individual models."
    by_name = {one.method: one for one in whole}
    for words, name in board.references.items():
        if name in by_name and name != first.method:
            told += f" {board.title(name)}, {words}, has {by_name[name].average:.1f}."
    gaps = [f"{board.suite(suite.name)}: {gap}" for suite in board.inside for gap in suite.grid.gaps()]
    if gaps:
        told += f" Only cells that all methods have are compared, and some are missing. {' '.join(gaps)}"
    return told


def recovery_plot(board: Board) -> Figure | None:
    """A line a method: its recovery on each suite, and their mean; None where there is one suite only."""
    from merganser.lab.report.dots import Row, painter
    from merganser.lab.report.svg import INK, SERIES, draw

    suites = [board.suite(suite.name) for suite in board.inside]
    rows = []
    for kind, names in (("comparator", board.comparators), ("merge", list(board.methods))):
        for one in standings(board.inside, names):
            if one.recovery is not None and one.method != INDIVIDUAL.name:
                shares = {board.suite(name): 100 * share for name, share in one.recoveries.items()}
                ours = kind == "merge" and board.methods[one.method].family == "ours"
                colour = INK if kind == "comparator" else SERIES[0] if ours else SERIES[2]
                rows.append(Row(board.title(one.method), shares, 100 * one.recovery, colour, kind))
    if len(suites) < 2 or not rows:
        return None
    metric = "recovery, % of the individual models"
    return draw(
        "board",
        "plot",
        title="From the worst suite to the best",
        caption="Recovery on each suite, in %. Each line spans a method’s worst and best suite; the large dot and the "
        "number are the mean.",
        alt=f"Dot plot of {metric}: " + "; ".join(f"{row.title} {row.average:.1f}" for row in rows),
        paint=painter(rows, suites, metric),
    )


def _html(board: Board, tables: Sequence[Table], sections: Sequence[Section]) -> str:
    return render_page(sections, "leaderboard.html.j2", lead=lead(board), tables=tables, figure=recovery_plot(board))


def _markdown(board: Board, tables: Sequence[Table], sections: Sequence[Section]) -> str:
    parts = ["# Leaderboard", markdown(lead(board)), f"{markdown(_HOW[0])} In Markdown the second best is in italics."]
    for table in tables:
        parts += [f"## {markdown(table.title)}", markdown_table(table), markdown(table.caption)]
    for section in sections:
        parts.append(f"## {markdown(section.title)}")
        parts.append("\n".join(f"- **{name}**: {markdown(value)}" for name, value in section.facts))
        parts += [f"> {markdown(notice)}" for notice in section.notices]
        for block in section.blocks:
            parts += [f"### {markdown(block.title)}"] if len(section.blocks) > 1 else []
            parts += [f"> {markdown(notice)}" for notice in block.notices]
            for table in block.tables:
                parts += [f"#### {markdown(table.title)}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"
