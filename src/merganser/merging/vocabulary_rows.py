"""The rows of one tensor with a row for each token: whose row of which model answers to which of the result's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merganser.checkpoints.tokenizer_files import Table
from merganser.merging.matching import Fill, RowMap
from merganser.merging.recipe import Recipe


@dataclass(frozen=True)
class GivenRow:
    """A row that models have from somewhere: from a row of a model (its place among all of them), or zeros (None)."""

    giver: int | None
    row: int
    force: bool


def match_rows(
    recipe: Recipe,
    tokens: Table,
    size: int,
    tables: Sequence[Table | None],
    heights: Sequence[int],
    count: int,
    filler: int | None,
    given: Mapping[int, GivenRow],
    *,
    needs_base: bool,
) -> RowMap | None:
    """The rows of a tensor; None where every model has just these.

    Args:
        recipe: for ``fill_missing_rows`` and ``pad_to_multiple_of``.
        tokens: the id of each token in the result.
        size: rows of the result.
        tables: the id of each token in each model.
        heights: rows of the tensor in each model; 0 where it has none.
        count: how many of the models are contributors; one more is the base.
        filler: whose rows stand where not every model has one: a contributor, -1 for the base; None: all that do.
        given: rows of single tokens.
        needs_base: rows that the base lacks are missing, too.
    """
    places = np.array([row for row in tokens.values() if row < size], dtype=np.int64)
    names, own = [token for token, row in tokens.items() if row < size], np.empty((len(tables), size), dtype=np.int64)
    for number, (table, height) in enumerate(zip(tables, heights, strict=True)):
        ids = table or {}
        own[number] = np.arange(size)
        own[number, [row for row in ids.values() if row < size]] = -1  # no padding there
        own[number, places] = [ids.get(token, -1) for token in names]
        own[number, own[number] >= height] = -1
    fills = _single_rows(own, given, count, heights)
    settled = np.isin(np.arange(size), list(given))
    if recipe.pad_to_multiple_of is not None and tokens:
        padding = np.setdiff1d(np.arange(size), places)
        own[:, padding] = -1
        fills += [Fill.of(_numbers(range(len(own)), count), padding[None], own_mean=True)] if padding.size else []
        settled[padding] = True
    if not fills and (own == np.arange(size)).all() and all(height in (0, size) for height in heights):
        return None
    owned, base = own[:count], own[count] if len(own) > count else np.full(size, -1)
    nobodys = np.flatnonzero((owned < 0).all(0) & (base < 0) & ~settled)
    owned[:, nobodys] = np.where(nobodys < np.array(heights[:count])[:, None], nobodys, -1)
    if recipe.fill_missing_rows:
        fills += _filled_rows(own, settled, count, filler)
    elif filler is not None:
        lacking = (owned < 0).any(0) | ((base < 0) if needs_base and len(own) > count else False)
        stands = base if filler < 0 else owned[filler]
        others = np.arange(count) != filler
        owned[others[:, None] & lacking & ~settled & (stands >= 0)] = -1
    return RowMap.of(owned.tolist(), base.tolist() if len(own) > count else None, fills)


def _numbers(places: Iterable[int], count: int) -> tuple[int, ...]:
    """Models by their numbers in a plan, of their places: the base, behind the contributors, is -1."""
    return tuple(place if place < count else -1 for place in places)


def _single_rows(own: np.ndarray, given: Mapping[int, GivenRow], count: int, heights: Sequence[int]) -> list[Fill]:
    """Rows of single tokens: of the models that lack them, or of all; taken from ``own``, which is changed."""
    found = []
    for row, said in sorted(given.items()):
        if row >= own.shape[1] or (said.giver is not None and said.row >= heights[said.giver]):
            continue
        takers = [place for place in range(len(own)) if said.force or own[place, row] < 0]
        if takers:
            own[takers, row] = -1
            givers = [] if said.giver is None else [said.giver]
            rows = np.array([[row], *([said.row] for _ in givers)])
            found.append(Fill.of(_numbers(takers, count), rows, _numbers(givers, count)))
    return found


def _filled_rows(own: np.ndarray, settled: np.ndarray, count: int, filler: int | None) -> list[Fill]:
    """Rows that models lack: of the model that is asked first, where it has them, or the mean of those that do."""
    found, has = [], own >= 0
    first = None if filler is None else filler if filler >= 0 else len(own) - 1
    wanted = np.flatnonzero(~has.all(0) & has.any(0) & ~settled)
    for pattern in np.unique(has[:, wanted], axis=1).T if wanted.size else ():
        rows = wanted[(has[:, wanted] == pattern[:, None]).all(0)]
        givers = [first] if first is not None and pattern[first] else np.flatnonzero(pattern).tolist()
        takers = np.flatnonzero(~pattern).tolist()
        found.append(Fill.of(_numbers(takers, count), np.stack([rows, *own[givers][:, rows]]), _numbers(givers, count)))
    return found
