"""The partition rule: by hand, and its laws on random cases."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import UserError
from merganser.lab.suites.partition import partition


def counts(labels: list[int], part: list[int]) -> Counter[int]:
    return Counter(labels[index] for index in part)


def main_labels(labels: list[int], total: int, seed: int) -> list[int]:
    """The shuffled labels, drawn as the rule says: first the examples, then the labels."""
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(labels))[:total]
    names = sorted({labels[index] for index in drawn})
    return [names[place] for place in generator.permutation(len(names))]


def test_two_parts_of_two_labels() -> None:
    labels = [0] * 100 + [1] * 50
    for seed in range(6):
        first, last = partition(labels, 2, 150, seed)
        if main_labels(labels, 150, seed)[0] == 0:
            assert counts(labels, first) == {0: 80, 1: 10}
            assert counts(labels, last) == {0: 20, 1: 40}
        else:
            assert counts(labels, first) == {0: 20, 1: 40}
            assert counts(labels, last) == {0: 80, 1: 10}
    assert len({main_labels(labels, 150, seed)[0] for seed in range(6)}) == 2


def test_three_parts_take_one_after_the_other_from_what_is_left() -> None:
    labels = [5, 6, 7] * 100
    a, b, c = main_labels(labels, 300, 3)
    first, second, last = partition(labels, 3, 300, 3)
    assert counts(labels, first) == {a: 80, b: 10, c: 10}  # 0.2 / 2 of 100
    assert counts(labels, second) == {a: 2, b: 80, c: 9}  # of 20 and of 90; 80% of all 100
    assert counts(labels, last) == {a: 18, b: 10, c: 81}


def test_shares_are_rounded_down_without_floating_point_slips() -> None:
    labels = [0] * 9 + [1] * 14
    first, _ = partition(labels, 2, 23, 0)
    main, other = main_labels(labels, 23, 0)
    sizes = {0: 9, 1: 14}
    assert counts(labels, first) == {main: int(0.8 * sizes[main]), other: int(0.2 * sizes[other])}
    labels = [0] * 15 + [1] * 15  # 0.2 / 3 * 15 is 1, or a little less in floating point
    main, other = main_labels(labels, 30, 0)
    assert counts(labels, partition(labels, 4, 30, 0)[0]) == {main: 12, other: 1}


def test_more_parts_than_labels_go_round() -> None:
    labels = [0, 1] * 100
    a, b = main_labels(labels, 200, 1)
    parts = partition(labels, 4, 200, 1)
    assert counts(labels, parts[0]) == {a: 80, b: 6}  # 0.2 / 3 of 100
    assert counts(labels, parts[1]) == {a: 1, b: 80}
    assert counts(labels, parts[2]) == Counter({a: 19}) + Counter({b: 14 // 15})  # 80 are no longer there
    assert counts(labels, parts[3]) == {b: 14}


def test_regression_targets_are_cut_into_as_many_bins_as_parts() -> None:
    targets = [0.0] * 40 + [2.49] * 60 + [2.5] * 30 + [5.0] * 70  # edges at 0, 2.5 and 5
    bins = [0] * 100 + [1] * 100
    seen = set()
    for seed in range(6):
        first, last = partition(targets, 2, 200, seed, regression=True)
        assert sorted(counts(bins, first).values()) == sorted(counts(bins, last).values()) == [20, 80]
        assert [first, last] == partition(bins, 2, 200, seed)
        seen.add(counts(bins, first)[0])
    assert seen == {20, 80}
    parts = partition([0.0, 1.0, 10.0] * 20, 4, 60, 0, regression=True)  # the two bins between are empty
    assert sorted(index for part in parts for index in part) == list(range(60))


def test_constant_targets_are_one_bin() -> None:
    assert [len(part) for part in partition([3.0] * 10, 2, 10, 0, regression=True)] == [8, 2]


def test_iid_parts_are_slices_of_the_sample() -> None:
    labels = [0] * 900 + [1] * 100
    drawn = np.random.default_rng(4).permutation(1000)[:301].tolist()
    parts = partition(labels, 3, 301, 4, iid=True)
    assert parts == [sorted(drawn[:100]), sorted(drawn[100:200]), sorted(drawn[200:])]


def test_both_kinds_share_out_the_same_examples() -> None:
    labels = [0, 1, 2] * 100
    iid, other = (partition(labels, 2, 90, 5, iid=iid) for iid in (True, False))
    assert sorted(chain(*iid)) == sorted(chain(*other))


def test_the_seed_decides() -> None:
    labels = [0, 1, 2] * 100
    assert partition(labels, 2, 90, 5) == partition(labels, 2, 90, 5)
    assert partition(labels, 2, 90, 5) != partition(labels, 2, 90, 6)


@settings(max_examples=300, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 4), min_size=30, max_size=120),
    parts=st.integers(2, 5),
    left_out=st.integers(0, 10),
    seed=st.integers(0, 2**32),
    iid=st.booleans(),
    regression=st.booleans(),
)
def test_parts_are_disjoint_complete_and_ordered(
    labels: list[int], parts: int, left_out: int, seed: int, iid: bool, regression: bool
) -> None:
    total = len(labels) - left_out
    try:
        found = partition(labels, parts, total, seed, iid=iid, regression=regression)
    except UserError as error:
        assert "would get no example" in str(error) and not iid
        return
    together = [index for part in found for index in part]
    assert len(found) == parts and all(found)
    assert len(set(together)) == len(together) == total
    assert all(part == sorted(part) and part[0] >= 0 and part[-1] < len(labels) for part in found)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(5, 60), min_size=2, max_size=5), seed=st.integers(0, 1000), parts=st.integers(2, 4))
def test_label_shares(sizes: list[int], seed: int, parts: int) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    names = main_labels(labels, len(labels), seed)
    first = counts(labels, partition(labels, parts, len(labels), seed)[0])
    assert first[names[0]] == sizes[names[0]] * 4 // 5
    for label in names[1:]:
        assert abs(first[label] - 0.2 / (parts - 1) * sizes[label]) < 1 + 1e-9


@pytest.mark.parametrize(
    ("labels", "parts", "total", "seed", "says"),
    [
        ([0, 1] * 5, 1, 4, 0, "1 parts"),
        ([0, 1] * 5, 2, 11, 0, "11 examples are to be shared out, but there are 10"),
        ([0, 1] * 5, 3, 2, 0, "too few for 3 parts"),
        ([0, 1] * 5, 2, 4, -1, "the seed is -1"),
        ([0, 1], 2, 2, 0, "part 1 of 2 would get no example"),
    ],
)
def test_mistakes(labels: list[int], parts: int, total: int, seed: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        partition(labels, parts, total, seed)


def test_targets_must_be_finite() -> None:
    with pytest.raises(UserError, match="not finite"):
        partition([0.0, float("nan"), 1.0], 2, 3, 0, regression=True)
