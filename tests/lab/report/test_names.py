"""Contributors are shown by their data sets, and known by their names."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from merganser.errors import DataError
from merganser.lab.report.grid import ResultGrid, make_grids
from merganser.lab.report.latex import render_latex
from merganser.lab.report.page import render_page
from merganser.lab.report.rows import ResultRow, read_rows, render_rows
from merganser.lab.report.sections import make_sections
from merganser.lab.report.text import render_csv, render_markdown

Row = dict[str, Any]


def renamed(rows: Sequence[Row], names: dict[str, str], sets: bool) -> list[Row]:
    """The same rows with contributors called by other names; tests keep the names of the data sets."""
    made = copy.deepcopy(list(rows))
    for row in made:
        if sets:
            row["sets"] = row["contributors"]
        row["contributors"] = [names[one] for one in row["contributors"]]
        for origin in row["provenance"]["contributors"]:
            origin["name"] = "+".join(names[one] for one in origin["name"].split("+"))
    return made


def reports(rows: Sequence[Row]) -> dict[str, str]:
    sections = make_sections([ResultRow.model_validate(row) for row in rows], "simple")
    return {
        "page": render_page(sections),
        "markdown": render_markdown(sections),
        "csv": render_csv(sections),
        "latex": render_latex(sections),
    }


@pytest.mark.parametrize("layout", ["pairs", "greedy", "all_at_once", "glue_pairs"])
@pytest.mark.parametrize("sets", [True, False], ids=["sets-in-rows", "sets-of-individual-models"])
def test_other_names_give_the_same_report(examples: ModuleType, layout: str, sets: bool) -> None:
    rows = getattr(examples, layout)(seeds=(1, 2))
    for row in rows:
        if row["kind"] == "multitask":
            row["provenance"]["contributors"] = [{"name": "+".join(row["contributors"]), "zoo": "ab12"}]
    # one pair is missing, so that there are notices, too
    rows = [r for r in rows if not (r["method"] == "fisher" and r["seed"] == 2 and len(r["contributors"]) == 2)]
    found = sorted({name for row in rows for name in row["contributors"]})
    names = {name: f"model{number}" for number, name in enumerate(found)}  # in the same alphabetical order
    told = reports(renamed(rows, names, sets))
    assert told == reports(rows)
    for form, text in told.items():
        assert not re.search(r"model\d", text), form


def test_rows_say_the_sets_where_there_are_no_individual_models(examples: ModuleType) -> None:
    rows = [r for r in examples.pairs(seeds=(1,), heads=("same",)) if r["kind"] == "merge"]
    names = dict(zip(sorted(examples.EMOTION), ("m0", "m1", "m2", "m3", "m4"), strict=True))
    assert reports(renamed(rows, names, True)) == reports(rows)
    (grid,) = grids_of(renamed(rows, names, False))
    assert grid.label(grid.contributors[:2]) == "m4 + m2", "unknown sets leave the names"


def grids_of(rows: Sequence[Row]) -> list[ResultGrid]:
    return make_grids([ResultRow.model_validate(row) for row in rows])[0]


def grid_with(examples: ModuleType, sets: dict[str, str | None], tests: Sequence[str] = ("t",)) -> ResultGrid:
    """One merge of contributors with these sets, all of which are tested on the same."""
    row = examples.make_row(
        layout="all", kind="merge", method="simple", contributors=list(sets), seed=1, tests=dict.fromkeys(tests, "in")
    )
    row["sets"] = [one or "" for one in sets.values()]
    (grid,) = grids_of([row])
    return grid


@pytest.mark.parametrize(
    "sets, shown",
    [
        ({"a": "isear", "b": "tec"}, ["isear", "tec"]),
        ({"a": "isear", "b": "isear", "c": "tec"}, ["isear (a)", "isear (b)", "tec"]),
        ({"isear": "isear", "hot": "isear"}, ["isear", "isear (hot)"]),
        ({"rte/1": "rte", "rte/2": "rte"}, ["rte/1", "rte/2"]),
        ({"m/1": "rte", "m/2": "rte"}, ["rte (m/1)", "rte (m/2)"]),
        ({"a": None, "b": "tec"}, ["a", "tec"]),
        ({"tec": None, "b": "tec"}, ["tec", "tec (b)"]),
        ({"tec": "isear", "isear": "tec"}, ["isear", "tec"]),
    ],
)
def test_what_a_contributor_is_called(examples: ModuleType, sets: dict[str, str | None], shown: list[str]) -> None:
    grid = grid_with(examples, sets)
    assert [grid.show(name) for name in sets] == shown
    assert len(set(map(grid.show, sets))) == len(sets)
    assert [unit.contributors for unit in grid.units] == [tuple(sorted(sets))], "units keep the names"


def test_a_name_with_two_sets_stays_a_name(examples: ModuleType) -> None:
    rows = []
    for seed, own in ((1, "isear"), (2, "tec")):
        row = examples.make_row(
            layout="all", kind="merge", method="simple", contributors=["a", "b"], seed=seed, tests={"t": "in"}
        )
        rows.append({**row, "sets": [own, "ssec"]})
    (grid,) = grids_of(rows)
    assert [grid.show("a"), grid.show("b")] == ["a", "ssec"]


def test_tests_are_in_the_order_of_the_contributors_sets(examples: ModuleType) -> None:
    tests = ("crowdflower", "isear", "other", "ssec", "tec")
    grid = grid_with(examples, {"m0": "tec", "m1": "isear", "m2": "tec", "m3": "ssec"}, tests)
    assert grid.tests("in") == ("tec", "isear", "ssec", "crowdflower", "other")
    grid = grid_with(examples, {"tec/1": None, "tec/2": None, "isear[x]": None}, ("isear", "tec[test]"))
    assert grid.tests("in") == ("tec[test]", "isear")


def test_sets_that_do_not_fit_the_contributors_are_refused(tmp_path: Path, examples: ModuleType) -> None:
    row = next(r for r in examples.greedy(seeds=(1,)) if r["kind"] == "merge")
    row["sets"] = row["contributors"][:1]
    (tmp_path / "row.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"row\.json: there are 2 contributors, but 1 sets"):
        read_rows(tmp_path / "row.json")


def test_rows_are_written_as_they_were_read(tmp_path: Path, examples: ModuleType) -> None:
    old, new = examples.partitions(seeds=(1,)), examples.greedy(seeds=(1,))
    for row in new:
        row["sets"] = row["contributors"]
        row["provenance"]["contributors"][0]["examples"] = 1000
    (tmp_path / "rows.json").write_text(json.dumps([*old, *new]))
    lines = [json.loads(line) for line in render_rows(read_rows(tmp_path / "rows.json")).splitlines()]
    ordered = sorted([*old, *new], key=lambda row: (row["experiment"], row["cell"]))
    assert lines == ordered


def test_a_trace_says_how_many_examples_a_model_has_seen(examples: ModuleType) -> None:
    rows = examples.partitions(seeds=(1,))
    for row in rows:
        row["provenance"]["contributors"][0]["examples"] = 12000
        row["provenance"]["contributors"][1:] = [
            {**origin, "examples": 1} for origin in row["provenance"]["contributors"][1:]
        ]
    page = reports(rows)["page"]
    assert page.count("<small>12,000 training examples</small>") == len(rows)
    assert page.count("<small>1 training example</small>") == sum(len(r["contributors"]) == 2 for r in rows)
    assert "training example" not in reports(examples.partitions(seeds=(1,)))["page"]
