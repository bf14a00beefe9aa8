"""The figures of a leaderboard, from result rows alone: scores, recovery, ranks, and what of a difference is chance.

Every suite counts the same, and so does every test of a suite with every seed. A suite is an experiment, or the part of
one with one kind of head initialisation where it has several. Scores are in points (× 100).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from merganser.lab.report.grid import EVERY, INDIVIDUAL, ResultGrid, TableLine, common_units, make_grids
from merganser.lab.report.rows import Domain, ResultRow
from merganser.lab.report.significance import SEED, holm, sign_flip

#: Bootstrap samples of an interval.
SAMPLES = 10_000


@dataclass(frozen=True, order=True)
class Item:
    """What two methods are compared on: a test of a merge of some contributors with a seed."""

    test: str
    contributors: tuple[str, ...]
    seed: int

    @property
    def test_alone(self) -> tuple[str, tuple[str, ...]]:
        """The same for all seeds."""
        return self.test, self.contributors


@dataclass(frozen=True)
class SuiteScores:
    """The scores of one domain of a suite.

    Attributes:
        name: of the suite.
        values: what rows call the method → item → points. The comparators are called by their kinds.
        items: what all that are complete have a score on.
    """

    name: str
    grid: ResultGrid
    values: Mapping[str, Mapping[Item, float]]
    items: tuple[Item, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the items."""
        return tuple(sorted({item.seed for item in self.items}))

    def is_complete(self, method: str) -> bool:
        """Whether a method has a score on every item."""
        return bool(self.items) and set(self.items) <= set(self.values.get(method, ()))

    def mean(self, method: str) -> float | None:
        """The mean over the items; None where one is missing."""
        found = self.values.get(method, {})
        return statistics.fmean(found[item] for item in self.items) if self.is_complete(method) else None


def suite_scores(rows: Sequence[ResultRow], domain: Domain = "in") -> list[SuiteScores]:
    """The scores of every suite that has tests of a domain.

    A merge that has less than half of the cells of the fullest one does not decide what the others are compared on.

    Args:
        rows: of several experiments.
        domain: of the tests.
    """
    found = []
    for name, own in groupby(sorted(rows, key=lambda row: row.experiment), key=lambda row: row.experiment):
        grids, _ = make_grids(list(own))
        for grid in grids:
            title = f"{name}, {grid.heads} heads" if len(grids) > 1 else name
            values = {method: _values(grid, method, domain) for method in grid.methods if method != EVERY}
            common, _ = common_units(values)
            if common:
                by_name = {method.name: own for method, own in values.items()}
                found.append(SuiteScores(title, grid, by_name, tuple(sorted(common))))
    return found


def _values(grid: ResultGrid, method: TableLine, domain: Domain) -> dict[Item, float]:
    found = {}
    for unit in grid.units:
        for test in grid.tests(domain, [unit]):
            value = grid.on_test(method, unit, test)
            if value is not None:
                found[Item(test, unit.contributors, unit.seed)] = value.points
    return found


def recovery(suite: SuiteScores, method: str) -> float | None:
    """The mean score of a method as a share of that of the individual models, each on its own test.

    None where either lacks a score, or the individual models have learnt nothing.
    """
    alone, mean = suite.mean(INDIVIDUAL.name), suite.mean(method)
    return None if alone is None or mean is None or alone <= 0 else mean / alone


@dataclass(frozen=True)
class Standing:
    """How a method does.

    Attributes:
        scores, recoveries: suite → the mean score, and the share of the individual models' one, where it is known.
        average, recovery: the means of these over all suites; None where one is missing.
        rank: the mean over the suites of its rank among the methods that are complete, from 1.
    """

    method: str
    scores: Mapping[str, float]
    recoveries: Mapping[str, float]
    average: float | None
    recovery: float | None
    rank: float | None = None


def standings(suites: Sequence[SuiteScores], methods: Sequence[str]) -> list[Standing]:
    """The methods by their average, the best first, and those that lack a suite last."""
    found = []
    for method in methods:
        scores = {suite.name: mean for suite in suites if (mean := suite.mean(method)) is not None}
        shares = {suite.name: share for suite in suites if (share := recovery(suite, method)) is not None}
        average, share = (
            statistics.fmean(own.values()) if suites and len(own) == len(suites) else None for own in (scores, shares)
        )
        found.append(Standing(method, scores, shares, average, share))
    whole = [standing for standing in found if standing.average is not None]
    ranks = mean_ranks([[standing.scores[suite.name] for standing in whole] for suite in suites])
    ranked = dict(zip((standing.method for standing in whole), ranks, strict=True))
    found = [replace(standing, rank=ranked.get(standing.method)) for standing in found]
    return sorted(found, key=lambda one: (one.average is None, -(one.average or 0.0), one.method))


def mean_ranks(scores: Sequence[Sequence[float]]) -> list[float]:
    """The mean rank of each column; 1 is the highest score of a row, and equal ones share the mean of their ranks.

    Args:
        scores: a row a suite, a number a method.
    """
    if not scores:
        return []
    values = np.asarray(scores, np.float64).round(9)  # sums of another order differ in the last bits
    higher = (values[:, None, :] > values[:, :, None]).sum(-1)
    equal = (values[:, None, :] == values[:, :, None]).sum(-1)
    mean: list[float] = (higher + (equal + 1) / 2).mean(0).tolist()
    return mean


@dataclass(frozen=True)
class Difference:
    """A method against a reference, on all that both have.

    Attributes:
        points: the mean over suites of the mean difference.
        low, high: the middle 95 % of it, by bootstrap over the tests and seeds of each suite.
        above, below: on how many tests and seeds the method is better, and worse.
        worst: the suite with the lowest mean difference, and this.
        p: of a two-sided sign-flip test over tests and seeds.
        p_tests: the same where all seeds of a test are flipped together.
        adjusted: p by Holm's correction for all that are compared with the reference.
    """

    method: str
    points: float
    low: float
    high: float
    above: int
    below: int
    worst: tuple[str, float]
    p: float
    p_tests: float
    adjusted: float = 1.0


def differences(suites: Sequence[SuiteScores], methods: Sequence[str], reference: str) -> list[Difference]:
    """Every other method that is complete against a reference, p-values adjusted together, in the order given."""
    complete = [one for one in methods if one != reference and all(suite.is_complete(one) for suite in suites)]
    if not suites or not all(suite.is_complete(reference) for suite in suites):
        return []
    found = [_difference(suites, method, reference) for method in complete]
    adjusted = holm([one.p for one in found])
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def _difference(suites: Sequence[SuiteScores], method: str, reference: str) -> Difference:
    by_suite = {
        suite.name: {item: suite.values[method][item] - suite.values[reference][item] for item in suite.items}
        for suite in suites
    }
    means = {name: statistics.fmean(own.values()) for name, own in by_suite.items()}
    # Weighed so that their sum is the mean over suites of the means over items.
    weighed = {
        (name, item): value / len(own) / len(suites) for name, own in by_suite.items() for item, value in own.items()
    }
    tests: dict[object, float] = {}
    for (name, item), value in weighed.items():
        tests[name, item.test_alone] = tests.get((name, item.test_alone), 0.0) + value
    low, high = interval([list(own.values()) for own in by_suite.values()])
    every = [value for own in by_suite.values() for value in own.values()]
    worst = min(means, key=lambda name: means[name])
    return Difference(
        method=method,
        points=statistics.fmean(means.values()),
        low=low,
        high=high,
        above=sum(value > 0 for value in every),
        below=sum(value < 0 for value in every),
        worst=(worst, means[worst]),
        p=sign_flip(list(weighed.values())).p,
        p_tests=sign_flip(list(tests.values())).p,
    )


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The middle 95 % of the mean of the groups' means, where each group is drawn from with replacement.

    Args:
        groups: numbers of each group, at least one.
    """
    generator = np.random.default_rng(SEED)
    means = np.zeros(SAMPLES)
    for group in groups:
        values = np.asarray(group, np.float64)
        means += values[generator.integers(0, len(values), (SAMPLES, len(values)))].mean(1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
