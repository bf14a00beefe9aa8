"""The emotion suite: the unified format, what is and is not annotated, and every malformed line by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

import merganser.lab.suites.emotion as module
from merganser.errors import DataError, UserError
from merganser.lab.suites.emotion import EMOTIONS, LABELS, Emotion, read_records
from merganser.tasks.columns import Columns
from merganser.tasks.labels import LabelSpace
from merganser.tasks.multi_label import MultiLabel

ISEAR = ("joy", "anger", "sadness", "disgust", "fear", "shame", "guilt")
SSEC = ("joy", "anger", "sadness", "disgust", "fear", "trust", "surprise", "anticipation")
SPACE = LabelSpace(LABELS)


def record(text: str = "a text", vad: Any = None, **emotions: Any) -> dict[str, Any]:
    """A line of a corpus; labels that are not given are null."""
    return {
        "source": "made",
        "text": text,
        "emotions": {**dict.fromkeys(EMOTIONS), **emotions},
        "VAD": vad if vad is not None else dict.fromkeys(module.VAD),
    }


def write_split(root: Path, set_name: str, split: str, records: list[Any]) -> Path:
    path = root / set_name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (line if isinstance(line, str) else json.dumps(line) for line in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_set(root: Path, set_name: str = "made", **splits: list[Any]) -> None:
    for split in ("train", "dev", "test"):
        write_split(root, set_name, split, splits.get(split, [record(joy=1)]))


def test_labels_are_in_the_order_of_the_head() -> None:
    assert LABELS == (
        "joy", "anger", "sadness", "disgust", "fear", "trust", "surprise", "love", "noemo", "confusion",
        "anticipation", "shame", "guilt", "valence", "arousal", "dominance",
    )  # fmt: skip
    assert Emotion().labels("any") == LABELS


def test_values_above_a_tenth_hold_and_null_is_not_annotated(tmp_path: Path) -> None:
    first = record("one", joy=0, anger=0.05, sadness=0.1, disgust=0.1000001, fear=0.2, trust=1, love=None)
    second = record("two", {"valence": 3.2, "arousal": 0.1, "dominance": None}, guilt=-1)
    third = {"text": "three", "emotions": {"joy": 1}}  # what is absent is as null
    write_set(tmp_path, test=[first, "", second, third, {"text": "4", "emotions": {}, "VAD": None}])
    rows = Emotion(tmp_path).read("made", "test")
    assert rows.source == "made[test]"
    none = dict.fromkeys(LABELS)
    one = {"joy": 0, "anger": 0, "sadness": 0, "disgust": 1, "fear": 1, "trust": 1}
    assert rows[0] == {"text": "one", "labels": {**none, **one}}
    assert rows[1] == {"text": "two", "labels": {**none, "guilt": 0, "valence": 1, "arousal": 0}}
    assert rows[2] == {"text": "three", "labels": {**none, "joy": 1}}
    assert rows[3] == {"text": "4", "labels": none}
    assert list(rows[0]["labels"]) == list(LABELS)
    path = tmp_path / "made" / "test.jsonl"
    assert [rows.where(index) for index in range(4)] == [f"{path}:{line}" for line in (1, 3, 4, 5)]


def test_the_task_reads_the_rows(tmp_path: Path) -> None:
    write_set(tmp_path, dev=[record(joy=1, guilt=0), record(vad={"dominance": 4})])
    suite = Emotion(tmp_path)
    rows, task = suite.read("made", "dev"), suite.task("made")
    assert isinstance(task, MultiLabel) and suite.metric("made") == "macro_f1"
    columns = task.columns(rows, Columns())
    assert (columns.text, columns.label, columns.text_pair) == ("text", "labels", None)
    truth = task.references(rows, columns, SPACE)
    expected = np.full((2, 16), np.nan, np.float32)
    expected[0, 0], expected[0, 12], expected[1, 15] = 1, 0, 1
    np.testing.assert_array_equal(truth, expected)


def test_the_threshold_is_an_option() -> None:
    logits, truth = np.array([[0.2]]), np.array([[1.0]])
    space = LabelSpace(("joy",))
    for where, predicted in (("probability", 1), ("logit", 0)):
        judged = Emotion(threshold_on=where).task("made").judge(logits, truth, space)
        assert judged[0, 0, 0] == predicted  # a probability of 0.55
    with pytest.raises(UserError, match="a threshold on 'odds' is unknown"):
        Emotion(threshold_on="odds")


def test_macro_f1_is_that_of_scikit_learn_over_the_labels_present() -> None:
    generator, task = np.random.default_rng(5), Emotion().task("made")
    for _ in range(20):
        logits = generator.normal(size=(40, 16))
        true = generator.integers(0, 2, (40, 16)).astype(np.float32)
        absent = generator.random(16) < 0.5
        absent[0] = False
        true[:, absent] = np.nan
        judged = task.judge(logits, true, SPACE)
        expected = sklearn_metrics.f1_score(true[:, ~absent], logits[:, ~absent] > 0, average="macro", zero_division=0)
        assert task.score(judged)["macro_f1"] == pytest.approx(expected)


def test_all_is_the_three_splits_in_order(tmp_path: Path) -> None:
    write_set(tmp_path, train=[record("a"), record("b")], dev=[record("c")], test=[record("d")])
    rows = Emotion(tmp_path).read("made", "all")
    assert [row["text"] for row in rows] == ["a", "b", "c", "d"] and rows.source == "made[all]"
    assert rows.where(2) == f"{tmp_path / 'made' / 'dev.jsonl'}:1"
    assert rows.where(1) == f"{tmp_path / 'made' / 'train.jsonl'}:2"


def test_votes_are_the_labels_of_the_train_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [record(fear=0), record(joy=None, anger=1, vad={"arousal": 0.0})]
    write_set(tmp_path, train=train, dev=[record(love=1)])
    reads: list[Path] = []

    def counted(path: Path) -> Any:
        reads.append(path)
        return read_records(path)

    monkeypatch.setattr(module, "read_records", counted)
    suite = Emotion(tmp_path)
    for _ in range(3):
        assert suite.votes("made") == ("anger", "fear", "arousal")
    assert Emotion(tmp_path, "logit").votes("made") == ("anger", "fear", "arousal") and len(reads) == 1
    write_split(tmp_path, "made", "train", [*train, record(guilt=0)])  # a changed file is read again
    assert suite.votes("made") == ("anger", "fear", "guilt", "arousal") and len(reads) == 2


def test_data_sets_that_are_there(tmp_path: Path) -> None:
    write_set(tmp_path, "two")
    write_split(tmp_path, "one", "test", [record()])
    (tmp_path / "empty").mkdir()
    (tmp_path / "README").write_text("no corpus")
    assert Emotion(tmp_path).sets() == ("one", "two")
    assert Emotion().sets() == () and Emotion(tmp_path / "gone").sets() == ()


def test_what_is_missing_is_said_with_the_expected_files(tmp_path: Path) -> None:
    write_set(tmp_path, "isear")
    write_split(tmp_path, "half", "train", [record()])
    suite = Emotion(tmp_path)
    for name in ("tec", "../isear", ""):
        with pytest.raises(DataError) as caught:
            suite.read(name, "train")
        assert f"there is no data set {name!r} of the suite emotion (found: half, isear)" in str(caught.value)
        assert f"{name}/train.jsonl" in str(caught.value) and f"{name}/dev.jsonl" in str(caught.value)
        assert f"{name}/test.jsonl" in str(caught.value)
    for split in ("dev", "all"):
        with pytest.raises(DataError, match="data set 'half' has no split 'dev'") as caught:
            suite.read("half", split)
        assert caught.value.where == str(tmp_path / "half" / "dev.jsonl")
        assert "half/test.jsonl" in str(caught.value.mend)
    with pytest.raises(DataError, match="there is no split 'tests'") as caught:
        suite.read("isear", "tests")
    assert "did you mean 'test'" in str(caught.value.mend)
    with pytest.raises(DataError, match="no such folder"):
        Emotion(tmp_path / "gone").votes("isear")
    with pytest.raises(DataError, match="there is no data set 'isear'"):
        Emotion().read("isear", "train")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a", "emotions": {', "unreadable JSON"),
        ("[1]", "not an object"),
        ({"emotions": {"joy": 1}}, "the record has no 'text'"),
        ({"text": None, "emotions": {}}, "the record has no 'text'"),
        ({"text": 3, "emotions": {}}, "the record has a int as its 'text'"),
        ({"text": "a"}, "the record has no 'emotions'"),
        ({"text": "a", "emotions": None}, "the record has no 'emotions'"),
        ({"text": "a", "emotions": ["joy"]}, "'emotions' is a list, not an object"),
        ({"text": "a", "emotions": {}, "VAD": [1, 2, 3]}, "'VAD' is a list, not an object"),
        (record(joy="1"), "joy is '1', neither a number nor null"),
        (record(joy=True), "joy is True, neither a number nor null"),
        (record(joy=[1]), r"joy is \[1\], neither a number nor null"),
        ('{"text": "a", "emotions": {"joy": NaN}}', "joy is nan, neither a number nor null"),
        (record(vad={"valence": "high"}), "valence is 'high', neither a number nor null"),
        (record(sadnes=1), "unknown emotion 'sadnes' in 'emotions'"),
        (record(valence=1), "unknown emotion 'valence' in 'emotions'"),
        (record(vad={"joy": 1}), "unknown name 'joy' in 'VAD'"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: Any, says: str) -> None:
    write_set(tmp_path, train=[record(), "", line, record()])
    for read in (lambda: Emotion(tmp_path).read("made", "train"), lambda: Emotion(tmp_path).votes("made")):
        with pytest.raises(DataError, match=says) as caught:
            read()
        assert caught.value.where == f"{tmp_path / 'made' / 'train.jsonl'}:3"
        assert caught.value.mend
    if says.startswith("unknown emotion 'sadnes'"):
        assert "did you mean 'sadness'" in str(caught.value.mend)


def test_a_number_too_large_for_a_float_is_a_number(tmp_path: Path) -> None:
    write_set(tmp_path, train=[f'{{"text": "a", "emotions": {{"joy": 1{"0" * 400}}}}}'])
    assert Emotion(tmp_path).read("made", "train")[0]["labels"]["joy"] == 1


def test_the_file_of_all_splits_is_not_read_and_that_is_said(tmp_path: Path) -> None:
    write_set(tmp_path, "both", train=[record(joy=1)])
    write_split(tmp_path, "both", "full", [record(anger=1)] * 9)
    write_split(tmp_path, "only", "full", [record(joy=1)])
    suite = Emotion(tmp_path)
    assert suite.sets() == ("both",) and suite.votes("both") == ("joy",) and len(suite.read("both", "all")) == 3
    (remark,) = suite.remarks("both")
    assert "both/full.jsonl is ignored" in remark
    assert suite.remarks("only") and not Emotion(tmp_path / "elsewhere").remarks("both")
    with pytest.raises(DataError, match=r"(?s)only/full.jsonl is there and is not read.*split"):
        suite.read("only", "train")
    (tmp_path / "both" / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"no split 'dev' \(full.jsonl is not read\)"):
        suite.read("both", "dev")


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_empty_splits_are_an_error(tmp_path: Path, lines: list[str]) -> None:
    write_set(tmp_path, dev=lines)
    for split in ("dev", "all"):
        with pytest.raises(DataError, match="not a single record") as caught:
            Emotion(tmp_path).read("made", split)
        assert caught.value.where == str(tmp_path / "made" / "dev.jsonl")


def test_the_real_corpora(resources: Path) -> None:
    root = resources / "emotion_splits"
    suite = Emotion(root)
    assert {"isear", "ssec"} <= set(suite.sets())
    for name in suite.sets():
        total = 0
        for split in ("dev", "test"):
            lines = sum(1 for line in (root / name / f"{split}.jsonl").open("rb") if line.strip())
            assert len(suite.read(name, split)) == lines
            total += lines
        if name in ("isear", "ssec"):
            train = sum(1 for line in (root / name / "train.jsonl").open("rb") if line.strip())
            assert len(suite.read(name, "train")) == train
            assert len(suite.read(name, "all")) == total + train
    assert suite.votes("isear") == ISEAR and suite.votes("ssec") == SSEC
    rows, task = suite.read("ssec", "dev"), suite.task("ssec")
    truth = task.references(rows, task.columns(rows, Columns()), SPACE)
    known = [label for label, column in zip(LABELS, truth.T, strict=True) if np.isfinite(column).any()]
    assert tuple(known) == SSEC
