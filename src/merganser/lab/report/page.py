"""A report as one HTML page that loads nothing and runs nothing; it follows light, dark and print."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from string import ascii_uppercase
from typing import Any

from merganser import __version__
from merganser.errors import require
from merganser.lab.report.grid import ResultGrid
from merganser.lab.report.rows import ResultRow
from merganser.lab.report.sections import Section, anchor, duration
from merganser.lab.report.tables import TableCell

#: A number over more cells names the first of them and counts the rest.
MOST_CELLS = 12
#: Characters of a shortened hash.
HASH_LENGTH = 10


def render_page(sections: Sequence[Section], template: str = "report.html.j2", **values: Any) -> str:
    """The page.

    Args:
        sections: the experiments, at least one.
        template: of the page; one that extends the report's says more than the rows do.
        values: what that one asks for.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    require("lab", "the page of a report", "jinja2", "matplotlib")
    import jinja2

    from merganser.lab.report.figures import grid_figures

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("merganser.lab.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = {"anchor": anchor, "canonical": _canonical, "duration": duration, "short": _short, "trace": _trace}
    environment.filters.update(filters)
    return environment.get_template(template).render(
        sections=sections,
        figures={block.key: grid_figures(block.grid, block.key) for section in sections for block in section.blocks},
        provenance={section.key: _provenance([block.grid for block in section.blocks]) for section in sections},
        version=__version__,
        **values,
    )


def _trace(cell: TableCell) -> str:
    """What a number is made of: how many units and seeds, and the ids of the cells."""
    if not cell.cells:
        return ""
    rest = len(cell.cells) - MOST_CELLS
    ids = " ".join(cell.cells[:MOST_CELLS]) + (f" and {rest} more" if rest > 0 else "")
    seeds = f", {cell.seeds} seeds" if cell.seeds > 1 else ""
    return f"n = {cell.n}{seeds}; cells {ids}"


def _short(hashed: str) -> str:
    """As much of a hash as tells it from others."""
    bare = hashed.removeprefix("sha256:")
    return bare[:HASH_LENGTH] + ("…" if len(bare) > HASH_LENGTH else "")


def _provenance(grids: Sequence[ResultGrid]) -> dict[str, Any]:
    """The cells of an experiment, each with its grid, and what they share.

    The data are (name, hash): a name stands twice if cells read different contents under it. Settings and versions are
    each given a letter, how many cells have them, and their pairs of names and values.
    """
    rows = [row for grid in grids for row in grid.rows]
    data = {(name, full) for row in rows for name, full in row.provenance.data.items() if full}
    return {
        "cells": [(grid, row) for grid in grids for row in _in_order(grid)],
        "data": sorted(data),
        "settings": _variants(row.provenance.settings for row in rows),
        "versions": _variants(row.provenance.versions for row in rows),
    }


def _in_order(grid: ResultGrid) -> list[ResultRow]:
    def order(row: ResultRow) -> tuple[Any, ...]:
        return grid.method(row).rank, row.seed, list(map(grid.contributors.index, row.contributors)), row.cell

    return sorted(grid.rows, key=order)


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _variants(values: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, int, list[tuple[str, str]]]]:
    counts = Counter(map(_canonical, values))
    letters = (f"{letter}{turn or ''}" for turn in count() for letter in ascii_uppercase)
    return {
        text: (letter, counts[text], list(_flat(json.loads(text))))
        for text, letter in zip(sorted(counts), letters, strict=False)
    }


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from _flat(value[key], f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
