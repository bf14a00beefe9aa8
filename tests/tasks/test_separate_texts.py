"""Queries, documents and triplets of bi-encoders: each text alone, with the prompt of its role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from conftest import make_model, save_tokenizer
from merganser import collect
from merganser.errors import DataError
from merganser.statistics import Statistics
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.models import open_model
from merganser.tasks.separate_texts import separate_texts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    t.BertModel(make_model("bert").config).save_pretrained(folder)
    save_tokenizer(folder, "bert")
    (folder / "modules.json").write_text("[]")
    prompts = {"query": "is it ? ", "document": "movie : "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows("d.jsonl", rows, tuple(("d.jsonl", n) for n in range(1, len(rows) + 1)))


def texts(model: Path, *rows: dict[str, Any], given: Columns | None = None) -> list[str] | None:
    data = rows_of(*rows)
    found = separate_texts(data, open_model(model), given or Columns())
    return None if found is None else [row["text"] for row in found.apply(data)]


def test_each_text_has_the_prompt_of_its_role(model: Path) -> None:
    assert texts(model, {"query": "a", "positive": "b", "negative_1": "c", "id": 7}) == [
        "is it ? a", "movie : b", "movie : c"
    ]  # fmt: skip
    assert texts(model, {"anchor": "a", "positive": ["b", "c"]}) == ["is it ? a", "movie : b", "movie : c"]
    assert texts(model, {"sentence1": "a", "sentence2": "b", "score": 0.5}) == ["a", "b"]
    assert texts(model, {"left": "a", "right": "b"}, given=Columns("left", "right")) == ["a", "b"]
    assert texts(model, {"text": "a"}) is None  # nothing to change


def test_a_default_prompt_and_names_that_other_models_have(model: Path) -> None:
    settings = {"prompts": {"sts": "so : ", "passage": "p : "}, "default_prompt_name": "sts"}
    (model / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert texts(model, {"text": "a"}, {"text": "b"}) == ["so : a", "so : b"]
    assert texts(model, {"question": "a", "passage": "b"}) == ["so : a", "p : b"]


def test_a_value_that_is_no_text_names_its_line(model: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: 'positive' is int '3', not text"):
        texts(model, {"query": "a", "positive": "b"}, {"query": "a", "positive": 3})
    with pytest.raises(DataError, match=r"d\.jsonl:1: the row has no 'positive'"):
        texts(model, {"query": "a", "positive": None})


def test_other_encoders_read_pairs_together(model: Path) -> None:
    (model / "modules.json").unlink()
    assert texts(model, {"query": "a", "positive": "b"}) is None


def test_statistics_are_those_of_the_texts_with_their_prompts(model: Path, tmp_path: Path) -> None:
    rows = [
        {"query": "good movie", "positive": "very good", "negative": "bad"},
        {"query": "a", "positive": "b", "negative": "c"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = collect(model, tmp_path / "pairs.jsonl")
    assert written.header.examples == 6
    said = (
        "columns, each text alone: 'query' after 'is it ? ', 'positive' after 'movie : ', 'negative' after 'movie : '"
    )
    assert said in written.header.notes
    tokenizer = t.AutoTokenizer.from_pretrained(model)
    ids = [
        token
        for row in rows
        for text in ("is it ? " + row["query"], "movie : " + row["positive"], "movie : " + row["negative"])
        for token in tokenizer(text)["input_ids"]
    ]
    counts = Statistics.open(written.path).count("embeddings.word_embeddings")
    assert torch.equal(counts, torch.bincount(torch.tensor(ids), minlength=len(counts)))
