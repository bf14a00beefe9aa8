"""The verb collect, from files to a statistics file; and every mistake, found before the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merganser.collection import Collector, collect, placement
from merganser.errors import DataError, Problems, UserError
from merganser.statistics import FILE_NAME, Statistics

Save = Callable[..., Path]
TEXTS = ["the movie was good", "bad food !", "I liked it very much . it was not bad", "no"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write(tmp_path / "reviews.jsonl", [{"text": t, "label": n % 2} for n, t in enumerate(TEXTS)])


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load a model fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(placement, "load_model", refuse)


def test_the_gram_is_that_of_each_text_alone(save_ready: Save, reviews: Path) -> None:
    folder = save_ready("m", seed=3)
    path = collect(folder, reviews, batch_size=3, label="reviews of 2014")
    assert path == folder / FILE_NAME
    statistics = Statistics.open(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("bert.encoder.layer.1.attention.self.key")
    layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().double()[0]))
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    x = torch.cat(seen)
    entry = statistics.layer("bert.encoder.layer.1.attention.self.key.weight")
    assert entry is not None and entry.input is not None and entry.rows == len(x)
    torch.testing.assert_close(statistics.gram(entry.input).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.mean(entry.input).double(), x.mean(0), rtol=1e-4, atol=1e-5)
    header = statistics.header
    assert header.examples == 4 and header.tokens == len(x) and header.label == "reviews of 2014"
    assert "task: text-classification" in header.notes
    assert not any(text in path.read_bytes().decode("latin-1") for text in TEXTS[:3])  # never text


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "deberta-v2", "mpnet", "gpt2", "llama"])
def test_every_architecture(architecture: str, save_ready: Save, reviews: Path) -> None:
    path = collect(save_ready("m", architecture), reviews, fisher="expected")
    statistics = Statistics.open(path)
    statistics.validate()
    assert statistics.header.examples == 4 and statistics.header.fisher == "expected"


def test_decoders_that_classify_need_no_padding_token(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m", "gpt2", 0, transformers.GPT2ForSequenceClassification)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    alone = Statistics.open(collect(folder, reviews, batch_size=1, fisher="empirical"))
    padded = collect(folder, reviews, batch_size=4, fisher="empirical", output=tmp_path / "other.safetensors")
    for name in ("score.weight", "transformer.h.1.mlp.c_fc.weight"):
        torch.testing.assert_close(alone.fisher(name), Statistics.open(padded).fisher(name), rtol=1e-3, atol=1e-7)


def test_encoder_decoders_count_both_sides(save_ready: Save, tmp_path: Path) -> None:
    rows = [{"source": text, "target": target} for text, target in zip(TEXTS, ("yes", "no", "yes", "no"), strict=True)]
    data = write(tmp_path / "s.jsonl", rows)
    header = Statistics.open(collect(save_ready("m", "t5"), data, fisher="empirical")).header
    words = sum(len(text.split()) + 1 for text in TEXTS)  # and </s>
    assert header.tokens == words + 2 * len(TEXTS)  # each target is a word and </s>
    with pytest.raises(DataError, match="no column for the target was found; the columns are source"):
        collect(save_ready("n", "t5"), write(tmp_path / "u.jsonl", [{"source": "a"}]))


def test_token_classifiers_and_base_encoders(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    tagged = write(tmp_path / "t.jsonl", [{"tokens": ["in", "Paris"], "ner_tags": ["O", "B-LOC"]}])
    names = {0: "O", 1: "B-LOC"}
    folder = save_ready("tags", "bert", 0, transformers.BertForTokenClassification, id2label=names)
    assert Statistics.open(collect(folder, tagged, fisher="empirical")).has_fisher("classifier.weight")
    base = save_ready("base", "bert", 0, transformers.BertModel)
    assert "task: feature-extraction" in Statistics.open(collect(base, reviews)).header.notes


def test_unlabelled_text_is_enough_for_grams(save_ready: Save, tmp_path: Path) -> None:
    data = write(tmp_path / "u.jsonl", [{"text": text} for text in TEXTS])
    folder = save_ready("m")
    assert Statistics.open(collect(folder, data)).header.examples == 4
    with pytest.raises(DataError, match="no column for the label was found"):
        collect(folder, data, fisher="empirical", overwrite=True)


def test_fisher_examples_are_the_first_of_the_data(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    part = Statistics.open(collect(folder, reviews, fisher="empirical", fisher_examples=2, batch_size=1))
    head = write(tmp_path / "head.jsonl", [json.loads(line) for line in reviews.read_text().splitlines()[:2]])
    whole = Statistics.open(collect(folder, head, fisher="empirical", output=tmp_path / "h.safetensors"))
    assert part.header.fisher_examples == 2 and part.header.examples == 4
    torch.testing.assert_close(part.fisher("classifier.weight"), whole.fisher("classifier.weight"))


def test_cut_texts_are_counted(save_ready: Save, reviews: Path) -> None:
    header = Statistics.open(collect(save_ready("m"), reviews, max_length=5)).header
    assert "texts cut at 5 tokens; 2 of 4 texts were longer and cut" in header.notes
    assert header.tokens == 5 + 5 + 5 + 3


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (None, {"task": "sentiment"}, "unknown task 'sentiment'"),
        (None, {"fisher": "emprical"}, "did you mean 'empirical'"),
        (None, {"batch_size": 0}, "batch_size is 0"),
        (None, {"limit": 0}, "the limit is 0"),
        (None, {"columns": {"text": "body"}}, "no column 'body' (--text-column); the columns are text, label"),
        (None, {"columns": {"body": "text"}}, "unknown column role 'body'"),
        (None, {"fisher": "empirical", "use_labels": False}, "empirical Fisher information is made of labels"),
        (None, {"grams": False}, "there is nothing to collect"),
        (None, {"task": "token-classification"}, "which has no head for token-classification"),
        (None, {"task": "feature-extraction", "fisher": "expected"}, "Fisher information needs a head"),
        (None, {"max_length": 2}, "leaves no room beside 2 special tokens"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 7}], {}, "reviews.jsonl:2: label 7 is outside"),
        ([{"text": "a", "label": 0}, {"label": 1}], {}, "reviews.jsonl:2: the row has no 'text'"),
        ([{"headline": "a"}], {}, "no column for the text was found; the columns are headline"),
        ([], {}, "reviews.jsonl: no data: not a single row"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    save_ready: Save, reviews: Path, rows: list[dict[str, Any]] | None, options: dict[str, Any], says: str
) -> None:
    folder = save_ready("m")
    if rows is not None:
        write(reviews, rows)
    with pytest.raises(UserError) as caught:
        collect(folder, reviews, **options)
    assert says in str(caught.value)
    assert "to mend:" in str(caught.value)
    assert not (folder / FILE_NAME).exists()


def test_foreign_labels_can_be_ignored_on_purpose(save_ready: Save, reviews: Path) -> None:
    write(reviews, [{"text": "a", "label": 7}])
    with pytest.raises(DataError, match="--ignore-labels"):
        collect(save_ready("m"), reviews)
    assert collect(save_ready("n"), reviews, use_labels=False).exists()


@pytest.mark.usefixtures("no_loading")
def test_outputs_that_cannot_be_written(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    (folder / FILE_NAME).write_bytes(b"old")
    with pytest.raises(UserError, match="the output exists"):
        collect(folder, reviews)
    with pytest.raises(UserError, match="the folder of the output does not exist"):
        collect(folder, reviews, output=tmp_path / "no" / "where.safetensors")
    assert (folder / FILE_NAME).read_bytes() == b"old"


@pytest.mark.usefixtures("no_loading")
def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        collect(tmp_path / "no-model", tmp_path / "no-data.jsonl")
    assert "no such folder" in str(caught.value) and "no such file or folder" in str(caught.value)


def test_overwriting_replaces_the_file(save_ready: Save, reviews: Path) -> None:
    folder = save_ready("m")
    first = collect(folder, reviews, label="one")
    collect(folder, reviews, label="two", overwrite=True)
    assert Statistics.open(first).header.label == "two"


def test_an_interrupted_run_leaves_nothing(save_ready: Save, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_ready("m")
    before = sorted(folder.iterdir())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(folder, reviews)
    assert sorted(folder.iterdir()) == before


def test_what_collect_returns(save_ready, reviews: Path) -> None:
    result = collect(save_ready("m", "bert"), reviews, fisher="expected")
    assert result == result.path and Path(result).is_file() and result.seconds > 0
    assert result.header == Statistics.open(result).header
    shown = result._repr_html_()
    assert f"{result.header.examples} examples" in shown and "linear" in shown and "embedding" in shown
