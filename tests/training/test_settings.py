"""The published hyper-parameters, exactly, and what settings refuse."""

import pytest
from pydantic import ValidationError

from merganser.errors import UserError
from merganser.training.settings import PUBLISHED, TrainingSettings, defaults, make_settings, with_changes

LONG = {"epochs": 20, "schedule": "polynomial", "warmup": 0.06, "best_epoch": True}
TABLE = {
    ("roberta", "emotion"): {"learning_rate": 1e-5, **LONG},
    ("roberta", "ner"): {"learning_rate": 1e-5, **LONG},
    ("deberta-v2", "emotion"): {"learning_rate": 6e-6, "reweight": "sqrt-inverse", **LONG},
    ("deberta-v2", "ner"): {"learning_rate": 1e-5, "reweight": "sqrt-inverse", **LONG},
    ("t5", "emotion-t5"): {"learning_rate": 1e-4, "max_steps": 50_000},
    ("distilbert", "glue"): {"learning_rate": 2e-5, "epochs": 3},
    ("roberta", "glue"): {"learning_rate": 2e-5, "epochs": 3},
    ("roberta", "partitions"): {"learning_rate": 1e-5, "epochs": 30},
    ("distilbert", "partitions"): {"learning_rate": 2e-5, "epochs": 30},
}


def test_the_published_table() -> None:
    assert PUBLISHED == TABLE
    for (model_type, suite), values in TABLE.items():
        expected = {
            "learning_rate": 5e-5, "epochs": 3, "max_steps": None, "batch_size": 16, "schedule": "linear",
            "warmup": 0, "weight_decay": 0, "max_length": 128, "reweight": "none", "best_epoch": False,
            "batching": "shuffled", **values,
        }  # fmt: skip
        assert defaults(model_type, suite).model_dump() == expected


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("RobertaForMaskedLM", "roberta"),
        ("DebertaV2ForSequenceClassification", "deberta-v2"),
        ("DistilBertModel", "distilbert"),
        ("T5ForConditionalGeneration", "t5"),
    ],
)
def test_architectures_stand_for_their_model_type(name: str, model_type: str) -> None:
    for kind, suite in TABLE:
        if kind == model_type:
            assert defaults(name, suite) == defaults(model_type, suite)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "XLMRobertaForMaskedLM", "RobertaPreLayerNormModel", "gpt2"])
def test_others_fall_back(name: str) -> None:
    assert defaults(name, "emotion") == TrainingSettings(learning_rate=5e-5, epochs=3, schedule="linear")


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0}, {"learning_rate": float("inf")}, {"epochs": 0}, {"max_steps": 0},
        {"batch_size": 0}, {"schedule": "cosine"}, {"warmup": 1}, {"reweight": "inverse"},
        {"lr": 1e-5}, {"weight_decay": -1},
    ],
)  # fmt: skip
def test_refusals_name_the_setting(values: dict) -> None:
    (name,) = values
    with pytest.raises(UserError, match=name):
        make_settings(**values)


def test_several_refusals_come_at_once_with_the_nearest_name() -> None:
    words = r"(?s)2 problems.*epochs.*unknown key 'learning_rat'.*did you mean 'learning_rate'"
    with pytest.raises(UserError, match=words):
        make_settings(epochs="x", learning_rat=1)


@pytest.mark.parametrize("rate", [1e-7, 1e-9])
def test_a_polynomial_schedule_needs_a_rate_above_its_end(rate: float) -> None:
    """transformers refuses it, too, but only after data and model have been loaded."""
    with pytest.raises(UserError, match=r"polynomial schedule falls to 1e-07.*linear"):
        make_settings(schedule="polynomial", learning_rate=rate)
    assert make_settings(schedule="linear", learning_rate=rate).learning_rate == rate
    assert make_settings(schedule="polynomial", learning_rate=1.1e-7)


def test_epochs_of_a_user_beat_a_published_number_of_steps() -> None:
    published = defaults("t5", "emotion-t5")
    assert published.max_steps == 50_000
    assert with_changes(published, {"epochs": 2}).max_steps is None
    assert with_changes(published, {"learning_rate": 1e-3}).max_steps == 50_000
    assert with_changes(published, {"epochs": 2}, {"max_steps": 7}).max_steps == 7
    assert with_changes(published, {"max_steps": 7}, {"epochs": 2}).max_steps is None
    both = with_changes(published, {"epochs": 2, "max_steps": 7})  # in one place, as everywhere: steps override
    assert (both.epochs, both.max_steps) == (2, 7)
    with pytest.raises(UserError, match="here: unknown key 'epoch'"):
        with_changes(published, {"epoch": 2}, where="here")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        TrainingSettings().epochs = 4
