"""What a report says, before it is said in HTML, Markdown, CSV or on a terminal: sections of plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product

from merganser.errors import RecipeError, did_you_mean
from merganser.lab.report.grid import DOMAINS, EVERY, HEADS, ResultGrid, make_grids
from merganser.lab.report.layouts import grid_tables
from merganser.lab.report.rows import ResultRow
from merganser.lab.report.significance import EXACT, SAMPLES
from merganser.lab.report.tables import Table
from merganser.lab.report.ties import RULE
from merganser.methods.averages.simple import SIMPLE
from merganser.text import listed

LAYOUTS = {
    "pairs": "every pair of models is merged",
    "greedy": "models are merged one after the other",
    "all": "all models are merged at once",
    "partitions": "models of two partitions of each task are merged",
}


@dataclass(frozen=True)
class PageBlock:
    """The tables of one grid."""

    key: str
    title: str
    grid: ResultGrid
    notices: tuple[str, ...]
    orders: tuple[str, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Section:
    """An experiment."""

    key: str
    title: str
    facts: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]
    how: tuple[str, ...]
    blocks: tuple[PageBlock, ...]


def make_sections(rows: Sequence[ResultRow], against: str) -> list[Section]:
    """A section for each experiment.

    Raises:
        RecipeError: no experiment has the merge to compare with, and it is not the default.
    """
    names = sorted({row.experiment for row in rows})
    sections = [
        _section([row for row in rows if row.experiment == name], against, f"e{number}")
        for number, name in enumerate(names, 1)
    ]
    grids = [block.grid for section in sections for block in section.blocks]
    if against != SIMPLE.name and not any(grid.reference for grid in grids):
        valid = {method.name for grid in grids for method in grid.merges}
        what = f"no merge {against!r} in these results"
        raise RecipeError(what, where="--against", mend=did_you_mean(against, valid))
    return sections


def _section(rows: Sequence[ResultRow], against: str, key: str) -> Section:
    grids, old = make_grids(rows, against)
    blocks = tuple(_block(grid, f"{key}-{number}") for number, grid in enumerate(grids, 1))
    kept = [row for grid in grids for row in grid.rows]
    notices = []
    if old:
        notices.append(
            f"{len(old)} older {_plural(len(old), 'cell')} of the same method, models and seed "
            f"{'was' if len(old) == 1 else 'were'} left out in favour of the one finished last: "
            + listed(sorted(row.cell for row in old), 6)
            + "."
        )
    truncated = {name for row in kept for name, score in row.scores.items() if score.truncated}
    if truncated:
        most = max(score.truncated or 0 for row in kept for score in row.scores.values())
        notices.append(
            f"Texts longer than the model’s limit were cut, up to {most} a test set: {listed(sorted(truncated), 6)}."
        )
    return Section(
        key=key,
        title=rows[0].experiment,
        facts=_facts(grids, kept),
        notices=tuple(notices),
        how=_how(grids, kept),
        blocks=blocks,
    )


def _block(grid: ResultGrid, key: str) -> PageBlock:
    notices = list(grid.gaps())
    if notices:
        notices.append(
            "Averages are over the cells that all merges share; a number over fewer cells says how many, "
            "and is never marked as best."
        )
    if len(grid.merges) > 1 and grid.reference is None:
        notices.append(f"There is no merge “{grid.against}” here: nothing is compared with it.")
    orders = []
    if grid.layout == "greedy":
        for order, seeds in grid.orders.items():
            told = f"seeds {', '.join(map(str, seeds))}: " if len(grid.orders) > 1 else ""
            orders.append(told + " → ".join(map(grid.show, order)))
    return PageBlock(
        key=key,
        title=f"{grid.model}, {HEADS[grid.heads]}",
        grid=grid,
        notices=tuple(notices),
        orders=tuple(orders),
        tables=tuple(grid_tables(grid)),
    )


def _facts(grids: Sequence[ResultGrid], rows: Sequence[ResultRow]) -> tuple[tuple[str, str], ...]:
    methods = sorted({method for grid in grids for method in grid.methods}, key=lambda method: method.rank)
    contributors = dict.fromkeys(grid.show(name) for grid in grids for name in grid.contributors)
    tests = {name: score for row in rows for name, score in row.scores.items()}
    counted = [f"{len(tests)} test {_plural(len(tests), 'set')}"]
    if {score.domain for score in tests.values()} == {"in", "out"}:
        inside = sum(score.domain == "in" for score in tests.values())
        counted.append(f"{inside} in-domain, {len(tests) - inside} out-of-domain")
    metrics = dict.fromkeys(metric for grid in grids for metric in grid.metrics)
    versions = sorted({(name, str(version)) for row in rows for name, version in row.provenance.versions.items()})
    by_name = groupby(versions, key=lambda version: version[0])
    seconds = sum(row.provenance.seconds for row in rows)
    facts = [
        ("Design", "; ".join(dict.fromkeys(LAYOUTS[grid.layout] for grid in grids))),
        ("Suite", f"{rows[0].suite}: {', '.join(contributors)}"),
        (_plural(len({g.model for g in grids}), "Model"), ", ".join(dict.fromkeys(g.model for g in grids))),
        ("Heads", ", ".join(dict.fromkeys(HEADS[grid.heads] for grid in grids))),
        ("Methods", "; ".join(dict.fromkeys(method.title for method in methods))),
        ("Seeds", ", ".join(map(str, sorted({row.seed for row in rows})))),
        ("Scores", f"{', '.join(metrics)}, × 100; {', '.join(counted)}"),
        ("Cells", f"{len(rows)}, {duration(seconds)} of computing"),
        ("Versions", ", ".join(f"{name} {' / '.join(version for _, version in same)}" for name, same in by_name)),
    ]
    return tuple((name, value) for name, value in facts if value)


def _how(grids: Sequence[ResultGrid], rows: Sequence[ResultRow]) -> tuple[str, ...]:
    kinds = {method.kind for grid in grids for method in grid.methods}
    told = [
        "Scores are × 100, higher is better. Bold: the best merge and those tied with it "
        f"({RULE}, a difference that prints as 0.0); underlined: the second best after them, with its ties."
    ]
    if any(len(grid.seeds) > 1 for grid in grids):
        told.append("A number is the mean over seeds of each seed’s average, ± their standard deviation (n − 1).")
    else:
        told.append("There is one seed, so that there are no deviations.")
    errors = []
    for row, domain in product(rows, DOMAINS):
        found = [score.standard_error for score in row.scores.values() if score.domain == domain]
        errors.append([100 * error for error in found if error is not None])
    # The errors of several tests are independent.
    averages = [math.hypot(*of_tests) / len(of_tests) for of_tests in errors if len(of_tests) > 1]
    if any(errors):
        told.append(
            f"The standard error (bootstrap over a test’s examples) of a score is {_range(chain(*errors))} points"
            + (f", that of an average over the tests {_range(averages)}." if averages else ".")
        )
    if "individual" in kinds:
        told.append("Individual: each model on its own in-domain test, and the mean of all models out-of-domain.")
    if any(EVERY in grid.methods for grid in grids):
        told.append("Individual, all: the mean of all models on every in-domain test.")
    comparators = [kind for kind in ("ensemble", "multitask") if kind in kinds]
    words = {"ensemble": "an ensemble runs all models", "multitask": "multi-task learning needs all the data"}
    if comparators:
        told.append(
            " and ".join(words[kind] for kind in comparators).capitalize() + ": for comparison, so never marked."
        )
    if any(method.searched for grid in grids for method in grid.methods):
        told.append("Searched: the coefficients were chosen by a score on other data, see “Chosen coefficients”.")
    if any(len(grid.merges) > 1 for grid in grids):
        told.append(
            f"p-values: all sign assignments are counted up to {EXACT} differences, {SAMPLES:,} seeded ones are drawn "
            "beyond; what is compared shares models, so that it is not independent: take p as a guide."
        )
    told.append("Point at a number to see the cells it comes from; all are under “Provenance”.")
    return tuple(told)


def _range(values: Iterable[float]) -> str:
    found = [f"{value:.1f}" for value in sorted(values)]
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def duration(seconds: float) -> str:
    """Seconds as people say them, such as ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def anchor(text: str) -> str:
    """Text as a fragment identifier."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
