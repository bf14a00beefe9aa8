"""Texts for decoders: every corpus of three suites without its labels, and the score of the likeliest token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from merganser.errors import DataError
from merganser.lab.grid.config import ExperimentConfig
from merganser.lab.grid.run import run_experiment
from merganser.lab.suites.texts import NextToken, Texts
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.models import load_model, load_tokenizer, open_model
from merganser.tasks.predict import predict


def test_corpora_of_three_suites(tiny_resources: Path) -> None:
    suite = Texts(tiny_resources)
    assert {"isear", "mrpc", "twitter", "onto-bc"} <= set(suite.sets())
    first = json.loads((tiny_resources / "emotion_splits" / "isear" / "dev.jsonl").read_text().splitlines()[0])
    assert suite.read("isear", "dev")[0] == {"text": first["text"]}
    pair = json.loads((tiny_resources / "glue" / "mrpc" / "validation.jsonl").read_text().splitlines()[0])
    assert [row["text"] for row in suite.read("mrpc", "test")[:2]] == [pair["sentence1"], pair["sentence2"]]
    tweet = json.loads((tiny_resources / "ner" / "twitter" / "train.json").read_text().splitlines()[0])
    assert suite.read("twitter", "train")[0]["text"].split() == tweet["tokens"]
    sizes = [len(suite.read("mrpc", split)) for split in ("train", "dev")]
    assert min(sizes) > 0 and sum(sizes) == 2 * len((tiny_resources / "glue/mrpc/train.jsonl").read_text().splitlines())
    assert suite.labels("mrpc") == () and suite.metric("mrpc") == "accuracy"
    with pytest.raises(DataError, match=r"(?s)no data set 'iseer'.*emotion_splits/iseer"):
        suite.read("iseer", "train")


def test_the_share_of_tokens_that_are_the_likeliest(save_ready: Callable[..., Path]) -> None:
    opened = open_model(save_ready("base", "llama"))
    model, tokenizer = load_model(opened, "AutoModelForCausalLM"), load_tokenizer(opened)
    texts = ("the movie was good", "bad food")
    rows = Rows("x", tuple({"text": text} for text in texts), (("x", 1), ("x", 2)))
    found = predict(model, tokenizer, opened.config, NextToken(), rows, Columns(text="text"))
    right = total = 0
    loss = 0.0
    for text in texts:  # one at a time, without padding
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double().numpy()
        for place, token in enumerate(ids[1:]):
            right += int(np.argmax(logits[place]) == token)
            loss += float(np.log(np.exp(logits[place]).sum()) - logits[place, token])
            total += 1
    scores = NextToken().score(np.asarray(found.aligned))
    assert scores["accuracy"] == right / total
    assert scores["nll"] == pytest.approx(loss / total, rel=1e-5)
    assert NextToken().key_metric == "accuracy"


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_decoders_through_a_grid(
    lora: dict[str, int] | None, tmp_path: Path, tiny_resources: Path, pretrained: Callable[..., Path]
) -> None:
    config = ExperimentConfig.model_validate(
        {
            "name": "texts",
            "suite": {"name": "texts", "root": str(tiny_resources), "limits": {"train": 16, "dev": 6, "test": 8}},
            "pretrained": {"model": str(pretrained("gpt2")), "title": "tiny"},
            "training": {"epochs": 2, "learning_rate": 1e-2, "max_length": 16, "best_epoch": True, "lora": lora},
            "statistics": {"examples": 8, "fisher_examples": 4},
            "contributors": ["isear", "mrpc"],
            "layout": "all",
            "methods": ["simple", "regmean", "fisher", "ties", "actmat"],
            "comparators": ["individual", "multitask"],
            "tests": {"out_of_domain": ["twitter"]},
        }
    )
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.failures == ()
    rows = [json.loads(path.read_text()) for path in (done.folder / "cells").iterdir()]
    assert len(rows) == 2 + 1 + 5
    for row in rows:
        for score in row["scores"].values():
            assert score["metric"] == "accuracy" and 0 <= score["value"] <= 1 and score["all"]["nll"] > 0
        if row["kind"] == "merge":
            assert row["provenance"]["tensors"][row["method"]] > 0
