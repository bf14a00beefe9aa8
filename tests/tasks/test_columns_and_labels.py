"""Finding columns, reading labels: what is accepted, and what each refusal says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from merganser.errors import CheckpointError, DataError, UserError
from merganser.tasks import TASKS
from merganser.tasks.columns import Columns, resolve, texts
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace, read_classes, spread, union


def rows_of(*rows: dict[str, Any], **class_names: tuple[str, ...]) -> Rows:
    return Rows("d.jsonl", rows, tuple(("d.jsonl", n) for n in range(1, len(rows) + 1)), class_names)


@pytest.mark.parametrize(
    ("columns", "text", "pair", "label"),
    [
        (("text", "label"), "text", None, "label"),
        (("idx", "Sentence", "Labels"), "Sentence", None, "Labels"),
        (("sentence1", "sentence2", "label", "idx"), "sentence1", "sentence2", "label"),
        (("premise", "hypothesis", "label"), "premise", "hypothesis", "label"),
        (("question", "sentence", "label"), "question", "sentence", "label"),
        (("content", "class"), "content", None, "class"),
    ],
)
def test_usual_names(columns: tuple[str, ...], text: str, pair: str | None, label: str) -> None:
    rows = rows_of(dict.fromkeys(columns, "x"))
    found = resolve(rows, Columns(), ("text", "label"), ("text_pair",))
    assert (found.text, found.text_pair, found.label) == (text, pair, label)


def test_a_named_text_brings_no_partner_of_its_own() -> None:
    rows = rows_of({"sentence1": "a", "sentence2": "b", "label": 0})
    assert resolve(rows, Columns(text="sentence1"), ("text",), ("text_pair",)).text_pair is None


def test_a_column_that_is_not_there_lists_those_that_are() -> None:
    rows = rows_of({"headline": "x", "stars": 1})
    with pytest.raises(DataError) as caught:
        resolve(rows, Columns(), ("text", "label"))
    assert "no column for the text was found; the columns are headline, stars" in str(caught.value)
    assert "--text-column" in str(caught.value)
    with pytest.raises(DataError, match=r"no column 'star' \(--label-column\); the columns are headline, stars"):
        resolve(rows, Columns(text="headline", label="star"), ("text", "label"))
    with pytest.raises(UserError, match="unknown column role 'lable'"):
        Columns.of({"lable": "x"})


def test_missing_and_foreign_fields_name_file_and_line() -> None:
    rows = rows_of({"text": "a"}, {"label": 1}, {"text": 5})
    with pytest.raises(DataError, match=r"^d\.jsonl:2: the row has no 'text'"):
        texts(rows, "text")
    with pytest.raises(DataError, match=r"^d\.jsonl:2: 'text' is int '5', not text"):
        texts(rows_of({"text": "a"}, {"text": 5}), "text")


SPACE = LabelSpace(("negative", "neutral", "positive"))


@pytest.mark.parametrize("labels", [[0, 2, 1], ["0", "2", "1"], ["negative", "positive", "neutral"], [0.0, 2.0, 1]])
def test_labels_as_places_digits_and_names(labels: list[Any]) -> None:
    rows = rows_of(*({"label": label} for label in labels))
    assert read_classes(rows, "label", SPACE).tolist() == [0, 2, 1]


@pytest.mark.parametrize("wrong", [3, -1, 1.5, "positve", "3", math.nan, math.inf, True + 2, "9" * 5000])
def test_a_label_outside_the_space_names_place_label_and_valid_ones(wrong: Any) -> None:
    rows = rows_of({"label": 0}, {"label": wrong})
    with pytest.raises(DataError) as caught:
        read_classes(rows, "label", SPACE)
    found = str(caught.value)
    assert found.startswith(f"d.jsonl:2: label {wrong!r}"[:100]) and "is outside the model's label space" in found
    assert "0 = negative, 1 = neutral, 2 = positive" in found
    if wrong == "positve":
        assert "did you mean 'positive'" in found


def test_missing_labels_and_lists_are_refused() -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:1: the row has no 'label'.*"):
        read_classes(rows_of({"label": None}), "label", SPACE)
    with pytest.raises(DataError, match=r"d\.jsonl:1: the label is a list"):
        read_classes(rows_of({"label": [1]}), "label", SPACE)


def test_class_names_of_the_data_win_over_numbers() -> None:
    rows = rows_of({"label": 0}, {"label": 1}, label=("positive", "negative"))
    assert read_classes(rows, "label", SPACE).tolist() == [2, 0]
    foreign = rows_of({"label": 0}, {"label": 1}, label=("bad", "good"))
    assert read_classes(foreign, "label", SPACE).tolist() == [0, 1]


def test_numbers_are_names_where_all_names_are_numbers() -> None:
    stars = LabelSpace(("1", "2", "3", "4", "5"))
    rows = rows_of({"label": 1}, {"label": "5"}, {"label": 2})
    assert read_classes(rows, "label", stars).tolist() == [0, 4, 1]
    with pytest.raises(DataError, match="label 0 is outside"):
        read_classes(rows_of({"label": 0}), "label", stars)


def test_label_space_of_a_configuration() -> None:
    config = {"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1, "old-b": 1}}
    space = LabelSpace.of(config)
    assert space.names == ("a", "b") and space.find("old-b") == 1 and space.find("c") == -1
    assert LabelSpace.of({}).names == ("LABEL_0", "LABEL_1")
    assert len(LabelSpace.of({"num_labels": 1})) == 1
    with pytest.raises(CheckpointError, match="id2label"):
        LabelSpace.of({"id2label": {"0": "a", "999999999999": "b"}})


def test_what_a_space_does_not_have_gets_no_column() -> None:
    """cola's outputs say nothing of mrpc's labels; once they stood in the last one's column."""
    own, space = LabelSpace(("unacceptable", "acceptable")), LabelSpace(("not_equivalent", "equivalent"))
    assert np.isnan(spread(np.array([[1.0, 2.0]]), own, space)).all()
    wide = spread(np.array([[1.0, 2.0]]), LabelSpace(("b", "c")), LabelSpace(("a", "b")))
    assert np.isnan(wide[0, 0]) and wide[0, 1] == 1


def test_union_and_spread() -> None:
    one, other = LabelSpace(("a", "b")), LabelSpace(("b", "c"))
    both = union([one, other])
    assert both.names == ("a", "b", "c")
    wide = spread(np.array([[1.0, 2.0]]), other, both)
    assert np.isnan(wide[0, 0]) and wide[0, 1:].tolist() == [1, 2]
    with pytest.raises(DataError, match="the models number their labels differently"):
        read_classes(rows_of({"label": 0}), "label", both)
    assert read_classes(rows_of({"label": "c"}), "label", both).tolist() == [2]
    longer = union([one, LabelSpace(("a", "b", "c"))])
    assert read_classes(rows_of({"label": 1}), "label", longer).tolist() == [1]


MULTI = TASKS["multi-label"]
JOY = LabelSpace(("joy", "anger", "fear"))


def marks(*labels: Any, space: LabelSpace = JOY) -> list[list[float]]:
    rows = rows_of(*({"labels": label} for label in labels))
    return np.nan_to_num(MULTI.references(rows, Columns(label="labels"), space), nan=-1).tolist()


def test_multi_label_lists_vectors_and_mappings() -> None:
    assert marks(["joy", "fear"], []) == [[1, 0, 1], [0, 0, 0]]
    assert marks([0, 2], [1]) == [[1, 0, 1], [0, 1, 0]]
    assert marks([0, 1, None], [1, 0, 0]) == [[0, 1, -1], [1, 0, 0]]
    assert marks({"joy": 1, "fear": None, "anger": 0}, {"fear": True}) == [[1, 0, -1], [-1, -1, 1]]
    assert marks("joy|fear", "", "[1, 0, 0]")[:2] == [[1, 0, 1], [0, 0, 0]]
    assert marks("[1, null, 0]", "[0, 1, 1]") == [[1, -1, 0], [0, 1, 1]]
    assert marks("anger") == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([["joy"], ["hope"]], "d.jsonl:2: label 'hope' is outside the model's label space: 0 = joy"),
        ([[0, 1, None], [1, 0]], "d.jsonl:2: 2 entries for the model's 3 labels"),
        ([[0, 1, None], [1, 0, 2]], "d.jsonl:2: a label is marked 2"),
        ([{"joy": 1}, {"hope": 1}], "d.jsonl:2: label 'hope' is outside"),
        ([{"joy": "yes"}], "d.jsonl:1: a label is marked 'yes'"),
        (["[1, 0"], "d.jsonl:1: the labels are no JSON"),
        ([["joy"], None], "d.jsonl:2: the row has no 'labels'"),
    ],
)
def test_multi_label_refusals(labels: list[Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        marks(*labels)
    assert str(caught.value).startswith(says)


def test_regression_labels() -> None:
    task = TASKS["regression"]
    rows = rows_of({"score": 2.5}, {"score": "3"}, {"score": 1})
    assert task.references(rows, Columns(label="score"), LabelSpace(())).tolist() == [2.5, 3, 1]
    for wrong in ("high", math.nan, "inf", [1]):
        with pytest.raises(DataError, match=r"d\.jsonl:1: label .* is not a finite number"):
            task.references(rows_of({"score": wrong}), Columns(label="score"), LabelSpace(()))
