"""Tables, JSON and the bootstrap."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from merganser.evaluation import Evaluation, Score
from merganser.evaluation.bootstrap import difference, resample, standard_error


def score(model: str, data: str, value: float, metric: str = "accuracy", **more: object) -> Score:
    return Score(model, data, "text-classification", metric, True, {metric: value}, 10, **more)  # type: ignore[arg-type]


RESULT = Evaluation(
    (
        score("models/a", "d/one.jsonl", 1 / 3, standard_error=0.01),
        score("models/a", "d/two.jsonl", 0.5),
        score("ensemble", "d/one.jsonl", 0.25),
        score("ensemble", "d/two.jsonl", 0.75),
    )
)


def test_the_table_shows_models_data_average_and_the_best() -> None:
    text = RESULT.table()
    assert "accuracy" in text and "one.jsonl" in text and "average" in text
    first = next(line for line in text.splitlines() if "│ a " in line)
    assert "0.3333* ± 0.0100" in first and "0.5000" in first and "0.4167" in first
    second = next(line for line in text.splitlines() if "ensemble" in line)
    assert "0.7500*" in second and "0.5000*" in second
    assert "\x1b[" not in text and "\x1b[" in RESULT.table(color=True)


def test_less_can_be_better_and_metrics_can_differ() -> None:
    low = Evaluation(
        tuple(Score(m, "d", "causal-lm", "nll", False, {"nll": v}, 3) for m, v in (("a", 2.0), ("b", 1.0)))
    )
    assert "1.0000*" in low.table() and "2.0000*" not in low.table()
    mixed = Evaluation((score("a", "d", 0.5), score("a", "e", 0.25, "pearson")))
    assert mixed.average("a") is None
    assert "accuracy 0.5000" in mixed.table() and "pearson 0.2500" in mixed.table()


def test_json_keeps_full_precision_and_stays_json() -> None:
    found = json.loads(RESULT.to_json())
    assert found["rows"][0]["scores"]["accuracy"] == 1 / 3
    assert found["averages"] == {"models/a": (1 / 3 + 0.5) / 2, "ensemble": 0.5}
    odd = Evaluation((score("a", "d", math.inf),))
    assert json.loads(odd.to_json())["rows"][0]["scores"]["accuracy"] is None


def test_names_that_end_alike_are_shown_whole() -> None:
    both = Evaluation((score("x/m", "glue:sst2[validation]", 0.5), score("y/m", "glue:sst2[validation]", 0.5)))
    assert "glue:sst2[validation]" in both.table()  # which rich would take for markup
    assert "x/m" in both.table() and "y/m" in both.table()


def accuracy(judgements: np.ndarray) -> float:
    return float((judgements[:, 0] == judgements[:, 1]).mean())


def test_the_standard_error_of_an_accuracy_is_the_binomial_one() -> None:
    judgements = np.stack([np.arange(400) % 4 == 0, np.ones(400, bool)], axis=1)
    values = resample(judgements, accuracy, 2000, 1)
    assert standard_error(values) == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert values.mean() == pytest.approx(0.25, abs=0.005)
    assert (resample(judgements, accuracy, 5, 1) == resample(judgements, accuracy, 5, 1)).all()
    assert standard_error(resample(judgements, accuracy, 0, 1)) is None


def test_paired_differences_are_tighter_than_unpaired_ones() -> None:
    one = np.stack([np.arange(200) % 2, np.ones(200, int)], axis=1)
    other = one.copy()
    other[0, 0] = 1  # one more example right
    a, b = resample(one, accuracy, 300, 9), resample(other, accuracy, 300, 9)
    found = difference(accuracy(other), accuracy(one), b, a)
    assert found is not None and found["difference"] == pytest.approx(1 / 200)
    assert found["low"] >= 0 and found["high"] <= 4 / 200
