"""Emotions as yes and no: which rows there are, and the scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from emotion_examples import EXAMPLES, NONE, questions, write
from merganser.errors import DataError, UserError
from merganser.lab.suites.emotion import LABELS, Emotion, read_records
from merganser.lab.suites.emotion_generation import (
    SENTINEL,
    EmotionGPT2,
    EmotionT5,
    YesNo,
    YesNoContinuation,
    f1_by_label,
)
from merganser.tasks import multi_label
from merganser.tasks.base import Task
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows


def corpus(root: Path, set_name: str = "made", count: int = 400) -> Path:
    """``joy`` holds for a quarter of the records, ``fear`` for 4 %, ``love`` for none, ``guilt`` for all of half."""
    for split in ("train", "dev", "test"):
        records = [
            {
                "text": f"text {n}",
                "emotions": {
                    "joy": int(n % 4 == 0),
                    "fear": int(n % 25 == 0),
                    "love": 0,
                    "guilt": 1 if n % 2 else None,
                },
            }
            for n in range(count)
        ]
        write(root / set_name / f"{split}.jsonl", records)
    return root


def asked(rows: Rows) -> set[tuple[str, str, str]]:
    return {(row["text"], row["label"], row["target"]) for row in rows}


# --- which rows there are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [EmotionT5, EmotionGPT2])
def test_a_row_for_each_record_and_annotated_label(suite: Any, tmp_path: Path) -> None:
    corpora = suite(corpus(tmp_path, count=4))
    assert corpora.sets() == ("made",) and corpora.labels("made") == () and corpora.votes("made") is None
    assert corpora.metric("made") == "macro_f1"
    rows = corpora.read("made", "dev")
    assert rows.source == "made[dev]" and len(rows) == 4 * 3 + 2
    assert rows[0] == {"text": "text 0", "label": "joy", "target": "yes"}
    assert [row["label"] for row in rows.rows[3:7]] == ["joy", "fear", "love", "guilt"]
    assert rows[3] == {"text": "text 1", "label": "joy", "target": "no"}
    assert rows.where(3) == f"{tmp_path / 'made' / 'dev.jsonl'}:2"


@pytest.mark.parametrize(("negatives", "power"), [("sqrt", 0.5), ("linear", 1.0)])
def test_negatives_of_train_are_kept_at_the_promised_rate(tmp_path: Path, negatives: str, power: float) -> None:
    count = 4000
    rows = EmotionT5(corpus(tmp_path, count=count), negatives=negatives).read("made", "train")
    found = Counter((row["label"], row["target"]) for row in rows)
    for label, rate in (("joy", 1 / 4), ("fear", 1 / 25)):
        assert found[label, "yes"] == count * rate  # no positive is lost
        chance, trials = rate**power, count * (1 - rate)
        deviation = math.sqrt(trials * chance * (1 - chance))
        assert abs(found[label, "no"] - trials * chance) < 4 * deviation
    assert found["love", "no"] == 0  # nothing to weigh them against
    assert found["guilt", "yes"] == count / 2  # annotated in every other record, where it holds
    everything = EmotionT5(tmp_path, negatives="all").read("made", "train")
    assert len(everything) == 3 * count + count / 2 and asked(rows) < asked(everything)


def test_the_rate_is_that_of_the_annotated_records(tmp_path: Path) -> None:
    records = [{"text": str(n), "emotions": {"joy": 1 if n % 2 else None}} for n in range(200)]
    path = write(tmp_path / "a" / "train.jsonl", [*records, {"text": "x", "emotions": {"joy": 0}}])
    suite = EmotionT5(tmp_path)
    assert suite.chances(read_records(path)) == {"joy": pytest.approx(math.sqrt(100 / 101))}


def test_the_choice_depends_on_seed_set_label_and_record_only(tmp_path: Path) -> None:
    corpus(tmp_path)
    corpus(tmp_path, "other")
    first = EmotionT5(tmp_path).read("made", "train")
    assert first == EmotionT5(tmp_path).read("made", "train")
    assert first.rows == EmotionGPT2(tmp_path).read("made", "train").rows
    assert asked(first) != asked(EmotionT5(tmp_path, seed=2).read("made", "train"))
    assert asked(first) != asked(EmotionT5(tmp_path).read("other", "train"))  # the same records, another name
    # a label less, and none of the others changes
    path = tmp_path / "made" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["emotions"]["joy"]
        record["emotions"] = dict(reversed(record["emotions"].items()))  # whatever the order
    write(path, records)
    without = EmotionT5(tmp_path).read("made", "train")
    assert asked(without) == {row for row in asked(first) if row[1] != "joy"}


def test_dev_test_and_all_keep_every_negative(tmp_path: Path) -> None:
    suite = EmotionT5(corpus(tmp_path))
    whole = 3 * 400 + 200
    assert len(suite.read("made", "train")) < whole
    assert len(suite.read("made", "dev")) == len(suite.read("made", "test")) == whole
    assert len(suite.read("made", "all")) == 3 * whole  # a test set, its train split included


def test_options_and_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeping negatives by 'root' is unknown"):
        EmotionT5(tmp_path, negatives="root")
    with pytest.raises(DataError, match="there is no data set 'made' of the suite emotion-gpt2"):
        EmotionGPT2(tmp_path).read("made", "train")
    write(tmp_path / "a" / "train.jsonl", [{"text": "a", "emotions": {"joy": 0}}])
    write(tmp_path / "a" / "dev.jsonl", [{"text": "a", "emotions": {"joy": None}}])
    write(tmp_path / "a" / "test.jsonl", [{"text": "a", "emotions": {"joi": 1}}])
    with pytest.raises(DataError, match="no label holds for any record"):
        EmotionT5(tmp_path).read("a", "train")
    with pytest.raises(DataError, match="no record has an annotated label"):
        EmotionT5(tmp_path).read("a", "dev")
    with pytest.raises(DataError, match=r"a/test\.jsonl:1: unknown emotion 'joi'"):
        EmotionT5(tmp_path).read("a", "test")


def test_the_real_corpora(resources: Path) -> None:
    root = resources / "emotion_splits"
    multi, single = Emotion(root).read("ssec", "dev"), EmotionT5(root).read("ssec", "dev")
    marks = [mark for row in multi for mark in row["labels"].values() if mark is not None]
    assert len(single) == len(marks) and sum(row["target"] == "yes" for row in single) == sum(marks)
    train = EmotionT5(root).read("isear", "train")
    holds = [mark for row in Emotion(root).read("isear", "train") for mark in row["labels"].values()]
    assert sum(row["target"] == "yes" for row in train) == holds.count(1)
    assert sum(row["target"] == "no" for row in train) == pytest.approx(
        sum(math.sqrt(1 / 7) for mark in holds if mark == 0), rel=0.05
    )  # each of seven emotions in a seventh of the records


# --- references and scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [YesNo(), YesNoContinuation()])
def test_references_are_checked(task: Task) -> None:
    columns = task.columns(EXAMPLES, Columns())
    assert task.references(EXAMPLES, columns, NONE) == [("joy", 1), ("anger", 0), ("joy", 0), ("fear", 1)]
    for row, says in ((("a", "joi", "yes"), "unknown label 'joi'"), (("a", "joy", "yep"), "neither yes nor")):
        with pytest.raises(DataError, match=says) as caught:
            task.references(questions(("a", "joy", "no"), row), columns, NONE)
        assert caught.value.where == "made.jsonl:2"
    assert not task.fits({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"})
    assert not task.fits({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})


def test_macro_f1_is_that_of_scikit_learn_and_of_the_classifier() -> None:
    generator, task = np.random.default_rng(2), YesNo()
    for _ in range(20):
        true = generator.integers(0, 2, (30, 16)).astype(np.float64)
        true[generator.random((30, 16)) < 0.4] = np.nan
        true[:, generator.random(16) < 0.4] = np.nan
        predicted = generator.integers(0, 2, (30, 16)) * (generator.random(16) < 0.8)
        cells = list(zip(*np.nonzero(np.isfinite(true)), strict=True))
        if not cells:
            continue
        references = [(LABELS[label], int(true[row, label])) for row, label in cells]
        texts = [("no", "yes")[predicted[row, label]] for row, label in cells]
        judged = task.judge(texts, references, NONE)
        assert judged.shape == (len(cells), 3)
        scores = task.score(judged)
        by_label = {
            LABELS[label]: sklearn_metrics.f1_score(
                [t for name, t in references if name == LABELS[label]],
                [x == "yes" for (name, _), x in zip(references, texts, strict=True) if name == LABELS[label]],
                zero_division=0,
            )
            for label in sorted({label for _, label in cells})
        }
        assert task.by_label(texts, references, NONE) == f1_by_label(judged)
        assert f1_by_label(judged) == pytest.approx(by_label) and list(f1_by_label(judged)) == list(by_label)
        assert scores["macro_f1"] == pytest.approx(np.mean(list(by_label.values())))
        marks = np.stack([predicted, np.where(np.isnan(true), -1, true).astype(int)], axis=1)
        assert scores["macro_f1"] == pytest.approx(multi_label.macro_f1(marks))
        assert scores["accuracy"] == pytest.approx(multi_label.accuracy(marks))
        assert scores["answered"] == 1


def test_neither_yes_nor_no_counts_as_no() -> None:
    task = YesNo()
    generated = [f"{SENTINEL} yes", f" {SENTINEL}  no ", "maybe", "", "Yes <extra_id_1>", "yes no"]
    aligned = task.align(generated, NONE, NONE)
    assert aligned == ["yes", "no", "maybe", "", "yes", "yes no"]
    truth = [("joy", 1), ("joy", 0), ("joy", 0), ("fear", 1), ("fear", 1), ("fear", 0)]
    judged = task.judge(aligned, truth, NONE)
    joy, fear = LABELS.index("joy"), LABELS.index("fear")
    expected = [[joy, 1, 1], [joy, 0, 0], [joy, -1, 0], [fear, -1, 1], [fear, 1, 1], [fear, -1, 0]]
    assert judged.tolist() == expected
    scores = task.score(judged)
    assert scores == pytest.approx({"macro_f1": (1 + 2 / 3) / 2, "accuracy": 5 / 6, "answered": 0.5})
    assert task.key_metric == YesNoContinuation().key_metric == "macro_f1"
    assert not YesNoContinuation().lower_is_better


def test_ensembles_vote_or_average() -> None:
    votes = YesNo().combine([["yes", "no"], ["no", "no"], ["yes", "maybe"]])
    assert votes == ["yes", "no"]
    task = YesNoContinuation()
    first, second = np.array([[-1.0, -2.0], [-3.0, -1.0]]), np.array([[-5.0, -1.0], [-1.0, -2.0]])
    joint = task.combine([first, second])
    np.testing.assert_allclose(joint, [[-3, -1.5], [-2, -1.5]])
    assert task.judge(joint, [("joy", 1), ("joy", 0)], NONE)[:, 1].tolist() == [1, 1]
    assert task.ensembles
