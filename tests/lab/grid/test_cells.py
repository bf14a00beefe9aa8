"""The grid: which cells a configuration has, and which seeds their contributors are trained from."""

from __future__ import annotations

from typing import Any

import pytest

from merganser.lab.grid.cells import cell_from, expand, generator_seed, models_of
from merganser.lab.grid.compute import candidates, scored_on
from merganser.lab.grid.config import ExperimentConfig, Search


def config(**changes: Any) -> ExperimentConfig:
    values: dict[str, Any] = {
        "name": "trial",
        "suite": {"name": "emotion", "root": "r"},
        "pretrained": {"model": "base", "title": "Base"},
        "contributors": ["a", "b", "c"],
        "layout": "pairs",
        "methods": ["simple", "regmean"],
        "seeds": [1, 2, 3],
    }
    return ExperimentConfig.model_validate({**values, **changes})


def merges(cells: list[Any], method: str = "simple") -> list[Any]:
    return [cell for cell in cells if cell.method == method]


def test_different_heads_follow_the_papers_rule():
    """PAPER: model i is trained from seed ((g + i − 2) mod n) + 1 for generator g."""
    generators = [1, 2, 3, 4, 5]
    for g in generators:
        for i in range(1, 8):
            assert generator_seed(i - 1, g, generators, "different") == ((g + i - 2) % 5) + 1
            assert generator_seed(i - 1, g, generators, "same") == g


def test_pairs():
    cells = expand(config(heads=["same", "different"]))
    found = merges(cells)
    assert len(found) == 3 * 3 * 2
    assert {tuple(s.name for s in cell.contributors) for cell in found} == {("a", "b"), ("a", "c"), ("b", "c")}
    different = [cell for cell in found if cell.heads == "different"]
    assert all(cell.contributors[0].seed != cell.contributors[1].seed for cell in different)
    assert len(models_of(cells)) == 9  # both head initialisations use the same models


def test_greedy_grows_in_the_given_order_and_multitask_comes_once():
    made = config(layout="greedy", comparators=["individual", "ensemble", "multitask"], seeds=[1])
    cells = expand(made, ["c", "a", "b"])
    assert [tuple(s.name for s in cell.contributors) for cell in merges(cells)] == [("c", "a"), ("c", "a", "b")]
    assert len(merges(cells, "individual")) == 3
    assert [len(cell.contributors) for cell in merges(cells, "multitask")] == [3]
    fixed = config(layout="greedy", order=["b", "c", "a"], seeds=[1])
    assert [s.name for s in merges(expand(fixed))[-1].contributors] == ["b", "c", "a"]


def test_partitions_make_contributors_of_one_set():
    made = config(layout="partitions", partitions={"parts": 2, "total": 10}, seeds=[4])
    found = merges(expand(made))
    assert [[s.name for s in cell.contributors] for cell in found] == [
        ["a/1", "a/2"], ["b/1", "b/2"], ["c/1", "c/2"],
    ]  # fmt: skip
    assert all(s.part_seed == 4 and s.set == "a" for s in found[0].contributors)


def test_cells_survive_json():
    for cell in expand(config(layout="partitions")):
        assert cell_from(cell.to_json()) == cell


def test_what_cells_are_scored_on():
    made = config(layout="greedy", tests={"out_of_domain": ["x", "y"], "out_split": "all"}, seeds=[1])
    cells = expand(made)
    pair = merges(cells)[0]
    assert scored_on(made, pair) == [
        ("a", "test", "in"), ("b", "test", "in"), ("x", "all", "out"), ("y", "all", "out"),
    ]  # fmt: skip
    single = merges(cells, "individual")[0]
    assert [name for name, _, domain in scored_on(made, single) if domain == "other"] == ["b", "c"]


@pytest.mark.parametrize(("count", "number"), [(2, 11), (4, 21)])
def test_candidates_are_coefficients_and_hold_the_uniform_ones(count, number):
    found = candidates(Search(grid=11, samples=20), count, seed=3)
    assert found[0] == (1 / count,) * count
    assert len(found) == number and len(set(found)) == number
    assert all(abs(sum(one) - 1) < 1e-9 and min(one) > 0 for one in found)
    assert found == candidates(Search(grid=11, samples=20), count, seed=3)
