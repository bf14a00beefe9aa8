"""Figures of a leaderboard against float64 numpy by hand, and p-values against every sign assignment."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from merganser.lab.benchmark.summary import differences, interval, mean_ranks, recovery, standings, suite_scores
from merganser.lab.report.rows import ResultRow

METHODS = ("simple", "ties", "regmean")


def make_rows(suites: Mapping[str, Sequence[str]], seeds: Sequence[int] = (1, 2), **changes: float) -> list[ResultRow]:
    """Rows of layout ``all``: individual models, and each method, with scores from a seeded generator."""
    draw, rows = random.Random(5), []
    for suite, sets in suites.items():
        for seed in seeds:
            common: dict[str, Any] = {"format": 1, "experiment": suite, "suite": "s", "model": "m", "layout": "all"}
            for kind, method, people in (
                *(("individual", "individual", (name,)) for name in sets),
                *(("merge", method, tuple(sets)) for method in METHODS),
            ):
                values = {name: draw.uniform(0.3, 0.9) + changes.get(method, 0.0) for name in people}
                scores = {name: {"domain": "in", "metric": "f1", "value": value} for name, value in values.items()}
                scores["far"] = {"domain": "out", "metric": "f1", "value": draw.uniform(0.1, 0.3)}
                cell = f"{suite}-{seed}-{method}-{'-'.join(people)}"
                row = {"cell": cell, "kind": kind, "method": method, "title": method, "contributors": people}
                rows.append(ResultRow.model_validate({**common, **row, "seed": seed, "scores": scores}))
    return rows


def table(rows: Sequence[ResultRow], suite: str, method: str, domain: str = "in") -> np.ndarray:
    """Scores × 100 by hand: (seeds, tests) in the order of names; individual models each on its own."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if row.experiment == suite and row.method == method:
            for test, score in row.scores.items():
                if score.domain == domain:
                    found.setdefault((row.seed, test), []).append(100 * float(score.value or 0))
    seeds, tests = sorted({seed for seed, _ in found}), sorted({test for _, test in found})
    return np.array([[np.mean(found[seed, test]) for test in tests] for seed in seeds], np.float64)


SUITES = {"one": ("a", "b"), "two": ("c", "d", "e"), "three": ("f", "g")}


def test_scores_recovery_and_averages_are_those_of_numpy() -> None:
    rows = make_rows(SUITES)
    found = {one.method: one for one in standings(suite_scores(rows), METHODS)}
    means = {(s, m): table(rows, s, m).mean() for s in SUITES for m in (*METHODS, "individual")}
    for method in METHODS:
        shares = {suite: means[suite, method] / means[suite, "individual"] for suite in SUITES}
        assert found[method].scores == pytest.approx({suite: means[suite, method] for suite in SUITES}, abs=1e-10)
        assert found[method].recoveries == pytest.approx(shares, abs=1e-12)
        # Each suite counts the same, though one has three tests.
        assert found[method].average == pytest.approx(np.mean([means[s, method] for s in SUITES]), abs=1e-10)
        assert found[method].recovery == pytest.approx(np.mean(list(shares.values())), abs=1e-12)


def test_out_of_domain_is_apart_and_individual_is_the_mean_of_all_models() -> None:
    rows = make_rows(SUITES)
    for suite in suite_scores(rows, "out"):
        for method in ("individual", *METHODS):
            assert suite.mean(method) == pytest.approx(table(rows, suite.name, method, "out").mean(), abs=1e-10)


def test_ranks_by_hand() -> None:
    # Suite 1: b, then a and c tied; suite 2: a, b, c.
    assert mean_ranks([[0.5, 0.9, 0.5], [0.9, 0.5, 0.1]]) == [(2.5 + 1) / 2, (1 + 2) / 2, (2.5 + 3) / 2]
    assert mean_ranks([]) == []


def test_the_best_comes_first_and_who_lacks_a_suite_last_without_a_rank() -> None:
    rows = [
        row for row in make_rows(SUITES, ties=0.3, simple=0.6)
        if (row.experiment, row.method) != ("two", "simple")
    ]  # fmt: skip
    order = standings(suite_scores(rows), METHODS)
    assert [one.method for one in order] == ["ties", "regmean", "simple"]
    assert order[-1].rank is None and order[-1].average is None and set(order[-1].scores) == {"one", "three"}
    assert sorted(one.rank for one in order[:2] if one.rank) == [1.0, 2.0]
    assert [one.method for one in differences(suite_scores(rows), METHODS, "regmean")] == ["ties"]
    assert differences(suite_scores(rows), METHODS, "simple") == []


def test_p_values_are_those_of_every_sign_assignment() -> None:
    rows = make_rows(SUITES, ties=0.1)
    suites = suite_scores(rows)
    gaps = [table(rows, suite, "ties") - table(rows, suite, "simple") for suite in SUITES]
    seen = np.mean([gap.mean() for gap in gaps])
    weights = [gap / gap.size / len(gaps) for gap in gaps]
    every, by_test = np.concatenate([w.ravel() for w in weights]), np.concatenate([w.sum(0) for w in weights])
    assert len(every) == 14 and len(by_test) == 7

    def p(values: np.ndarray) -> float:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
        return float((np.abs(signs @ values) >= abs(seen) - 1e-9).mean())

    found = {one.method: one for one in differences(suites, METHODS, "simple")}
    one = found["ties"]
    assert (one.p, one.p_tests) == pytest.approx((p(every), p(by_test)), abs=1e-12)
    assert one.points == pytest.approx(seen, abs=1e-10)
    assert (one.above, one.below) == ((every > 0).sum(), (every < 0).sum())
    assert one.worst[1] == pytest.approx(min(gap.mean() for gap in gaps), abs=1e-10)
    ps = sorted(other.p for other in found.values())  # Holm of two: twice the smaller, and no less than that
    assert sorted(other.adjusted for other in found.values()) == pytest.approx(
        [min(1, 2 * ps[0]), min(1, max(2 * ps[0], ps[1]))]
    )


def test_a_suite_with_many_tests_counts_no_more_than_another() -> None:
    """Ten tests that lose a little against one that gains as much: the mean over suites is zero."""
    rows = []
    for row in make_rows({"many": [f"t{i}" for i in range(10)], "one": ["x", "y"]}, seeds=[1]):
        gain = {"many": -0.01, "one": 0.01}[row.experiment] if row.method == "ties" else 0.0
        if row.kind == "merge":
            scores = {name: score.model_copy(update={"value": 0.5 + gain}) for name, score in row.scores.items()}
            row = row.model_copy(update={"scores": scores})
        rows.append(row)
    (found,) = differences(suite_scores(rows), ["ties", "simple"], "simple")
    assert found.points == pytest.approx(0, abs=1e-12) and found.p == 1.0
    assert found.worst == ("many", pytest.approx(-1.0))


def test_the_interval_is_that_of_a_mean() -> None:
    """Of normal numbers it is about ± 1.96 standard errors; of equal ones it has no width; groups count the same."""
    draw = np.random.default_rng(3)
    groups = [draw.normal(1, 2, 400), draw.normal(3, 1, 100)]
    error = np.sqrt(sum(group.var() / len(group) for group in groups)) / 2
    middle = np.mean([group.mean() for group in groups])
    low, high = interval([group.tolist() for group in groups])
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.1 * error)
    assert interval([[2.0, 2.0], [4.0]]) == (3.0, 3.0)
    assert interval([[0.0, 1.0]]) == interval([[0.0, 1.0]])


def test_models_that_have_learnt_nothing_are_recovered_by_nobody() -> None:
    rows = []
    for row in make_rows({"one": ("a", "b")}):
        if row.kind == "individual":
            scores = {name: score.model_copy(update={"value": 0.0}) for name, score in row.scores.items()}
            row = row.model_copy(update={"scores": scores})
        rows.append(row)
    (suite,) = suite_scores(rows)
    assert recovery(suite, "ties") is None and suite.mean("ties") is not None
