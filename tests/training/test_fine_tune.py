"""Training for every kind of task: it learns, keeps what it must, saves the best epoch, repeats itself."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser.errors import CheckpointError, DataError, FileError, UserError
from merganser.tasks import TASKS, Columns, Rows
from merganser.tasks.models import load_model, load_tokenizer, open_model
from merganser.tasks.predict import predict
from merganser.training import TrainingSettings, train
from merganser.training.outputs import MARK
from merganser.training.prepare import Prepared

LABELS = ("good", "bad")
EMOTIONS = ("joy", "anger", "fear")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def score(folder: Path, task: str, rows: Rows, options: dict[str, Any] | None = None) -> dict[str, float]:
    """The score of a saved folder, opened anew."""
    chosen, opened = TASKS[task].with_options(options or {}), open_model(folder)
    columns, space = chosen.columns(rows, Columns()), chosen.space(opened.config)
    model, tokenizer = load_model(opened, chosen.model_class(opened.config)), load_tokenizer(opened)
    found = predict(model, tokenizer, opened.config, chosen, rows, columns)
    return chosen.score(chosen.judge(found.aligned, chosen.references(rows, columns, space), space))


def no_dropout(architecture: str) -> dict[str, float]:
    """Configuration without dropout, with which a tiny model learns nothing by heart."""
    names = {"t5": ("dropout_rate",), "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout")}
    usual = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return dict.fromkeys(names.get(architecture, usual), 0.0)


def emotions(make_rows: Callable[..., Rows]) -> Rows:
    marks = [[1, 0, None], [0, 1, None], [1, 0, None], [0, 1, None], [1, 0, None], [0, 1, None]]
    texts = ("good movie", "bad movie", "I liked it", "not good", "very good", "bad food")
    return make_rows([{"text": t, "labels": m} for t, m in zip(texts, marks, strict=True)])


def people(make_rows: Callable[..., Rows]) -> Rows:
    return make_rows(
        [
            {"tokens": ["Anna", "saw", "Paris"], "tags": ["B-PER", "O", "B-LOC"]},
            {"tokens": ["Anna", "Acme", "was", "in", "Paris"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
            {"tokens": ["the", "movie", "was", "bad"], "tags": ["O", "O", "O", "O"]},
            {"tokens": ["it", "was", "in", "Paris"], "tags": ["O", "O", "O", "B-LOC"]},
        ]
    )


def case(task: str, sentiment: Rows, make_rows: Callable[..., Rows]) -> tuple[str, Rows, tuple[str, ...], str]:
    """Architecture, rows, labels and a metric that is 1 where all was learnt."""
    texts = [row["text"] for row in sentiment]
    if task == "multi-label":
        return "bert", emotions(make_rows), EMOTIONS, "accuracy"
    if task == "token-classification":
        return "roberta", people(make_rows), TAGS, "f1"
    if task == "regression":
        numbers = [1.0, 0.0, 0.9, 0.1, 0.8, 0.2]
        rows = [{"text": t, "score": n} for t, n in zip(texts, numbers, strict=True)]
        return "distilbert", make_rows(rows), (), "pearson"
    if task == "seq2seq":
        rows = [{"text": t, "target": "yes" if "good" in t else "no"} for t in texts]
        return "t5", make_rows(rows), (), "exact_match"
    return "deberta-v2", sentiment, LABELS, "accuracy"


@pytest.mark.parametrize(
    "task", ["text-classification", "multi-label", "regression", "token-classification", "seq2seq"]
)
def test_every_task_learns_its_examples_by_heart(
    task: str, sentiment: Rows, make_rows, save_ready, tmp_path: Path, quick: TrainingSettings
) -> None:
    architecture, rows, labels, metric = case(task, sentiment, make_rows)
    settings = quick.model_copy(update={"learning_rate": 5e-3, "epochs": 40})
    trained = train(
        save_ready("base", architecture, **no_dropout(architecture)),
        TASKS[task],
        rows,
        labels=labels,
        output=tmp_path / "out",
        settings=settings,
    )
    assert score(trained.path, task, rows)[metric] > 0.95
    config = json.loads((trained.path / "config.json").read_text())
    problem = {
        "text-classification": "single_label_classification",
        "multi-label": "multi_label_classification",
        "regression": "regression",
    }.get(task)
    assert config.get("problem_type") == problem
    if labels:
        assert list(config["id2label"].values()) == list(labels)
    assert {tensor.dtype for tensor in weights(trained.path).values()} == {torch.float32}
    assert config.get("use_cache") is not False
    left = {path.name for path in trained.path.iterdir()} - {"generation_config.json", MARK}
    assert left == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert trained.dev_scores == () and trained.best_epoch is None and trained.loss < 0.5


def test_a_causal_model_learns_its_texts(sentiment: Rows, save_ready, tmp_path: Path, quick) -> None:
    base = save_ready("base", "gpt2")
    before = score(base, "causal-lm", sentiment)["nll"]
    trained = train(base, TASKS["causal-lm"], sentiment, output=tmp_path / "out", settings=quick, dev=sentiment)
    assert score(trained.path, "causal-lm", sentiment)["nll"] == pytest.approx(trained.dev_scores[-1], rel=1e-5)
    assert trained.dev_scores[-1] < 0.7 * before and len(trained.dev_scores) == 15


def test_what_is_not_annotated_moves_no_row_of_the_head(make_rows, save_ready, tmp_path: Path, quick) -> None:
    base = save_ready("base", "bert", id2label=dict(enumerate(EMOTIONS)))
    rows = emotions(make_rows)  # fear is never annotated
    for reweight in ("none", "sqrt-inverse"):
        settings = quick.model_copy(update={"epochs": 2, "reweight": reweight, "weight_decay": 0})
        trained = train(
            base, TASKS["multi-label"], rows, labels=EMOTIONS, output=tmp_path / reweight, settings=settings
        )
        before, after = weights(base), weights(trained.path)
        for name in ("classifier.weight", "classifier.bias"):
            assert torch.equal(before[name][2], after[name][2])
            assert not torch.isclose(before[name][:2], after[name][:2]).any()


def test_reweighting_turns_predictions_to_the_rare_label(make_rows, save_ready, tmp_path: Path) -> None:
    """The texts are all alike: only the prior is learnt, and reweighting raises that of the rare class."""
    rows = make_rows([{"text": "it is", "label": "good" if i else "bad"} for i in range(16)])
    base, chances = save_ready("base", "bert"), {}
    for reweight in ("none", "sqrt-inverse"):
        settings = TrainingSettings(learning_rate=1e-2, epochs=30, batch_size=16, reweight=reweight)
        trained = train(
            base, TASKS["text-classification"], rows, labels=LABELS, output=tmp_path / reweight, settings=settings
        )
        opened = open_model(trained.path)
        model, tokenizer = load_model(opened, TASKS["text-classification"].auto_class), load_tokenizer(opened)
        with torch.no_grad():
            chances[reweight] = model(**tokenizer("it is", return_tensors="pt")).logits.softmax(-1)[0, 1].item()
    assert chances["none"] == pytest.approx(1 / 16, abs=0.03)
    # the weights are as 1 : √15, so that the optimum is √15 / (15 + √15)
    assert chances["sqrt-inverse"] == pytest.approx(15**0.5 / (15 + 15**0.5), abs=0.05)


@pytest.mark.parametrize("work", [False, True])
def test_the_best_epoch_is_saved_and_ties_go_to_the_earlier(
    work: bool, sentiment: Rows, save_ready, tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = save_ready("base", "bert"), []
    scores = [0.1, 0.6, 0.3, 0.6, 0.2]

    def fake(self: Prepared, model: Any, settings: TrainingSettings) -> float:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return scores[len(seen) - 1]

    monkeypatch.setattr(Prepared, "score", fake)
    settings = quick.model_copy(update={"epochs": 5, "best_epoch": True})
    trained = train(
        base, TASKS["text-classification"], sentiment, labels=LABELS, output=tmp_path / "out",
        settings=settings, dev=sentiment, work=tmp_path / "work" if work else None,
    )  # fmt: skip
    assert trained.dev_scores == tuple(scores) and trained.best_epoch == 2
    saved = weights(trained.path)
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    assert not torch.equal(saved["classifier.weight"], seen[-1]["classifier.weight"])
    assert sorted(path.name for path in trained.path.iterdir()) == [
        "config.json", MARK, "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_the_dev_score_is_that_of_the_saved_model(sentiment: Rows, make_rows, save_ready, tmp_path: Path) -> None:
    """Dev labels are the opposite of the training labels: the better it learns, the worse the score."""
    opposite = make_rows(
        [{"text": row["text"], "label": "bad" if row["label"] == "good" else "good"} for row in sentiment], "dev"
    )
    settings = TrainingSettings(learning_rate=5e-3, epochs=12, batch_size=3, best_epoch=True)
    trained = train(
        save_ready("base", "bert", **no_dropout("bert")), TASKS["text-classification"], sentiment,
        labels=LABELS, output=tmp_path / "out", settings=settings, dev=opposite, metric="accuracy",
    )  # fmt: skip
    assert trained.best_epoch is not None and trained.best_epoch < 12
    assert trained.dev_scores[trained.best_epoch - 1] == max(trained.dev_scores) > trained.dev_scores[-1]
    found = score(trained.path, "text-classification", opposite)
    assert found["accuracy"] == max(trained.dev_scores)


def test_less_is_better_where_the_metric_says_so(sentiment: Rows, save_ready, tmp_path: Path) -> None:
    settings = TrainingSettings(learning_rate=1e-2, epochs=3, best_epoch=True)
    trained = train(
        save_ready("base", "gpt2"), TASKS["causal-lm"], sentiment, output=tmp_path / "out", settings=settings,
        dev=sentiment, metric="perplexity",
    )  # fmt: skip
    assert trained.best_epoch is not None
    assert trained.dev_scores[trained.best_epoch - 1] == min(trained.dev_scores) < max(trained.dev_scores)


def test_same_arguments_same_bytes(sentiment: Rows, save_ready, tmp_path: Path, quick) -> None:
    base, settings = save_ready("base", "bert"), quick.model_copy(update={"epochs": 2})
    options: dict[str, Any] = {"labels": LABELS, "settings": settings}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(base, TASKS["text-classification"], sentiment, output=tmp_path / name, seed=seed, **options)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "other").keys()
    assert (tmp_path / "one/model.safetensors").read_bytes() != (tmp_path / "other/model.safetensors").read_bytes()


def test_heads(sentiment: Rows, make_rows, save_ready, tmp_path: Path) -> None:
    """A head of the same labels is kept; any other is drawn from head_seed, whatever the base had before."""
    still = TrainingSettings(learning_rate=1e-12, max_steps=1)
    kept_base = save_ready("kept", "roberta", num_labels=2, id2label={0: "good", 1: "bad"})
    named = save_ready("named", "roberta", num_labels=2)  # as many labels of other names
    wide = save_ready("wide", "roberta", num_labels=5)
    model = transformers.AutoModel.from_pretrained(kept_base, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "bare")
    load_tokenizer(open_model(kept_base)).save_pretrained(tmp_path / "bare")

    def head(base: Path, name: str, **seeds: int) -> dict[str, torch.Tensor]:
        trained = train(
            base,
            TASKS["text-classification"],
            sentiment,
            labels=LABELS,
            output=tmp_path / name,
            settings=still,
            **seeds,
        )
        return {key: value for key, value in weights(trained.path).items() if key.startswith("classifier.")}

    start = {key: value for key, value in weights(kept_base).items() if key.startswith("classifier.")}
    torch.testing.assert_close(head(kept_base, "a"), start, rtol=0, atol=1e-9)
    drawn = head(tmp_path / "bare", "b", seed=1, head_seed=7)
    for base, name in ((named, "c"), (wide, "d")):
        torch.testing.assert_close(head(base, name, seed=2, head_seed=7), drawn, rtol=0, atol=1e-9)
    assert not torch.allclose(head(named, "e", seed=1, head_seed=8)["classifier.out_proj.weight"],
                              drawn["classifier.out_proj.weight"])  # fmt: skip
    torch.testing.assert_close(head(named, "f", seed=7), drawn, rtol=0, atol=1e-9)


def test_max_steps_override_epochs_and_the_schedules_differ(sentiment: Rows, save_ready, tmp_path: Path, quick) -> None:
    base, found = save_ready("base", "bert"), []
    for schedule in ("linear", "polynomial"):
        steps: list[tuple[int, int]] = []
        settings = quick.model_copy(update={"max_steps": 5, "schedule": schedule, "warmup": 0.3})
        train(
            base, TASKS["text-classification"], sentiment, labels=LABELS, output=tmp_path / schedule,
            settings=settings, on_step=lambda done, total, steps=steps: steps.append((done, total)),
        )  # fmt: skip
        assert steps == [(step, 5) for step in range(1, 6)]
        found.append((tmp_path / schedule / "model.safetensors").read_bytes())
    assert found[0] != found[1]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.06), (2, 0.9), (1, 0)])
def test_so_few_steps_that_all_would_warm_up(
    steps: int, warmup: float, sentiment: Rows, save_ready, tmp_path: Path, quick
) -> None:
    """transformers divides by the steps that are left after the warm-up."""
    update = {"max_steps": steps, "schedule": "polynomial", "warmup": warmup}
    base, settings = save_ready("base", "bert"), quick.model_copy(update=update)
    task = TASKS["text-classification"]
    done = train(base, task, sentiment, labels=LABELS, output=tmp_path / "out", settings=settings)
    assert math.isfinite(done.loss)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": ("good",)}, DataError, "at least two"),
        ({"labels": ("good", "good")}, DataError, "distinct"),
        ({"labels": ("good", "fine")}, DataError, r"toy:2.*'bad'"),
        ({"labels": ()}, DataError, "at least two"),
        ({"base": "no-such-folder"}, CheckpointError, "no-such-folder"),
        ({"task": TASKS["seq2seq"]}, CheckpointError, "no head for seq2seq"),
        ({"task": TASKS["feature-extraction"]}, UserError, "nothing to learn"),
        ({"settings": TrainingSettings(best_epoch=True)}, UserError, "best epoch"),
        ({"settings": TrainingSettings(max_length=2)}, UserError, "maximum length"),
        ({"settings": TrainingSettings(learning_rate=1e30)}, DataError, "diverged"),
        ({"metric": "f2", "dev": True}, UserError, "f2"),
        ({"columns": {"text": "sentences"}}, DataError, "sentences"),
        ({"task": TASKS["regression"]}, DataError, "one name"),
    ],
)
def test_refusals_write_nothing(
    change: dict, error: type[Exception], words: str, sentiment: Rows, save_ready, tmp_path: Path, quick
) -> None:
    base = transformers.AutoModel.from_pretrained(save_ready("head", "bert"))
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(open_model(tmp_path / "head")).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {
        "base": tmp_path / "base", "task": TASKS["text-classification"], "rows": sentiment, "labels": LABELS,
        "settings": quick, **change,
    }  # fmt: skip
    if change.get("dev"):
        options["dev"] = sentiment
    with pytest.raises(error, match=words):
        train(**options, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "head"]


def test_an_existing_output_is_kept(sentiment: Rows, save_ready, tmp_path: Path, quick) -> None:
    base = save_ready("base", "bert")
    with pytest.raises(FileError, match="one of the inputs"):
        train(base, TASKS["text-classification"], sentiment, labels=LABELS, output=base, settings=quick, overwrite=True)
