"""Collecting on another device: everything is where it belongs, and the numbers are those of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import WORDS
from fisher_oracle import build
from merganser.collection import collect_statistics, per_example
from merganser.collection import run as verb
from merganser.collection.masks import split_by_length
from merganser.collection.placement import Placement
from merganser.collection.sampling import Sampling
from merganser.statistics import Statistics
from other_device import DEVICE, Far, OtherDevice
from statistics_examples import batched, make_examples


def same(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(truth)
    for name, value in truth.items():
        assert type(ours[name]) is torch.Tensor and ours[name].dtype == value.dtype
        assert (ours[name].double() - value.double()).abs().max() <= 1e-5 * value.abs().max() + 1e-10, name


CASES: list[tuple[str, Any, str, Callable[[int, int], Any]]] = [
    ("bert", transformers.BertForSequenceClassification, "expected", lambda n, _: -100 if n == 2 else n % 3),
    ("roberta", transformers.RobertaForSequenceClassification, "predicted", lambda n, _: n % 3),
    ("distilbert", transformers.DistilBertForTokenClassification, "expected", lambda n, t: [n % 3] * t),
    ("mpnet", transformers.MPNetForSequenceClassification, "empirical", lambda n, _: n % 3),
    ("deberta-v2", transformers.DebertaV2ForSequenceClassification, "expected", lambda n, _: n % 3),
    ("gpt2", transformers.GPT2ForTokenClassification, "empirical", lambda n, t: [n % 3] + [-100] * (t - 1)),
]


@pytest.mark.parametrize(("architecture", "model_class", "kind", "label"), CASES)
@pytest.mark.parametrize("sampling", [None, Sampling(0.5)])
def test_the_numbers_are_those_of_the_cpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    model_class: Any,
    kind: Any,
    label: Callable[[int, int], Any],
    sampling: Sampling | None,
) -> None:
    monkeypatch.setattr(per_example, "DEVICE_TOKENS", 20)
    monkeypatch.setattr(per_example, "PRODUCT_BYTES", 4 * 2 * 16 * 24)
    model, checkpoint = build(tmp_path, architecture, model_class, num_labels=3)
    model.config.use_cache = False  # whose empty tensors are made where no pretence reaches
    examples = make_examples(model, 9)
    labelled = [{**e, "labels": label(n, len(e["input_ids"]))} for n, e in enumerate(examples)]
    batches = batched(model, labelled, 4)
    options: dict[str, Any] = {"fisher": kind, "kfac": "auto", "sampling": sampling}
    plain, truth = collect_statistics(model, checkpoint, batches, **options)
    with OtherDevice():
        model.to(DEVICE)
        assert all(isinstance(parameter, Far) for parameter in model.parameters())
        header, tensors = collect_statistics(model, checkpoint, batches, **options)
    assert header.layers == plain.layers and header.fisher_examples == plain.fisher_examples
    slow = any("one example at a time" in note for note in header.notes)  # torch.func sees through the pretence
    assert slow == (architecture in ("mpnet", "deberta-v2"))
    if sampling is None:  # which rows are drawn depends on how batches are cut
        same(tensors, truth)


def test_pieces_are_larger_than_on_the_cpu(tmp_path: Path) -> None:
    model, _ = build(tmp_path, "bert", transformers.BertForSequenceClassification)
    (batch,) = batched(model, make_examples(model, 12), 12)
    with OtherDevice():
        moved = {key: value.to(DEVICE) for key, value in batch.items()}
        assert split_by_length(moved, model) == [moved] and split_by_length(moved, model, 8192) == [moved]
        pieces = split_by_length(moved, model, 40)
    assert len(pieces) > 1 and all(piece["input_ids"].numel() <= 40 for piece in pieces)
    rows = [row for piece in pieces for row in piece["input_ids"].cpu().tolist()]
    kept = sorted([token for token in row if token] for row in rows)
    assert kept == sorted([token for token in row if token] for row in batch["input_ids"].tolist())


def test_the_verb_takes_what_there_is(
    save_ready: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "r.jsonl"
    rows = [{"text": " ".join(WORDS[n : 2 * n + 1]), "labels": {"0": n % 2, "1": None}} for n in range(11)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save_ready("m", problem_type="multi_label_classification")
    options: dict[str, Any] = {"fisher": "expected", "shard_examples": 4, "until_converged": None}
    plain = Statistics.open(verb.collect(folder, data, **options))
    monkeypatch.setattr(verb, "choose_placement", lambda *_, **__: Placement(DEVICE))
    with OtherDevice():
        path = verb.collect(folder, data, device="auto", output=tmp_path / "far.safetensors", **options)
    far = Statistics.open(path)
    assert far.header == plain.header
    same({n: far.packed(n) for n in far.tensors}, {n: plain.packed(n) for n in plain.tensors})
