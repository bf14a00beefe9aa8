"""The tables of a leaderboard: scores, recovery, what is chance, costs, chosen options."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from merganser.lab.benchmark.board import Board
from merganser.lab.benchmark.config import options_text
from merganser.lab.benchmark.summary import Standing, SuiteScores, standings
from merganser.lab.grid.config import TITLES
from merganser.lab.report.significance import EXACT, MARKERS, SAMPLES
from merganser.lab.report.tables import Line, Table, TableCell, p_text
from merganser.lab.report.ties import leaders, signed
from merganser.methods import METHODS
from merganser.methods.auto import AUTO

COMPARED, MERGED = "For comparison", "Merged into one model"


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
    for method in (board.methods[standing.method] for standing in board.order):
        if len(method.candidates) == 1:  # nothing was chosen
            continue
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
        caption="Recovery on development data of the contributors, in %, of every candidate of the methods that have "
        f"several; the one with the best average (bold) is what all tests are scored with. Seeds: {seeds}.",
    )
