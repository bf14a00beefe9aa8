"""Every table recomputed from the raw rows with plain Python; marks, stars, gaps."""

import itertools
import statistics
from types import ModuleType
from typing import Any

import pytest

from merganser.errors import RecipeError
from merganser.lab.report.grid import ResultGrid, make_grids
from merganser.lab.report.layouts import grid_tables
from merganser.lab.report.rows import ResultRow
from merganser.lab.report.sections import make_sections
from merganser.lab.report.significance import holm, sign_flip
from merganser.lab.report.tables import Table, TableCell

Row = dict[str, Any]


def parsed(rows: list[Row]) -> list[ResultRow]:
    return [ResultRow.model_validate(row) for row in rows]


def grids_of(rows: list[Row]) -> list[ResultGrid]:
    return make_grids(parsed(rows))[0]


def tables_of(rows: list[Row], against: str = "simple", which: int = 0) -> dict[str, Table]:
    return {table.key: table for table in grid_tables(make_grids(parsed(rows), against)[0][which])}


def cell(table: Table, line: str, column: str, group: str = "") -> TableCell:
    (found,) = [one for one in table.lines if one.title == line and (not group or one.group == group)]
    return found.cells[table.columns.index(column)]


def mean_and_deviation(by_seed: list[float]) -> tuple[float, float]:
    return 100 * statistics.fmean(by_seed), 100 * statistics.stdev(by_seed)


def check(found: TableCell, by_seed: list[float]) -> None:
    mean, deviation = mean_and_deviation(by_seed)
    assert found.value == pytest.approx(mean)
    assert found.std == pytest.approx(deviation)


def test_pairs_averages(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2, 3))
    for which, heads in enumerate(("same", "different")):
        table = tables_of(rows, which=which)["summary"]
        for title, domain in (("In-domain", "in"), ("Out-of-domain", "out")):
            for name in ("Simple", "Fisher", "RegMean", "Ensemble"):
                by_seed = [
                    statistics.fmean(
                        r["average"][domain] for r in rows if (r["title"], r["heads"], r["seed"]) == (name, heads, seed)
                    )
                    for seed in (1, 2, 3)
                ]
                check(cell(table, name, title), by_seed)
            alone = [r for r in rows if r["kind"] == "individual" and r["heads"] == heads]
            # every model is in as many pairs as any other, so that the average over pairs is the one over models
            by_seed = [statistics.fmean(r["average"][domain] for r in alone if r["seed"] == s) for s in (1, 2, 3)]
            check(cell(table, "Individual", title), by_seed)
        assert cell(table, "RegMean", "In-domain").n == 30
        assert len(cell(table, "RegMean", "In-domain").cells) == 30


def test_each_pair_and_the_pairs_won(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2), heads=("same",))
    tables = tables_of(rows)
    won = dict.fromkeys(examples.MERGES.values(), 0)
    for pair in itertools.combinations(examples.EMOTION, 2):
        scores = {}
        for name in won:
            of_pair = [r for r in rows if r["title"] == name and tuple(r["contributors"]) == pair]
            by_seed = [r["average"]["in"] for r in sorted(of_pair, key=lambda r: r["seed"])]
            found = cell(tables["each-in"], " + ".join(pair), name)
            check(found, by_seed)
            assert found.cells == tuple(r["cell"] for r in sorted(of_pair, key=lambda r: r["seed"])), (
                "a number names its cells"
            )
            scores[name] = statistics.fmean(by_seed)
        ranked = sorted(scores, key=lambda name: -scores[name])
        won[ranked[0]] += 1
        marks = [cell(tables["each-in"], " + ".join(pair), name).mark for name in ranked]
        assert marks == ["best", "second", ""]
        assert cell(tables["each-in"], " + ".join(pair), "Individual").mark == ""
    for name, count in won.items():
        assert cell(tables["summary"], name, "Pairs won, in-domain").text == f"{count} of 10"
    total = tables["each-in"].lines[-1]
    assert total.total and total.cells[-1].value == cell(tables["summary"], "RegMean", "In-domain").value


def test_greedy_tables(examples: ModuleType) -> None:
    rows = examples.greedy()
    tables = tables_of(rows)
    for size, (name, domain) in itertools.product(
        (2, 3, 4, 5), itertools.product(("Fisher", "RegMean"), ("in", "out"))
    ):
        by_seed = [
            r["average"][domain]
            for seed in (1, 2, 3)
            for r in rows
            if (r["title"], r["seed"], len(r["contributors"])) == (name, seed, size)
        ]
        check(cell(tables[f"greedy-{domain}"], name, str(size)), by_seed)
    alone = {(r["contributors"][0], r["seed"]): r["scores"] for r in rows if r["kind"] == "individual"}
    first = examples.EMOTION[:3]
    own = [statistics.fmean(alone[n, s][n]["value"] for n in first) for s in (1, 2, 3)]
    check(cell(tables["greedy-in"], "Individual", "3"), own)
    every = [statistics.fmean(alone[n, s][t]["value"] for n in first for t in first) for s in (1, 2, 3)]
    check(cell(tables["greedy-in"], "Individual, all", "3"), every)
    outs = [statistics.fmean(alone[n, s][t]["value"] for n in first for t in examples.EMOTION_OUT) for s in (1, 2, 3)]
    check(cell(tables["greedy-out"], "Individual", "3"), outs)
    assert cell(tables["greedy-in"], "Multi-task", "4").value is None
    whole = [r for r in rows if r["title"] == "RegMean" and len(r["contributors"]) == 5]
    check(cell(tables["tests"], "isear", "RegMean"), [r["scores"]["isear"]["value"] for r in whole])
    check(cell(tables["tests"], "Average", "RegMean", "Out-of-domain"), [r["average"]["out"] for r in whole])
    assert "which differ" in tables["greedy-in"].caption and "which differ" not in tables["greedy-out"].caption


def test_partitions_table(examples: ModuleType) -> None:
    rows = examples.partitions()
    table = tables_of(rows)["tests"]
    assert [line.title for line in table.lines] == [*sorted(examples.GLUE), "Average"]
    merged = [r for r in rows if r["title"] == "Fisher"]
    check(cell(table, "rte", "Fisher"), [r["scores"]["rte"]["value"] for r in merged if "rte" in r["scores"]])
    check(
        cell(table, "Average", "Fisher"),
        [statistics.fmean(r["average"]["in"] for r in merged if r["seed"] == s) for s in (1, 2, 3)],
    )
    parts = [r for r in rows if r["kind"] == "individual" and "rte" in r["scores"]]
    by_seed = [statistics.fmean(r["average"]["in"] for r in parts if r["seed"] == s) for s in (1, 2, 3)]
    check(cell(table, "rte", "Individual"), by_seed)


def test_all_at_once_with_one_seed_has_no_deviation(examples: ModuleType) -> None:
    rows = examples.all_at_once()
    table = tables_of(rows)["tests"]
    found = cell(table, "tec", "Simple")
    (row,) = [r for r in rows if r["title"] == "Simple"]
    assert found.value == pytest.approx(100 * row["scores"]["tec"]["value"])
    assert found.std is None and found.deviation == ""


def test_each_model_alone_on_every_test(examples: ModuleType) -> None:
    rows = examples.all_at_once(seeds=(1, 2))
    table = tables_of(rows)["models"]
    for name, test in itertools.product(examples.EMOTION, examples.EMOTION):
        alone = [r for r in rows if r["kind"] == "individual" and r["contributors"] == [name]]
        found = cell(table, name, test)
        check(found, [r["scores"][test]["value"] for r in alone])
        assert found.cells == tuple(r["cell"] for r in alone)
    shades = [c.shade for line in table.lines for c in line.cells]
    assert (min(shades), max(shades)) == (0, 1)
    assert "models" not in tables_of(examples.greedy()) and "models" not in tables_of(examples.partitions())


def test_standard_errors_are_said_as_ranges_and_averages_have_their_own(examples: ModuleType) -> None:
    rows = examples.all_at_once()
    assert not any("standard error" in told for told in make_sections(parsed(rows), "simple")[0].how)
    for row in rows:
        for test, score in row["scores"].items():
            score["standard_error"] = 0.012 if test == "tec" else 0.02
    told = " ".join(make_sections(parsed(rows), "simple")[0].how)
    # five tests: sqrt(4 * 2.0² + 1.2²) / 5 = 0.8; five others: 2.0 / sqrt(5) = 0.9
    assert "examples) of a score is 1.2 to 2.0 points, that of an average over the tests 0.8 to 0.9." in told


def test_labels(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2), heads=("same",))
    table = tables_of(rows)["labels"]
    merged = [r for r in rows if r["title"] == "RegMean"]
    by_seed = [
        statistics.fmean(
            score["per_label"]["joy"]
            for r in merged
            if r["seed"] == seed
            for score in r["scores"].values()
            if score["domain"] == "in"
        )
        for seed in (1, 2)
    ]
    check(cell(table, "joy", "RegMean"), by_seed)
    shades = [c.shade for line in table.lines for c in line.cells]
    assert (min(shades), max(shades)) == (0, 1)


def test_stars_are_the_paired_tests_over_pairs_and_seeds(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2, 3), heads=("same",))
    tables = tables_of(rows)
    ps, keys = [], []
    for domain, name in itertools.product(("in", "out"), ("Fisher", "RegMean")):
        scores = {
            title: {
                (tuple(r["contributors"]), r["seed"]): 100 * r["average"][domain] for r in rows if r["title"] == title
            }
            for title in (name, "Simple")
        }
        differences = [scores[name][unit] - scores["Simple"][unit] for unit in sorted(scores["Simple"])]
        found = sign_flip(differences)
        ps.append(found.p)
        keys.append(("In-domain" if domain == "in" else "Out-of-domain", name))
        line = cell(tables["significance"], name, "Difference", keys[-1][0])
        assert line.value == pytest.approx(statistics.fmean(differences))
        assert cell(tables["significance"], name, "n", keys[-1][0]).value == 30
    for (group, name), p, adjusted in zip(keys, ps, holm(ps), strict=True):
        assert cell(tables["significance"], name, "p", group).value == pytest.approx(p, abs=1e-4)
        assert cell(tables["significance"], name, "p, Holm", group).value == pytest.approx(adjusted, abs=1e-4)
        stars = "**" if adjusted < 0.01 else "*" if adjusted < 0.05 else ""
        assert cell(tables["summary"], name, group).stars == stars
    assert cell(tables["summary"], "Simple", "In-domain").stars == ""


def test_another_reference(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1,), heads=("same",))
    lines = tables_of(rows, against="RegMean")["significance"].lines
    assert {line.title for line in lines} == {"Simple", "Fisher"}
    parsed = [ResultRow.model_validate(row) for row in rows]
    with pytest.raises(RecipeError, match="did you mean 'regmean'"):
        make_sections(parsed, "regmaen")
    (section,) = make_sections([row for row in parsed if row.method != "simple"], "simple")
    assert any("no merge “simple”" in notice for notice in section.blocks[0].notices)


def test_ties_share_the_mark(examples: ModuleType) -> None:
    rows = [r for r in examples.partitions(seeds=(1, 2)) if r["kind"] == "merge"]
    value = {"simple": 0.5, "fisher": 0.5, "regmean": 0.4}
    for row in rows:
        for score in row["scores"].values():
            score["value"] = value[row["method"]]
        row["average"] = {"in": value[row["method"]]}
    table = tables_of(rows)["tests"]
    assert [c.mark for c in table.lines[0].cells] == ["best", "best", "second"]


def test_an_incomplete_grid_is_averaged_over_what_all_have_and_says_so(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2, 3), heads=("same",))
    gone = [r for r in rows if r["title"] == "Fisher" and r["seed"] == 3 and "tec" in r["contributors"]]
    rest = [r for r in rows if r not in gone]
    table = tables_of(rest)["summary"]
    without = {(tuple(r["contributors"]), 3) for r in gone}
    by_seed = [
        statistics.fmean(
            r["average"]["in"]
            for r in rest
            if r["title"] == "RegMean" and r["seed"] == s and (tuple(r["contributors"]), s) not in without
        )
        for s in (1, 2, 3)
    ]
    check(cell(table, "RegMean", "In-domain"), by_seed)
    assert cell(table, "RegMean", "In-domain").n == cell(table, "Fisher", "In-domain").n == 26
    (grid,) = grids_of(rest)
    (told,) = grid.gaps()
    assert told.startswith("Fisher has 26 of 30 cells. Missing: tec + isear (seed 3)")


def test_a_method_that_has_just_begun_is_counted_and_never_best(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2, 3), heads=("same",))
    kept = 0
    rest = []
    for row in rows:
        if row["title"] == "RegMean":
            kept += 1
            if kept > 4:
                continue
        rest.append(row)
    table = tables_of(rest)["summary"]
    begun = cell(table, "RegMean", "In-domain")
    assert begun.partial and begun.n == 4 and begun.mark == ""
    assert cell(table, "Fisher", "In-domain").n == 30 and cell(table, "Fisher", "In-domain").mark == "best"


def test_pairs_that_nobody_has_computed_are_noticed(examples: ModuleType) -> None:
    rows = [
        r
        for r in examples.pairs(seeds=(1, 2), heads=("same",))
        if r["kind"] == "individual" or r["seed"] == 1 or set(r["contributors"]) != {"tec", "isear"}
    ]
    (grid,) = grids_of(rows)
    assert grid.gaps() == ["Only 19 of 20 pairs × seeds have been computed by any method."]
    assert not grids_of(examples.greedy())[0].gaps(), "multi-task learning on all models only is no gap"


def test_a_missing_specialist_leaves_no_number_that_others_made_up(examples: ModuleType) -> None:
    rows = [
        r
        for r in examples.pairs(seeds=(1,), heads=("same",))
        if not (r["kind"] == "individual" and r["contributors"] == ["tec"])
    ]
    table = tables_of(rows)["each-in"]
    assert cell(table, "tec + isear", "Individual").value is None
    assert cell(table, "isear + crowdflower", "Individual").value is not None


def test_the_newest_of_two_rows_of_a_cell_counts(examples: ModuleType) -> None:
    rows = examples.partitions(seeds=(1,))
    old = next(r for r in rows if r["kind"] == "merge")
    new = {
        **old,
        "cell": "0" * 16,
        "average": {"in": 0.99},
        "provenance": {**old["provenance"], "finished": "2027-01-01T00:00:00Z"},
    }
    parsed = [ResultRow.model_validate(row) for row in [*rows, new]]
    grids, superseded = make_grids(parsed)
    assert [row.cell for row in superseded] == [old["cell"]]
    assert "0" * 16 in {row.cell for row in grids[0].rows}
    (section,) = make_sections(parsed, "simple")
    assert old["cell"] in section.notices[0]


def test_an_individual_model_that_is_scored_again_on_fewer_tests_displaces_nothing(examples: ModuleType) -> None:
    """An experiment with some of the contributors scores the same models on fewer tests, later."""
    rows = examples.greedy(seeds=(1,))
    full = next(r for r in rows if r["kind"] == "individual")
    name = full["contributors"][0]

    def later(tests: list[str], weights: str | None, **changes: Any) -> Row:
        origin = {**full["provenance"]["contributors"][0], "weights": weights}
        provenance = {**full["provenance"], "finished": "2027-01-01T00:00:00Z", "contributors": [origin]}
        scores = {test: {**full["scores"][test], **changes} for test in tests}
        return {**full, "cell": "0" * 16, "scores": scores, "provenance": provenance}

    def kept(row: Row) -> tuple[str, list[str]]:
        (grid,), old = make_grids([ResultRow.model_validate(r) for r in [*rows, row]])
        (one,) = [r for r in grid.rows if r.kind == "individual" and r.contributors == (name,)]
        return one.cell, [r.cell for r in old]

    weights = full["provenance"]["contributors"][0]["weights"]
    every = list(full["scores"])
    assert kept(later([name], weights)) == (full["cell"], [])
    assert kept(later(every, weights)) == (full["cell"], [])
    superseded = ("0" * 16, [full["cell"]])
    assert kept(later([name], "another model")) == superseded
    assert kept(later([name], weights, value=0.123)) == superseded, "the same test says something else"
    for row in rows:
        for origin in row["provenance"]["contributors"]:
            origin["weights"] = None
    assert kept(later([name], None)) == superseded, "nobody knows whether it is the same model"
    merge = next(r for r in rows if r["kind"] == "merge")
    again = {**merge, "cell": "0" * 16, "scores": dict(list(merge["scores"].items())[:1])}
    again["provenance"] = {**merge["provenance"], "finished": "2027-01-01T00:00:00Z"}
    assert kept(again) == (full["cell"], [merge["cell"]]), "of merges the newest counts, always"


def test_searched_methods_are_told_apart_and_their_coefficients_listed(examples: ModuleType) -> None:
    rows = examples.glue_pairs(seeds=(1,))
    (grid,) = grids_of(rows)
    assert [m.title for m in grid.merges] == ["Simple", "Fisher", "RegMean", "RegMean, searched"]
    (section,) = make_sections([ResultRow.model_validate(row) for row in rows], "simple")
    (table,) = [table for table in section.blocks[0].tables if table.key == "chosen"]
    row = next(r for r in rows if r["chosen"] and r["contributors"] == ["cola", "sst2"])
    best = row["chosen"]["candidates"][row["chosen"]["best"]]
    x, y = best["coefficients"]
    (line,) = [line for line in table.lines if line.title == "cola + sst2"]
    assert line.cells[0].text == f"{x:.2g} cola + {y:.2g} sst2"
    assert line.cells[2].value == pytest.approx(100 * best["dev"])
    assert best["dev"] == max(c["dev"] for c in row["chosen"]["candidates"])


def test_published_merges_come_first_and_others_by_name(examples: ModuleType) -> None:
    names = ("ties", "RegMean, as published", "actmat", "regmean", "fisher", "simple")
    common = {"layout": "all", "contributors": ("a", "b"), "seed": 1, "tests": {"t": "in"}}
    rows = [examples.make_row(kind="merge", method=name, title=name, **common) for name in names]
    (grid,) = grids_of(rows)
    ordered = ["simple", "fisher", "regmean", "RegMean, as published", "actmat", "ties"]
    assert [method.title for method in grid.merges] == ordered
