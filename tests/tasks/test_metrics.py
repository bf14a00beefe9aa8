"""Metrics against scikit-learn and scipy on random cases, and the rules for labels that do not occur."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from merganser.errors import UserError
from merganser.tasks import TASKS, task_for
from merganser.tasks.labels import LabelSpace

GENERATOR = np.random.default_rng(3)


def one_hot(labels: np.ndarray, width: int) -> np.ndarray:
    return np.eye(width, dtype=np.float32)[labels]


def test_classification_scores() -> None:
    task, space = TASKS["text-classification"], LabelSpace(("a", "b", "c", "d"))
    for _ in range(20):
        logits = GENERATOR.normal(size=(40, 4)).astype(np.float32)
        true = GENERATOR.integers(0, 4, 40)
        scores = task.score(task.judge(logits, true, space))
        predicted = logits.argmax(1)
        assert scores["accuracy"] == pytest.approx((predicted == true).mean())
        by_hand = [
            2 * ((predicted == k) & (true == k)).sum() / ((predicted == k).sum() + (true == k).sum()) for k in range(4)
        ]
        assert scores["macro_f1"] == pytest.approx(np.mean(by_hand))
        assert scores["matthews"] == pytest.approx(np.nan_to_num(metrics.matthews_corrcoef(true, predicted)))
    assert task.key_metric == "macro_f1"


def test_classification_scores_are_scikit_learns_to_the_last_bit() -> None:
    for labels in (1, 2, 3, 40):
        for _ in range(20):
            judged = GENERATOR.integers(0, labels, (int(GENERATOR.integers(1, 60)), 2))
            predicted, true = judged.T
            expected = {
                "accuracy": metrics.accuracy_score(true, predicted),
                "macro_f1": metrics.f1_score(true, predicted, average="macro", zero_division=0),
                "matthews": metrics.matthews_corrcoef(true, predicted),
            }
            assert TASKS["text-classification"].score(judged) == expected


def test_macro_f1_counts_labels_that_occur_on_either_side() -> None:
    task, space = TASKS["text-classification"], LabelSpace(("a", "b", "c"))
    true = np.array([0, 0, 1, 1])
    judged = task.judge(one_hot(np.array([0, 0, 1, 1]), 3), true, space)
    assert task.score(judged)["macro_f1"] == 1  # label c occurs nowhere, and does not pull the mean down
    judged = task.judge(one_hot(np.array([0, 0, 1, 2]), 3), true, space)
    assert task.score(judged)["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # c was predicted: it counts


def test_labels_that_no_model_knows_are_never_predicted() -> None:
    task, space = TASKS["text-classification"], LabelSpace(("a", "b", "c"))
    judged = task.judge(np.array([[-5.0, -4.0, np.nan]]), [2], space)
    assert judged.tolist() == [[1, 2]]


def test_multi_label_scores_use_annotated_labels_only() -> None:
    task, space = TASKS["multi-label"], LabelSpace(("a", "b", "c"))
    for _ in range(20):
        logits = GENERATOR.normal(size=(30, 3))
        true = GENERATOR.integers(0, 2, (30, 3)).astype(np.float32)
        true[GENERATOR.random((30, 3)) < 0.3] = np.nan
        true[:, 2] = np.nan  # not annotated in this corpus at all
        scores = task.score(task.judge(logits, true, space))
        expected = []
        for k in range(2):
            known = ~np.isnan(true[:, k])
            hit, said = true[known, k] == 1, logits[known, k] > 0
            expected.append(2 * (hit & said).sum() / (hit.sum() + said.sum()))
        assert scores["macro_f1"] == pytest.approx(np.mean(expected))
        flat = ~np.isnan(true)
        assert scores["accuracy"] == pytest.approx(((logits > 0)[flat] == true[flat]).mean())


def test_fully_annotated_macro_f1_is_scikit_learns() -> None:
    task, space = TASKS["multi-label"], LabelSpace(("a", "b", "c"))
    logits = GENERATOR.normal(size=(30, 3))
    logits[:, 1] = -9
    true = GENERATOR.integers(0, 2, (30, 3)).astype(np.float32)
    true[:, 1] = 0  # annotated, never true, never predicted: 0 by scikit-learn's rule
    expected = metrics.f1_score(true, logits > 0, average="macro", zero_division=0)
    assert task.score(task.judge(logits, true, space))["macro_f1"] == pytest.approx(expected)


def test_thresholds_on_probability_and_on_the_raw_logit() -> None:
    logits, true, space = np.array([[0.2, 0.7, -0.1]]), np.zeros((1, 3)), LabelSpace(("a", "b", "c"))
    assert TASKS["multi-label"].judge(logits, true, space)[0, 0].tolist() == [1, 1, 0]
    raw = task_for("multi-label", {}, threshold_on="logit")
    assert raw.judge(logits, true, space)[0, 0].tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="give probability or logit"):
        task_for("multi-label", {}, threshold_on="odds")
    with pytest.raises(UserError, match="no option 'treshold'"):
        task_for("multi-label", {}, treshold=0.4)


def test_regression_scores() -> None:
    task = TASKS["regression"]
    for _ in range(20):
        predicted, true = GENERATOR.normal(size=30), GENERATOR.integers(0, 6, 30).astype(float)
        scores = task.score(task.judge(predicted, true, LabelSpace(())))
        assert scores["pearson"] == pytest.approx(stats.pearsonr(predicted, true).statistic)
        assert scores["spearman"] == pytest.approx(stats.spearmanr(predicted, true).statistic)
        assert scores["mse"] == pytest.approx(((predicted - true) ** 2).mean())
    constant = task.score(task.judge(np.ones(5), np.arange(5.0), LabelSpace(())))
    assert constant["pearson"] == 0 and constant["spearman"] == 0


def test_language_model_scores() -> None:
    task = TASKS["causal-lm"]
    scores = task.score(np.array([[2.0, 2, 1], [4.0, 1, 0]]))
    assert scores["nll"] == 2 and scores["perplexity"] == pytest.approx(math.exp(2))
    assert scores["accuracy"] == 1 / 3
    assert "nll" in task.lower_is_better


def test_exact_match_and_majority_vote() -> None:
    task, space = TASKS["seq2seq"], LabelSpace(())
    one, two, three = (task.align(texts, space, space) for texts in (["yes ", "no"], ["no", "no"], ["yes", " a  b"]))
    assert task.combine([one, two, three]) == ["yes", "no"]
    assert task.combine([two, one]) == ["no", "no"]  # a tie goes to the first model
    assert task.score(task.judge(three, ["yes", "a b"], space)) == {"exact_match": 1}


def test_every_rate_is_between_0_and_1() -> None:
    space = LabelSpace(("O", "B-X", "I-X"))
    logits = GENERATOR.normal(size=(20, 3))
    judged = {
        "text-classification": TASKS["text-classification"].judge(logits, GENERATOR.integers(0, 3, 20), space),
        "multi-label": TASKS["multi-label"].judge(logits, GENERATOR.integers(0, 2, (20, 3)), space),
        "token-classification": TASKS["token-classification"].judge([logits], [["B-X"] * 20], space),
    }
    for name, judgements in judged.items():
        scores = TASKS[name].score(judgements)
        assert all(0 <= value <= 1 for key, value in scores.items() if key != "matthews"), name


def test_the_ensemble_is_the_mean_over_the_models_that_know_a_label() -> None:
    one, two = np.array([[2.0, np.nan, np.nan]]), np.array([[4.0, 6.0, np.nan]])
    joint = TASKS["text-classification"].combine([one, two])
    np.testing.assert_array_equal(joint, [[3, 6, np.nan]])
    words = TASKS["token-classification"].combine([[one, two], [two, one]])
    assert len(words) == 2
    np.testing.assert_array_equal(words[1], [[3, 6, np.nan]])


def test_words_that_were_cut_off_are_predicted_outside() -> None:
    task, space = TASKS["token-classification"], LabelSpace(("B-X", "I-X", "O"))
    logits = np.array([[1.0, 0, 0], [np.nan] * 3, [np.nan] * 3])
    assert task.judge([logits], [["B-X", "O", "B-X"]], space).tolist() == [[1, 1, 2]]
