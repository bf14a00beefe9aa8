"""The verb evaluate against models run by hand, one text at a time and without padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics

import merganser.evaluation.run as module
from merganser.errors import CheckpointError, DataError, Problems, UserError
from merganser.evaluation import evaluate

Save = Callable[..., Path]
TEXTS = [
    "the movie was good", "bad food !", "I liked it very much . it was not bad", "no", "yes , it is good !",
    "Anna saw the movie in Paris", "not good", "the food is bad", "a very very good movie !", "I saw it",
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write(tmp_path / "reviews.jsonl", [{"text": t, "label": n % 3} for n, t in enumerate(TEXTS)])


def logits_by_hand(folder: Path, texts: list[str], auto: Any) -> list[np.ndarray]:
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts]


CLASSIFY = transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_text_alone(save_ready: Save, reviews: Path, batch_size: int) -> None:
    folder = save_ready("m", "bert", 5, num_labels=3)
    found = evaluate(folder, reviews, batch_size=batch_size, bootstrap=0).rows[0]
    predicted = np.stack(logits_by_hand(folder, TEXTS, CLASSIFY)).argmax(1)
    true = np.arange(len(TEXTS)) % 3
    assert found.scores["accuracy"] == pytest.approx((predicted == true).mean())
    assert found.scores["macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert found.key_metric == "macro_f1" and found.examples == len(TEXTS) and found.standard_error is None


def test_several_models_data_sets_and_their_ensemble(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    models = [save_ready(f"m{seed}", "bert", seed, num_labels=3) for seed in range(3)]
    other = write(tmp_path / "other.jsonl", [{"text": t, "label": (n + 1) % 3} for n, t in enumerate(TEXTS[:7])])
    found = evaluate(models, [reviews, other], ensemble=True, bootstrap=20)
    assert found.models == (*map(str, models), "ensemble") and len(found.rows) == 8
    logits = [np.stack(logits_by_hand(folder, TEXTS, CLASSIFY)) for folder in models]
    for m, folder in enumerate(models):
        predicted = logits[m].argmax(1)
        assert found.score(str(folder), str(reviews)).scores["accuracy"] == pytest.approx(
            (predicted == np.arange(10) % 3).mean()
        )
    together = np.mean(logits, axis=0).argmax(1)
    row = found.score("ensemble", str(reviews))
    assert row.scores["accuracy"] == pytest.approx((together == np.arange(10) % 3).mean())
    assert row.versus_first is not None and found.rows[0].versus_first is None
    assert row.versus_first["low"] <= row.versus_first["difference"] + 0.5
    assert row.standard_error is not None and 0 <= row.standard_error < 0.5


def test_models_of_different_label_spaces_make_an_ensemble(save_ready: Save, tmp_path: Path) -> None:
    one = save_ready("one", "bert", 1, id2label={0: "bad", 1: "good"})
    two = save_ready("two", "bert", 2, id2label={0: "fine", 1: "good", 2: "bad"})
    names = ["bad", "good", "fine"]
    data = write(tmp_path / "d.jsonl", [{"text": t, "label": names[n % 3]} for n, t in enumerate(TEXTS)])
    with pytest.raises(DataError, match=r"d\.jsonl:3: label 'fine' is outside the model's label space: 0 = bad"):
        evaluate([one, two], data)
    found = evaluate([one, two], data, ensemble=True, bootstrap=0)
    a = np.stack(logits_by_hand(one, TEXTS, CLASSIFY))
    b = np.stack(logits_by_hand(two, TEXTS, CLASSIFY))
    joint = np.stack([(a[:, 0] + b[:, 2]) / 2, (a[:, 1] + b[:, 1]) / 2, b[:, 0]], axis=1)
    true = np.arange(10) % 3
    assert found.score("ensemble", str(data)).scores["accuracy"] == pytest.approx((joint.argmax(1) == true).mean())
    assert found.score(str(one), str(data)).scores["accuracy"] == pytest.approx((a.argmax(1) == true).mean())
    numbered = write(tmp_path / "n.jsonl", [{"text": "a", "label": 0}])
    with pytest.raises(DataError, match="the models number their labels differently"):
        evaluate([one, two], numbered, ensemble=True)


def test_multi_label_ensembles_average_over_the_models_that_know(save_ready: Save, tmp_path: Path) -> None:
    options: dict[str, Any] = {"problem_type": "multi_label_classification"}
    one = save_ready("one", "bert", 1, id2label={0: "joy", 1: "fear"}, **options)
    two = save_ready("two", "bert", 2, id2label={0: "anger", 1: "joy"}, **options)
    marks = [{"joy": n % 2, "fear": None if n % 3 else 1, "anger": 0} for n in range(len(TEXTS))]
    data = write(tmp_path / "d.jsonl", [{"text": t, "labels": m} for t, m in zip(TEXTS, marks, strict=True)])
    found = evaluate([one, two], data, ensemble=True, bootstrap=0).score("ensemble", str(data))
    a = np.stack(logits_by_hand(one, TEXTS, CLASSIFY))
    b = np.stack(logits_by_hand(two, TEXTS, CLASSIFY))
    joint = {"joy": (a[:, 0] + b[:, 1]) / 2, "fear": a[:, 1], "anger": b[:, 0]}
    f1 = []
    for name, logits in joint.items():
        known = [n for n, mark in enumerate(marks) if mark[name] is not None]
        true = [marks[n][name] for n in known]
        f1.append(metrics.f1_score(true, logits[known] > 0, zero_division=0))
    assert found.task == "multi-label" and found.scores["macro_f1"] == pytest.approx(np.mean(f1))


def test_regression_of_pairs(save_ready: Save, tmp_path: Path) -> None:
    folder = save_ready("m", "bert", 4, num_labels=1)
    rows = [{"sentence1": t, "sentence2": u, "score": n / 3} for n, (t, u) in enumerate(pairwise(TEXTS))]
    found = evaluate(folder, write(tmp_path / "d.jsonl", rows), bootstrap=0).rows[0]
    model, tokenizer = (CLASSIFY.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        predicted = [
            model(
                **tokenizer(r["sentence1"], r["sentence2"], return_tensors="pt", return_token_type_ids=True)
            ).logits.item()
            for r in rows
        ]
    expected = np.corrcoef(predicted, [r["score"] for r in rows])[0, 1]
    assert found.task == "regression" and found.scores["pearson"] == pytest.approx(expected, abs=1e-4)


def test_token_classification_by_hand(save_ready: Save, tmp_path: Path) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    model_class = transformers.BertForTokenClassification
    folder = save_ready("m", "bert", 8, model_class, id2label=dict(enumerate(names)))
    generator = np.random.default_rng(0)
    rows = [{"tokens": t.split(), "ner_tags": generator.choice(names, len(t.split())).tolist()} for t in TEXTS]
    data = write(tmp_path / "d.jsonl", rows)
    logits = logits_by_hand(folder, TEXTS, transformers.AutoModelForTokenClassification)
    predicted = [[names[k] for k in row[1:-1].argmax(1)] for row in logits]  # one piece a word here
    true = [row["ner_tags"] for row in rows]
    found = evaluate(folder, data, bootstrap=0).rows[0]
    assert found.scores["f1"] == pytest.approx(seqeval.f1_score(true, predicted, zero_division=0))
    assert found.scores["recall"] == pytest.approx(seqeval.recall_score(true, predicted, zero_division=0))
    cut = evaluate(folder, data, max_length=5, bootstrap=0).rows[0]  # three words, the rest is predicted O
    short = logits_by_hand(
        folder, [" ".join(t.split()[:3]) for t in TEXTS], transformers.AutoModelForTokenClassification
    )
    shortened = [
        [names[k] for k in row[1:-1].argmax(1)] + ["O"] * (len(t) - 3) for row, t in zip(short, true, strict=True)
    ]
    assert cut.truncated == sum(len(t) > 3 for t in true) > 0
    assert cut.scores["f1"] == pytest.approx(seqeval.f1_score(true, shortened, zero_division=0))


def test_token_ensembles_of_different_tokenizers(save_ready: Save, tmp_path: Path) -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    one = save_ready("one", "bert", 1, transformers.BertForTokenClassification, id2label=names)
    two = save_ready("two", "roberta", 2, transformers.RobertaForTokenClassification, id2label=names)
    rows = [{"tokens": t.split(), "ner_tags": ["B-PER"] * len(t.split())} for t in TEXTS]
    found = evaluate([one, two], write(tmp_path / "d.jsonl", rows), ensemble=True, bootstrap=0)
    assert found.models[-1] == "ensemble"
    odd = save_ready("odd", "bert", 1, transformers.BertForTokenClassification)
    with pytest.raises(CheckpointError, match="labels are not BIO tags: LABEL_0, LABEL_1"):
        evaluate(odd, tmp_path / "d.jsonl")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_language_models_by_hand(save_ready: Save, tmp_path: Path, architecture: str) -> None:
    folder = save_ready("m", architecture, 3)
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    found = evaluate(folder, data, bootstrap=10).rows[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            if ids.shape[1] > 1:
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
    assert found.scores["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert found.scores["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-4)
    assert found.key_metric == "nll" and not found.higher_is_better
    with pytest.raises(UserError, match="causal-lm has no ensemble"):
        evaluate([folder, save_ready("n", architecture, 4)], data, ensemble=True)


def test_generation_by_hand(save_ready: Save, tmp_path: Path) -> None:
    folder = save_ready("m", "t5", 3)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = []
    for text in TEXTS:
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=3, do_sample=False)
        said.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    rows = [{"source": t, "target": s if n % 2 else "never"} for n, (t, s) in enumerate(zip(TEXTS, said, strict=True))]
    data = write(tmp_path / "d.jsonl", rows)
    found = evaluate(folder, data, task_options={"max_new_tokens": 3}, bootstrap=0).rows[0]
    assert found.scores == {"exact_match": 0.5}


def test_decoders_that_classify(save_ready: Save, reviews: Path) -> None:
    for architecture, name in (("gpt2", "GPT2"), ("llama", "Llama")):
        model_class = getattr(transformers, f"{name}ForSequenceClassification")
        folder = save_ready(architecture, architecture, 1, model_class, num_labels=3)
        predicted = np.stack(logits_by_hand(folder, TEXTS, CLASSIFY)).argmax(1)
        found = evaluate(folder, reviews, batch_size=4, bootstrap=0).rows[0]
        assert found.scores["accuracy"] == pytest.approx((predicted == np.arange(10) % 3).mean())


def test_each_model_is_loaded_once(save_ready: Save, reviews: Path, tmp_path: Path, monkeypatch: Any) -> None:
    loaded: list[str] = []
    inner = module.load_model

    def counting(opened: Any, *args: Any, **options: Any) -> Any:
        loaded.append(opened.name)
        return inner(opened, *args, **options)

    monkeypatch.setattr(module, "load_model", counting)
    models = [save_ready(name, "bert", num_labels=3) for name in ("a", "b")]
    second = tmp_path / "second.jsonl"
    second.write_bytes(reviews.read_bytes())
    evaluate(models, [reviews, second], ensemble=True, bootstrap=0)
    assert loaded == [str(model) for model in models]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(module, "load_model", refuse)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "text-clasification"}, "did you mean 'text-classification'"),
        ({"metric": "f1"}, "text-classification has no metric 'f1'"),
        ({"ensemble": True}, "an ensemble needs at least two models"),
        ({"columns": {"label": "stars"}}, "no column 'stars' (--label-column); the columns are text, label"),
        ({"task_options": {"threshold": 0.3}}, "has no option 'threshold'"),
        ({"task": "seq2seq"}, "which has no head for seq2seq"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    save_ready: Save, reviews: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(save_ready("m", "bert", num_labels=3), reviews, **options)
    assert says in str(caught.value)


@pytest.mark.usefixtures("no_loading")
def test_mistakes_in_several_places_are_told_at_once(save_ready: Save, tmp_path: Path, reviews: Path) -> None:
    folder = save_ready("m", "bert", num_labels=3)
    bad = write(tmp_path / "bad.jsonl", [{"text": "a", "label": 9}])
    worse = write(tmp_path / "worse.jsonl", [{"text": "a"}])
    with pytest.raises(Problems) as caught:
        evaluate([folder, save_ready("n", "bert", num_labels=3)], [bad, worse, reviews])
    assert len(caught.value.problems) == 2
    assert f"{bad}:1: label 9 is outside the model's label space" in str(caught.value)
    assert "worse.jsonl: no column for the label was found; the columns are text" in str(caught.value)
    with pytest.raises(Problems) as caught:
        evaluate([tmp_path / "none", folder], [tmp_path / "gone.jsonl"])
    assert len(caught.value.problems) == 2


@pytest.mark.usefixtures("no_loading")
def test_base_models_and_doubles_are_refused(save_ready: Save, reviews: Path) -> None:
    base = save_ready("base", "bert", 0, transformers.BertModel)
    with pytest.raises(CheckpointError, match="a model without a head makes no predictions"):
        evaluate(base, reviews)
    with pytest.raises(UserError, match="is given twice"):
        evaluate([base, base], reviews)
    with pytest.raises(UserError, match="no models to evaluate"):
        evaluate([], reviews)
    other = save_ready("lm", "gpt2")
    with pytest.raises(UserError, match="models of different tasks make no ensemble"):
        evaluate([save_ready("m", "bert"), other], reviews, ensemble=True)


def test_weights_that_give_nan_are_named(save_ready: Save, reviews: Path) -> None:
    folder = save_ready("m", "bert", num_labels=3)
    model = CLASSIFY.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"outputs are not finite \(.*reviews\.jsonl:1\)"):
        evaluate(folder, reviews)


def test_heads_in_subfolders(save_ready: Save, reviews: Path) -> None:
    root, head = save_ready("m", "bert", 1, num_labels=3), save_ready("other", "bert", 2, num_labels=3)
    place = root / "heads" / "other"
    place.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (place / name).write_bytes((head / name).read_bytes())
    found = evaluate([f"{root}::heads/other", head], reviews, bootstrap=0)
    assert found.rows[0].scores == found.rows[1].scores
