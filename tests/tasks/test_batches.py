"""Batches: padding, order, and that results come back in the order of the data."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser.tasks.batches import Collation, Feature, make_batches

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def features_of(lengths: list[int]) -> list[Feature]:
    return [Feature(list(range(10, 10 + length))) for length in lengths]


@given(LENGTHS, st.integers(1, 8), st.integers(0, 10))
def test_every_example_is_in_exactly_one_batch_and_comes_back(lengths: list[int], size: int, leading: int) -> None:
    features = features_of(lengths)
    batches = make_batches(features, Collation(0), size, leading=leading)
    seen = [index for indices, _ in batches for index in indices]
    assert sorted(seen) == list(range(len(lengths)))
    assert set(seen[:leading]) == set(range(min(leading, len(lengths))))
    for indices, tensors in batches:
        assert tensors["attention_mask"].sum(1).tolist() == [lengths[index] for index in indices]
    assert len(list(batches)) == len(batches)  # and once more


@given(LENGTHS, st.integers(1, 8))
def test_sorting_never_pads_more_in_full_batches(lengths: list[int], size: int) -> None:
    features = features_of(lengths * size)
    batches = make_batches(features, Collation(0), size)
    in_order = tuple(tuple(range(at, at + size)) for at in range(0, len(features), size))
    (real, sort), (same, plain) = batches.positions, replace(batches, plan=in_order).positions
    assert real == same <= sort <= plain


def test_tensors() -> None:
    batch = Collation(9)([Feature([1, 2, 3], [0, 0, 1], 1), Feature([4], [0], 0)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert "token_type_ids" not in Collation(9)([Feature([1])])


def test_labels_of_each_kind() -> None:
    assert Collation(0)([Feature([1], labels=0.5)])["labels"].dtype == torch.float32
    marks = Collation(0)([Feature([1], labels=[1.0, float("nan")]), Feature([1], labels=[0.0, 1.0])])["labels"]
    assert marks.shape == (2, 2) and marks.isnan().sum() == 1
    tokens = Collation(0, "labels")([Feature([1, 2], labels=[5, 6]), Feature([1], labels=[7])])
    assert tokens["labels"].tolist() == [[5, 6], [7, -100]]
    assert tokens["decoder_attention_mask"].tolist() == [[1, 1], [1, 0]]
