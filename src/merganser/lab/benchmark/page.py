"""The page of a benchmark: the leaderboard, what it is compared with and at what cost, and the tests of each suite.

    write_leaderboard(Path("results/leaderboard"), {"markdown": Path("docs/leaderboard.md")})

Everything is made of the rows of the tests and of ``choice.json``; the same files give the same page.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from merganser.errors import DataError, RecipeError, did_you_mean
from merganser.lab.benchmark.choice import Choice, ChosenMethod, read_choice
from merganser.lab.benchmark.config import options_text
from merganser.lab.benchmark.run import TEST
from merganser.lab.benchmark.summary import Difference, Standing, SuiteScores, differences, standings, suite_scores
from merganser.lab.grid.cells import TITLES
from merganser.lab.report import write_forms
from merganser.lab.report.grid import INDIVIDUAL, ResultGrid
from merganser.lab.report.layouts import average_over_tests, on_tests
from merganser.lab.report.page import render_page
from merganser.lab.report.rows import Domain, ResultRow, read_rows, render_rows
from merganser.lab.report.sections import Section, make_sections
from merganser.lab.report.significance import EXACT, MARKERS, SAMPLES
from merganser.lab.report.tables import DOMAIN_TITLES, Line, Table, TableCell, compare, method_lines, p_text
from merganser.lab.report.text import markdown_table, render_csv
from merganser.lab.report.ties import leaders, signed
from merganser.methods import METHODS
from merganser.methods.auto import AUTO
from merganser.methods.averages.simple import SIMPLE
from merganser.text import markdown

if TYPE_CHECKING:
    from merganser.lab.report.svg import Figure

_FREE = "the best published one without statistics"
COMPARED, MERGED = "For comparison", "Merged into one model"


@dataclass(frozen=True)
class Board:
    """What a leaderboard says.

    Attributes:
        choice: of each method's options.
        rows: of the chosen candidates and the comparators, on tests.
        against: title of the method that the others are compared with; empty for the best published one.
    """

    choice: Choice
    rows: tuple[ResultRow, ...]
    against: str = ""

    @cached_property
    def methods(self) -> dict[str, ChosenMethod]:
        """What rows call a method → the method; those that have rows."""
        there = {row.method for row in self.rows}
        return {one.chosen.name: one for one in self.choice.methods if one.chosen.name in there}

    @cached_property
    def comparators(self) -> list[str]:
        """The comparators that have rows."""
        return [kind for kind in TITLES if any(row.kind == kind for row in self.rows)]

    def title(self, name: str) -> str:
        """What tables call a method."""
        return TITLES[name] if name in TITLES else self.methods[name].title

    @cached_property
    def inside(self) -> list[SuiteScores]:
        """In-domain scores."""
        return suite_scores(self.rows)

    @cached_property
    def outside(self) -> list[SuiteScores]:
        """Out-of-domain scores, of the suites that have such tests."""
        return suite_scores(self.rows, "out")

    @cached_property
    def order(self) -> list[Standing]:
        """The methods, the best first."""
        return standings(self.inside, list(self.methods))

    @cached_property
    def differences(self) -> dict[str, list[Difference]]:
        """What a reference is → the methods that are compared with it, the best first."""
        names = [one.method for one in self.order]
        free = [name for name in names if self.methods[name].statistics is None]
        return {
            words: differences(self.inside, free if words == _FREE else names, reference)
            for words, reference in self.references.items()
        }

    def suite(self, name: str) -> str:
        """What tables call a suite: its name without what the names of all suites begin with."""
        return name[self._shared :]

    @cached_property
    def _shared(self) -> int:
        words = zip(*(name.split("-")[:-1] for name in self.choice.suites), strict=False)
        alike = takewhile(lambda same: len(set(same)) == 1, words)
        return sum(len(same[0]) + 1 for same in alike) if len(self.choice.suites) > 1 else 0

    @cached_property
    def references(self) -> dict[str, str]:
        """What a reference is → what rows call it: the best published method, and the best without statistics."""
        if self.against:
            name = self.against.lower()
            known = {n: one for n, one in self.methods.items() if name in (one.title.lower(), one.method, n.lower())}
            if not known:
                valid = {one.method for one in self.methods.values()}
                what = f"no merge {self.against!r} in these results"
                raise RecipeError(what, where="--against", mend=did_you_mean(self.against, valid))
            return {"as asked for": next(iter(known))}
        whole = [one.method for one in self.order if one.average is not None]
        published = [name for name in whole if self.methods[name].family == "published"]
        free = [name for name in published if self.methods[name].statistics is None]
        found = {"the best published method": published[:1], _FREE: free[:1]}
        first = {names[0]: words for words, names in reversed(found.items()) if names}  # one that is both is named once
        return {words: name for name, words in reversed(first.items())}


def read_board(results: Path, against: str = "") -> Board:
    """The leaderboard of a benchmark's results.

    Raises:
        DataError: rows or the choice cannot be read, or there are no rows of what was chosen.
    """
    choice = read_choice(results)
    names = {method.chosen.name for method in choice.methods}
    rows = tuple(
        row
        for row in read_rows(results / TEST)
        if row.experiment in choice.suites and row.split == "test" and (row.kind != "merge" or row.method in names)
    )
    if not any(row.kind == "merge" for row in rows):
        what = "no rows of the chosen methods on the tests"
        raise DataError(what, where=results / TEST, mend="run the benchmark to its end")
    return Board(choice, rows, against)


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


def board_tables(board: Board) -> tuple[Table, ...]:
    """The tables of the leaderboard, the main one first."""
    tables = [
        _main(board),
        _recoveries(board),
        _compared(board),
        *([_out_of_domain(board)] if board.outside else []),
        _costs(board),
        _candidates(board),
    ]
    return tuple(table for table in tables if table.lines)


def _lines(
    board: Board, cells: Callable[[Standing], Sequence[TableCell]], suites: Sequence[SuiteScores]
) -> tuple[Line, ...]:
    """A line a comparator and a line a method, the best first."""
    beside = [Line(TITLES[one.method], tuple(cells(one)), COMPARED) for one in standings(suites, board.comparators)]
    found = [Line(board.title(one.method), tuple(cells(one)), MERGED) for one in standings(suites, list(board.methods))]
    return (*beside, *_marked(found))


def _marked(lines: Sequence[Line]) -> list[Line]:
    """Lines whose best and second best number of each column are marked."""
    columns = list(zip(*(line.cells for line in lines), strict=True))
    marked = []
    for column in columns:
        values = {
            place: cell.value for place, cell in enumerate(column) if cell.value is not None and cell.text is None
        }
        best = leaders(values) if len(values) > 1 else []
        second = leaders({place: value for place, value in values.items() if place not in best}) if best else []
        marks = {**dict.fromkeys(best, "best"), **dict.fromkeys(second, "second")}
        marked.append([replace(cell, mark=marks.get(place, "")) for place, cell in enumerate(column)])
    return [replace(line, cells=cells) for line, cells in zip(lines, zip(*marked, strict=True), strict=True)]


def _main(board: Board) -> Table:
    reference = next(iter(board.references.values()), "")
    compared = {one.method: one for one in next(iter(board.differences.values()), [])}

    def cells(standing: Standing) -> list[TableCell]:
        method, difference = board.methods.get(standing.method), compared.get(standing.method)
        rank = TableCell(text="" if standing.rank is None or method is None else f"{standing.rank:.1f}")
        told = TableCell(text="")
        if difference is not None:
            stars = next((marker for marker, level in MARKERS if difference.adjusted < level), "")
            told = TableCell(value=difference.points, text=signed(difference.points), stars=stars)
        elif standing.method == reference:
            told = TableCell(text="reference")
        share = standing.recovery
        return [
            TableCell(text=method.family if method else ""),
            TableCell(text=method.needs if method else ""),
            *(TableCell(standing.scores.get(suite.name), n=len(suite.items)) for suite in board.inside),
            TableCell(standing.average),
            TableCell(None if share is None else 100 * share),
            rank,
            told,
        ]

    names = [board.suite(suite.name) for suite in board.inside]
    return Table(
        key="leaderboard",
        title="Leaderboard",
        corner="Method",
        columns=("Family", "Needs", *names, "Average", "Recovery, %", "Mean rank", "Difference"),
        lines=_lines(board, cells, board.inside),
        caption="Mean score over the in-domain tests and seeds of each suite, × 100. Recovery: the mean over suites of "
        "the score as a share of that of the individual models, each on its own test. Mean rank: over suites, among "
        "the merges that have all of them. Difference: of the average to that of "
        + (f"{board.title(reference)}, {next(iter(board.references))}" if reference else "a reference")
        + "; * p < 0.05, ** p < 0.01 after Holm’s correction.",
        spans=(("", 2), ("Suites", len(names)), ("Over all suites", 4)),
        main=True,
        numeric=(False, False, *(True for _ in range(len(names) + 4))),
    )


def _recoveries(board: Board) -> Table:
    def cells(standing: Standing) -> list[TableCell]:
        shares = [standing.recoveries.get(suite.name) for suite in board.inside]
        return [TableCell(None if share is None else 100 * share) for share in (*shares, standing.recovery)]

    return Table(
        key="recovery",
        title="Recovery",
        corner="Method",
        columns=(*(board.suite(suite.name) for suite in board.inside), "Average"),
        lines=_lines(board, cells, board.inside),
        caption="The mean score on the in-domain tests of a suite as a share of that of the individual models on the "
        "same tests and seeds, in %.",
    )


def _compared(board: Board) -> Table:
    lines = []
    for words, reference in board.references.items():
        for one in board.differences[words]:
            stars = next((marker for marker, level in MARKERS if one.adjusted < level), "")
            cells = (
                TableCell(value=one.points, text=signed(one.points)),
                TableCell(text=f"{signed(one.low)} to {signed(one.high)}"),
                TableCell(text=f"{one.above} / {one.below}"),
                TableCell(text=f"{signed(one.worst[1])} ({board.suite(one.worst[0])})"),
                TableCell(value=one.p, text=p_text(one.p)),
                TableCell(value=one.adjusted, text=p_text(one.adjusted), stars=stars),
                TableCell(value=one.p_tests, text=p_text(one.p_tests)),
            )
            lines.append(Line(board.title(one.method), cells, f"Against {board.title(reference)}, {words}"))
    seeds = {suite.name: len(suite.seeds) for suite in board.inside}
    tests = sum(len({item.test_alone for item in suite.items}) for suite in board.inside)
    every = sum(len(suite.items) for suite in board.inside)
    return Table(
        key="differences",
        title="What is chance",
        corner="Method",
        columns=("Difference", "95 %", "Above / below", "Worst suite", "p", "p, Holm", "p, by test"),
        lines=tuple(lines),
        caption=f"Mean over suites ({len(seeds)}) of the mean difference in points, its 95 % interval by bootstrap "
        f"over each suite’s tests and seeds, on how many of the {every} tests and seeds the method is above and "
        "below, and the suite where it does worst. p: two-sided paired sign-flip test over tests and seeds, in which "
        f"each suite counts the same (all sign assignments up to {EXACT} differences, {SAMPLES:,} seeded ones "
        "beyond); adjusted by Holm over the comparisons with one reference; and with all seeds of a test flipped "
        f"together ({tests} tests), which asks less of their independence. * p < 0.05, ** p < 0.01.",
        numeric=(True, True, True, False, True, True, True),
    )


def _out_of_domain(board: Board) -> Table:
    def cells(standing: Standing) -> list[TableCell]:
        scores = [standing.scores.get(suite.name) for suite in board.outside]
        return [TableCell(score) for score in (*scores, standing.average)]

    return Table(
        key="out-of-domain",
        title="Out of domain",
        corner="Method",
        columns=(*(board.suite(suite.name) for suite in board.outside), "Average"),
        lines=_lines(board, cells, board.outside),
        caption="Mean score over the out-of-domain tests and seeds of the suites that have such tests, × 100. "
        "Individual: the mean of all contributors’ models.",
    )


def _costs(board: Board) -> Table:
    lines = []
    for standing in board.order:
        method, seconds, published = board.methods[standing.method], {}, {}
        for suite in board.inside:
            rows = [row for row in suite.grid.rows if row.method == standing.method and row.merged is not None]
            if rows:
                seconds[suite.name] = statistics.fmean(row.merged.seconds for row in rows if row.merged)
                sizes = [size for row in rows if row.merged for size in row.merged.statistics_bytes]
                published[suite.name] = statistics.fmean(sizes) if sizes else 0.0
        cells = (
            *(_number(seconds.get(suite.name), "{:.2f}") for suite in board.inside),
            _number(statistics.fmean(published.values()) / 1e6 if published else None, "{:.2f}"),
            TableCell(text="yes" if method.base else "no"),
            TableCell(text=_held(method.method)),
        )
        lines.append(Line(method.title, cells))
    names = [board.suite(suite.name) for suite in board.inside]
    return Table(
        key="cost",
        title="Cost",
        corner="Method",
        columns=(*names, "MB published", "Base needed", "In memory at once"),
        lines=tuple(lines),
        caption="Mean seconds of a merge alone, reading and writing included, on the machine and with the load of the "
        "run; what each contributor publishes beyond its weights, mean over suites; whether the pretrained model is "
        "needed; and what a merge holds of each parameter at once.",
        spans=(("Seconds of a merge", len(names)), ("", 3)),
        numeric=(*(True for _ in range(len(names) + 1)), False, False),
    )


def _number(value: float | None, form: str) -> TableCell:
    return TableCell(value, text=None if value is None else form.format(value))


def _held(method: str) -> str:
    if method == AUTO:
        return "what the method that it takes holds"
    return METHODS[method].streaming if method in METHODS else "not known here"


def _candidates(board: Board) -> Table:
    suites = list(board.choice.suites)
    names = list(dict.fromkeys(n for one in board.choice.methods for c in one.candidates for n in c.recovery)) or suites
    lines = []
    for standing in board.order:
        method = board.methods[standing.method]
        for place, candidate in enumerate(method.candidates):
            options = options_text(candidate.options) or "default options"
            shares = [*(candidate.recovery.get(name) for name in names), candidate.mean]
            mark = "best" if place == method.best else ""
            cells = [TableCell(None if s is None else 100 * s, mark=mark if s is not None else "") for s in shares]
            lines.append(Line(options, tuple(cells), method.title))
    seeds = "; ".join(f"{board.suite(name)}: {', '.join(map(str, own))}" for name, own in board.choice.seeds.items())
    return Table(
        key="candidates",
        title="Chosen options",
        corner="Options",
        columns=(*map(board.suite, names), "Average"),
        lines=tuple(lines),
        caption="Recovery on development data of the contributors, in %, of every candidate of each method; the one "
        f"with the best average (bold) is what all tests are scored with. Seeds: {seeds}.",
    )


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
    told = (
        f"{board.title(first.method)} comes first of {len(whole)} methods: {first.average:.1f} points on average over "
    )
    told += "one suite" if count == 1 else f"{count} suites"
    told += "." if first.recovery is None else f", {100 * first.recovery:.1f} % of the individual models."
    by_name = {one.method: one for one in whole}
    for words, name in board.references.items():
        if name in by_name and name != first.method:
            told += f" {board.title(name)}, {words}, has {by_name[name].average:.1f}."
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
