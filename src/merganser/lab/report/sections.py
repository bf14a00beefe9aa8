"""What a report says, before it is said in HTML, Markdown, CSV or on a terminal: sections of plain values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from merganser.errors import RecipeError, did_you_mean
from merganser.lab.report.grid import DOMAINS, EVERY, HEADS, Grid, make_grids, unit_of
from merganser.lab.report.layouts import grid_tables
from merganser.lab.report.rows import Origin, ResultRow
from merganser.lab.report.significance import EXACT, SAMPLES
from merganser.lab.report.tables import Cell, Line, Table, find_method
from merganser.lab.report.ties import RULE

LAYOUTS = {
    "pairs": "every pair of models is merged",
    "greedy": "models are merged one after the other",
    "all": "all models are merged at once",
    "partitions": "models of two partitions of each task are merged",
}
#: Characters of a shortened hash.
HASH_LENGTH = 10


@dataclass(frozen=True)
class Block:
    """The tables of one grid."""

    key: str
    title: str
    grid: Grid
    notices: tuple[str, ...]
    orders: tuple[str, ...]
    tables: tuple[Table, ...]
    chosen: Table | None

    @property
    def every_table(self) -> tuple[Table, ...]:
        """The tables with that of the chosen coefficients, where there is one, at the end."""
        return (*self.tables, *([self.chosen] if self.chosen else []))


@dataclass(frozen=True)
class Hash:
    """A hash: shortened, with the whole at hand."""

    name: str
    full: str

    @property
    def short(self) -> str:
        """As much as tells it from others."""
        bare = self.full.removeprefix("sha256:")
        return bare[:HASH_LENGTH] + ("…" if len(bare) > HASH_LENGTH else "")


@dataclass(frozen=True)
class Contributor:
    """A contributor of a cell, as the provenance shows it."""

    name: str
    seed: int | None
    score: str
    examples: str
    hashes: tuple[Hash, ...]


@dataclass(frozen=True)
class Trace:
    """The provenance of a cell; ``settings`` and ``versions`` are letters of the section's lists, ``hashes`` are of
    the base model and of data that other cells read with other contents."""

    cell: str
    method: str
    heads: str
    model: str
    seed: int
    contributors: tuple[Contributor, ...]
    scores: tuple[tuple[str, str], ...]
    hashes: tuple[Hash, ...]
    tensors: str
    settings: str
    versions: str
    time: str


@dataclass(frozen=True)
class Variant:
    """Settings or versions that cells share."""

    letter: str
    cells: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """An experiment."""

    key: str
    title: str
    facts: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]
    how: tuple[str, ...]
    blocks: tuple[Block, ...]
    traces: tuple[Trace, ...]
    data: tuple[Hash, ...]
    settings: tuple[Variant, ...]
    versions: tuple[Variant, ...]


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
    if against != "simple" and not any(find_method(grid, against) for grid in grids):
        valid = {method.name for grid in grids for method in grid.merges}
        raise RecipeError(
            f"no merge {against!r} in these results", where="--against", mend=did_you_mean(against, valid)
        )
    return sections


def _section(rows: Sequence[ResultRow], against: str, key: str) -> Section:
    grids, old = make_grids(rows)
    blocks = tuple(_block(grid, against, f"{key}-{number}") for number, grid in enumerate(grids, 1))
    kept = [row for grid in grids for row in grid.rows]
    notices = []
    if old:
        notices.append(
            f"{len(old)} older {_plural(len(old), 'cell')} of the same method, models and seed "
            f"{'was' if len(old) == 1 else 'were'} left out in favour of the one finished last: "
            + _shortened(sorted(row.cell for row in old), 6)
            + "."
        )
    truncated = {name for row in kept for name, score in row.scores.items() if score.truncated}
    if truncated:
        most = max(score.truncated or 0 for row in kept for score in row.scores.values())
        notices.append(
            f"Texts longer than the model’s limit were cut, up to {most} a test set: "
            f"{_shortened(sorted(truncated), 6)}."
        )
    return Section(
        key=key,
        title=rows[0].experiment,
        facts=_facts(grids, kept),
        notices=tuple(notices),
        how=_how(grids, kept),
        blocks=blocks,
        traces=tuple(_traces(grids)),
        data=_data(kept),
        settings=_variants(row.provenance.settings for row in kept),
        versions=_variants(row.provenance.versions for row in kept),
    )


def _block(grid: Grid, against: str, key: str) -> Block:
    notices = list(grid.gaps())
    if notices:
        notices.append(
            "Averages are over the cells that all merges share; a number over fewer cells says how many, "
            "and is never marked as best."
        )
    if len(grid.merges) > 1 and find_method(grid, against) is None:
        notices.append(f"There is no merge “{against}” here: nothing is compared with it.")
    orders = []
    if grid.layout == "greedy":
        for order, seeds in grid.orders.items():
            told = f"seeds {', '.join(map(str, seeds))}: " if len(grid.orders) > 1 else ""
            orders.append(told + " → ".join(map(grid.show, order)))
    return Block(
        key=key,
        title=f"{grid.model}, {HEADS[grid.heads]}",
        grid=grid,
        notices=tuple(notices),
        orders=tuple(orders),
        tables=tuple(grid_tables(grid, against)),
        chosen=_chosen(grid),
    )


def _facts(grids: Sequence[Grid], rows: Sequence[ResultRow]) -> tuple[tuple[str, str], ...]:
    methods = {method.title: method for grid in grids for method in sorted(grid.methods, key=lambda m: m.rank)}
    titles = [method.title for method in sorted(methods.values(), key=lambda m: m.rank)]
    contributors = dict.fromkeys(grid.show(name) for grid in grids for name in grid.contributors)
    tests = {name: score for row in rows for name, score in row.scores.items()}
    counted = [f"{len(tests)} test {_plural(len(tests), 'set')}"]
    if {score.domain for score in tests.values()} == {"in", "out"}:
        inside = sum(score.domain == "in" for score in tests.values())
        counted.append(f"{inside} in-domain, {len(tests) - inside} out-of-domain")
    metrics = dict.fromkeys(metric for grid in grids for metric in grid.metrics)
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in row.provenance.versions.items():
            versions.setdefault(name, set()).add(str(version))
    seconds = sum(row.provenance.seconds for row in rows)
    facts = [
        ("Design", "; ".join(dict.fromkeys(LAYOUTS[grid.layout] for grid in grids))),
        ("Suite", f"{rows[0].suite}: {', '.join(contributors)}"),
        (_plural(len({g.model for g in grids}), "Model"), ", ".join(dict.fromkeys(g.model for g in grids))),
        ("Heads", ", ".join(dict.fromkeys(HEADS[grid.heads] for grid in grids))),
        ("Methods", "; ".join(titles)),
        ("Seeds", ", ".join(map(str, sorted({row.seed for row in rows})))),
        ("Scores", f"{', '.join(metrics)}, × 100; {', '.join(counted)}"),
        ("Cells", f"{len(rows)}, {duration(seconds)} of computing"),
        ("Versions", ", ".join(f"{name} {' / '.join(sorted(versions[name]))}" for name in sorted(versions))),
    ]
    return tuple((name, value) for name, value in facts if value)


def _how(grids: Sequence[Grid], rows: Sequence[ResultRow]) -> tuple[str, ...]:
    kinds = {method.kind for grid in grids for method in grid.methods}
    several = max((len(grid.seeds) for grid in grids), default=0) > 1
    told = [
        "Scores are × 100, higher is better. Bold: the best merge and those tied with it "
        f"({RULE}, a difference that prints as 0.0); underlined: the second best after them, with its ties."
    ]
    if several:
        told.append("A number is the mean over seeds of each seed’s average, ± their standard deviation (n − 1).")
    else:
        told.append("There is one seed, so that there are no deviations.")
    errors = [
        [
            100 * score.standard_error
            for score in row.scores.values()
            if score.domain == domain and score.standard_error is not None
        ]
        for row in rows
        for domain in DOMAINS
    ]
    if any(errors):
        told.append(
            f"The standard error (bootstrap over a test’s examples) of a score is {_range(chain(*errors))} points"
            + _average_errors([found for found in errors if len(found) > 1])
            + "."
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


def _average_errors(errors: Sequence[Sequence[float]]) -> str:
    """The standard errors of averages over several tests, whose errors are independent."""
    averages = [math.hypot(*found) / len(found) for found in errors]
    return f", that of an average over the tests {_range(averages)}" if averages else ""


def _range(values: Iterable[float]) -> str:
    found = [f"{value:.1f}" for value in sorted(values)]
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _chosen(grid: Grid) -> Table | None:
    """The coefficients of searched cells."""
    place = {name: index for index, name in enumerate(grid.contributors)}
    rows = [row for row in grid.rows if row.chosen]
    rows.sort(key=lambda r: (grid.method(r).rank, len(r.contributors), [place[c] for c in r.contributors], r.seed))
    lines = []
    for row in rows:
        assert row.chosen is not None
        best = row.chosen.candidates[row.chosen.best]
        known = [c.dev for c in row.chosen.candidates if c.dev is not None]
        span = f"{100 * min(known):.1f} – {100 * max(known):.1f}" if known else "–"
        weights = zip(row.contributors, best.coefficients, strict=False)
        cells = (
            Cell(text=" + ".join(f"{weight:.2g} {grid.show(name)}" for name, weight in weights)),
            Cell(text=str(row.seed)),
            Cell(value=None if best.dev is None else 100 * best.dev, cells=(row.cell,), n=1, seeds=1),
            Cell(text=span),
            Cell(text=str(len(row.chosen.candidates))),
        )
        lines.append(Line(grid.label(row.contributors), cells, group=grid.method(row).title))
    if not lines:
        return None
    by = sorted({row.chosen.by for row in rows if row.chosen})
    return Table(
        key="chosen",
        title="Chosen coefficients",
        corner="Models",
        columns=("Coefficients", "Seed", "Score when chosen", "Lowest – highest", "Tried"),
        lines=tuple(lines),
        caption=f"The coefficients with the highest score on {' and '.join(by)} data, that score, and the range of all "
        "that were tried. The scores of the other tables are of test data.",
        numeric=(False, True, True, True, True),
    )


def _traces(grids: Sequence[Grid]) -> Iterable[Trace]:
    rows = [row for grid in grids for row in grid.rows]
    settings = _letters(row.provenance.settings for row in rows)
    versions = _letters(row.provenance.versions for row in rows)
    names = [known.name for known in _data(rows)]
    unlike = frozenset(name for name in names if names.count(name) > 1)
    for grid in grids:
        place = {name: index for index, name in enumerate(grid.contributors)}

        def order(row: ResultRow, grid: Grid = grid, place: Mapping[str, int] = place) -> tuple[Any, ...]:
            return grid.method(row).rank, unit_of(row).seed, [place[c] for c in row.contributors], row.cell

        for row in sorted(grid.rows, key=order):
            yield _trace(row, grid, settings, versions, unlike)


def _data(rows: Iterable[ResultRow]) -> tuple[Hash, ...]:
    """Every data set and its hash; a name stands twice if cells read different contents under it."""
    pairs = {(name, full) for row in rows for name, full in row.provenance.data.items() if full}
    return tuple(Hash(name, full) for name, full in sorted(pairs))


def _trace(
    row: ResultRow, grid: Grid, settings: dict[str, str], versions: dict[str, str], unlike: frozenset[str]
) -> Trace:
    method, origin = grid.method(row), row.provenance
    joint = "+".join(row.contributors)  # the name of a model that was trained on the data of them all
    by_name = {known.name: known for known in origin.contributors}
    contributors = []
    others = [known.name for known in origin.contributors if known.name not in row.contributors]
    for name in (*row.contributors, *others):
        known = by_name.get(name, Origin(name=name))
        named = (("zoo", known.zoo), ("weights", known.weights), ("statistics", known.statistics))
        contributors.append(
            Contributor(
                name=grid.label(row.contributors) if name == joint else grid.show(name),
                seed=known.seed,
                score="" if known.score is None else f"{100 * known.score:.1f}",
                examples="" if known.examples is None else _counted(known.examples, "training example"),
                hashes=tuple(Hash(label, full) for label, full in named if full),
            )
        )
    base = [Hash("base", origin.base)] if origin.base else []
    data = [Hash(name, full) for name, full in sorted(origin.data.items()) if full and name in unlike]
    return Trace(
        cell=row.cell,
        method=method.title + (f" ({grid.show(row.contributors[0])})" if row.kind == "individual" else ""),
        heads=row.heads,
        model=row.model,
        seed=row.seed,
        contributors=tuple(contributors),
        scores=tuple(
            (name, "–" if score.value is None else f"{100 * score.value:.1f}")
            for name, score in sorted(row.scores.items(), key=lambda item: (item[1].domain, item[0]))
        ),
        hashes=(*base, *data),
        tensors=", ".join(f"{count} {name}" for name, count in sorted(origin.tensors.items())),
        settings=settings[_canonical(origin.settings)],
        versions=versions[_canonical(origin.versions)],
        time=duration(origin.seconds) + (f", {origin.finished}" if origin.finished else ""),
    )


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _letters(values: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    names = sorted({_canonical(value) for value in values})
    return {name: _letter(index) for index, name in enumerate(names)}


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def _variants(values: Iterable[Mapping[str, Any]]) -> tuple[Variant, ...]:
    listed = list(values)
    letters = _letters(listed)
    found = []
    for text, letter in letters.items():
        same = [value for value in listed if _canonical(value) == text]
        found.append(Variant(letter, len(same), tuple(_flat(same[0]))))
    return tuple(found)


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from _flat(value[key], f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def duration(seconds: float) -> str:
    """Seconds as people say them, such as ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def anchor(text: str) -> str:
    """Text as a fragment identifier."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {_plural(count, noun)}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _shortened(names: Sequence[str], most: int) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
