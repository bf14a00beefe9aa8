"""A difference that prints as 0.0 is a tie, wherever two scores are compared."""

import itertools
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from merganser.lab.report.figures import pair_map, scatter
from merganser.lab.report.grid import ResultGrid, make_grids
from merganser.lab.report.layouts import grid_tables
from merganser.lab.report.rows import ResultRow
from merganser.lab.report.tables import Table, TableCell
from merganser.lab.report.ties import PairCounts, leaders, sign, signed, tally

Row = dict[str, Any]


@given(st.floats(-3, 3))
def test_a_tie_is_what_prints_as_zero(difference: float) -> None:
    assume(abs(abs(difference) - 0.05) > 1e-8)
    printed = f"{difference:+.1f}"
    assert (sign(difference) == 0) == (printed in ("+0.0", "-0.0"))
    assert signed(difference) == ("0.0" if sign(difference) == 0 else printed.replace("-", "−"))


def test_the_last_bits_do_not_decide() -> None:
    a, b = 72.15 - 72.10, 50.05 - 50.0
    assert a > 0.05 > b, "the same difference, by two sums"
    assert (sign(a), sign(b)) == (1, 1) and (signed(a), signed(-b)) == ("+0.1", "−0.1")


def test_leaders_are_the_highest_and_its_ties() -> None:
    assert leaders({"a": 50.0, "b": 50.04, "c": 49.98, "d": 50.0}) == ["a", "b", "d"]
    assert leaders({"a": 1.0}) == ["a"] and leaders({}) == []
    assert tally([0.0, 1e-7, -0.04, 0.06, -3.0, -0.05]) == PairCounts(above=1, below=2, tied=3)


def table_of(grid: ResultGrid, key: str) -> Table:
    return next(table for table in grid_tables(grid) if table.key == key)


def cell(table: Table, line: str, column: str) -> TableCell:
    (found,) = [one for one in table.lines if one.title == line]
    return found.cells[table.columns.index(column)]


def pairs_with(examples: ModuleType, points: dict[str, float]) -> ResultGrid:
    """Ten pairs, two seeds; each method's scores are so many points above a score of the pair."""
    rows = [r for r in examples.pairs(seeds=(1, 2), heads=("same",)) if r["kind"] == "merge"]
    places = {pair: place for place, pair in enumerate(itertools.combinations(examples.EMOTION, 2))}
    for row in rows:
        base = 0.4 + 0.01 * places[tuple(row["contributors"])] + 0.001 * row["seed"]
        for score in row["scores"].values():
            score["value"] = base + points[row["method"]] / 100
        row["average"] = {}
    (grid,) = make_grids([ResultRow.model_validate(row) for row in rows])[0]
    return grid


@pytest.mark.parametrize("noise", [0.0, 1e-7, 0.04])
def test_what_differs_by_noise_is_tied_everywhere(examples: ModuleType, noise: float) -> None:
    grid = pairs_with(examples, {"simple": 2.0, "regmean": 2.0 + noise, "fisher": 1.0})
    summary, each = table_of(grid, "summary"), table_of(grid, "each-in")
    for name, text, mark in (
        ("Simple", "0 of 10, 10 tied", "best"),
        ("RegMean", "0 of 10, 10 tied", "best"),
        ("Fisher", "0 of 10", "second"),
    ):
        assert cell(summary, name, "Pairs won, in-domain").text == text
        assert cell(summary, name, "Pairs won, in-domain").value == 0
        assert cell(summary, name, "In-domain").mark == mark
        assert {line.cells[each.columns.index(name)].mark for line in each.lines} == {mark}
    (line,) = [
        one for one in table_of(grid, "significance").lines if (one.title, one.group) == ("RegMean", "In-domain")
    ]
    difference, counts, _, p, adjusted = line.cells
    assert (difference.text, counts.text) == ("0.0", "0 / 0, 20 tied")
    assert (p.value == 1) if noise == 0 else (p.value < 0.001), "p is of the real differences"
    assert adjusted.stars == cell(summary, "RegMean", "In-domain").stars == "", "a tie is no difference"
    drawn = scatter(grid, "x")
    assert drawn and "0 above, 20 tied" in drawn.wide and "20 of 20 above" not in drawn.wide
    only = make_grids([row for row in grid.rows if row.method != "fisher"])[0][0]
    coloured = pair_map(only, "x")
    assert coloured and "0.0" in coloured.wide
    assert "var(--up)" not in coloured.wide and "var(--down)" not in coloured.wide


def test_what_can_be_seen_is_no_tie(examples: ModuleType) -> None:
    grid = pairs_with(examples, {"simple": 2.0, "regmean": 2.06, "fisher": 1.94})
    summary = table_of(grid, "summary")
    texts = [cell(summary, name, "Pairs won, in-domain").text for name in ("Simple", "Fisher", "RegMean")]
    assert texts == ["0 of 10", "0 of 10", "10 of 10"]
    counts = {
        line.title: line.cells[1].text for line in table_of(grid, "significance").lines if line.group == "In-domain"
    }
    assert counts == {"Fisher": "0 / 20", "RegMean": "20 / 0"}
    drawn, coloured = scatter(grid, "x"), pair_map(grid, "x")
    assert drawn and ">20 above<" in drawn.wide and ">0 below<" in drawn.wide
    assert coloured and "var(--up)" in coloured.wide and "var(--down)" in coloured.wide


def test_the_second_best_come_after_all_the_best(examples: ModuleType) -> None:
    grid = pairs_with(examples, {"simple": 2.0, "regmean": 1.96, "fisher": 1.92})
    summary = table_of(grid, "summary")
    marks = [cell(summary, name, "In-domain").mark for name in ("Simple", "RegMean", "Fisher")]
    assert marks == ["best", "best", "second"], "Fisher is tied with RegMean, but not with the highest"
    grid = pairs_with(examples, {"simple": 2.0, "regmean": 1.0, "fisher": 1.04})
    assert [cell(table_of(grid, "summary"), n, "In-domain").mark for n in ("RegMean", "Fisher")] == ["second", "second"]
    grid = pairs_with(examples, {"simple": 2.0, "regmean": 2.0, "fisher": 2.0})
    assert {cell(table_of(grid, "summary"), n, "In-domain").mark for n in examples.MERGES.values()} == {"best"}
