"""Entity spans and scores against seqeval, on random sequences, well-formed or not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.tasks.entities import count_entities, f1, is_bio, precision, recall, spans

seqeval = pytest.importorskip("seqeval.metrics")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-a-b", "I-a-b"]


def test_known_sequences() -> None:
    assert spans(["B-PER", "I-PER", "O", "B-LOC"]) == {("PER", 0, 1), ("LOC", 3, 3)}
    assert spans(["I-PER", "I-PER"]) == {("PER", 0, 1)}  # I without B begins an entity
    assert spans(["B-PER", "I-LOC", "I-LOC"]) == {("PER", 0, 0), ("LOC", 1, 2)}
    assert spans(["B-PER", "B-PER"]) == {("PER", 0, 0), ("PER", 1, 1)}
    assert spans(["O", "I-LOC", "O", "I-LOC"]) == {("LOC", 1, 1), ("LOC", 3, 3)}
    assert spans([]) == set()


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_spans_are_seqevals(tags: list[str]) -> None:
    assert spans(tags) == set(seqeval.sequence_labeling.get_entities(tags))


def test_scores_are_seqevals_on_thousands_of_random_cases() -> None:
    generator = np.random.default_rng(7)
    malformed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1500):
            lengths = generator.integers(0, 9, generator.integers(1, 4))
            weights = generator.dirichlet(np.ones(len(TAGS)))
            true = [generator.choice(TAGS, n, p=weights).tolist() for n in lengths]
            predicted = [
                [tag if generator.random() < 0.6 else str(generator.choice(TAGS)) for tag in tags] for tags in true
            ]
            malformed += any(tags[:1] and tags[0].startswith("I-") for tags in predicted)
            counts = np.array([count_entities(p, t) for p, t in zip(predicted, true, strict=True)])
            expected = [
                metric(true, predicted, zero_division=0)
                for metric in (seqeval.precision_score, seqeval.recall_score, seqeval.f1_score)
            ]
            found = [precision(counts), recall(counts), f1(counts)]
            np.testing.assert_allclose(found, expected, atol=1e-12)
    assert malformed > 100  # the cases were not all well-formed


@pytest.mark.parametrize(("tag", "good"), [("O", True), ("B-X", True), ("I-X", True), ("B-", False), ("S-X", False)])
def test_scheme(tag: str, good: bool) -> None:
    assert is_bio(tag) is good
