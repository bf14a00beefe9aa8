"""A dense layer behind the pooling gets statistics of what it sees in sentence-transformers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merganser.collection import collect
from merganser.merging import merge
from merganser.statistics import Statistics
from merganser.tensors import unpack_upper
from sentence_examples import TEXTS, opened, save_encoder

modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
BEHIND = (lambda: modules.LayerNorm(16), lambda: modules.Dense(16, 8), lambda: modules.Dense(8, 6), modules.Normalize)


def inputs_of(model: Path, place: int, texts: list[str]) -> torch.Tensor:
    """What module ``place`` sees of each text, from a hook on the library's own pipeline; one text at a time."""
    encoder, seen = opened(model), []
    encoder[place].linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    for text in texts:
        encoder.encode(text)
    return torch.cat(seen)


def data_of(folder: Path, texts: list[str]) -> Path:
    path = folder / f"texts-{len(texts)}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_grams_of_dense_layers(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "a", 1, *BEHIND)
    statistics = Statistics.open(collect(model, data_of(tmp_path, TEXTS)).path)
    for place, width in ((3, 16), (4, 8)):
        seen = inputs_of(model, place, TEXTS)
        entry = statistics.layer(f"{place}_Dense/linear.weight")
        assert entry is not None and entry.rows == len(TEXTS) and seen.shape == (len(TEXTS), width)
        gram = unpack_upper(statistics.packed(f"gram.{entry.input}")).double()
        assert torch.allclose(gram, seen.T @ seen / len(seen), atol=1e-6)
    assert not any("no statistics" in note and "Dense" in note for note in statistics.header.notes)


def test_regmean_of_dense_layers(tmp_path: Path) -> None:
    models = [save_encoder(tmp_path / "a", 1, *BEHIND), save_encoder(tmp_path / "b", 2, *BEHIND)]
    grams, weights = [], []
    for model, texts in zip(models, (TEXTS[:5], TEXTS[3:]), strict=True):
        collect(model, data_of(tmp_path, texts))
        seen = inputs_of(model, 3, texts)
        seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
        state = load_file(model / "3_Dense" / "model.safetensors")
        weights.append(torch.cat([state["linear.weight"], state["linear.bias"][:, None]], 1).double())
        grams.append(seen.T @ seen / len(seen))
    out = merge(models, tmp_path / "out", method="regmean", options={"alpha": 1.0, "ridge": 0.1})
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert used["3_Dense/linear.weight"]["method"] == used["4_Dense/linear.weight"]["method"] == "regmean"
    state = load_file(out / "3_Dense" / "model.safetensors")
    found = torch.cat([state["linear.weight"], state["linear.bias"][:, None]], 1).double()
    cost = [sum(((w - own) @ g * (w - own)).sum() for own, g in zip(weights, grams, strict=True))
            for w in (found, sum(weights) / 2)]  # fmt: skip
    assert cost[0] < 0.9 * cost[1]


def test_modules_without_statistics_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_encoder(tmp_path / "a", 1, *BEHIND)
    monkeypatch.setattr("merganser.collection.pipeline.importlib.util.find_spec", lambda name: None)
    found = collect(model, data_of(tmp_path, TEXTS))
    assert any("3_Dense, 4_Dense: no statistics without sentence-transformers" in note for note in found.header.notes)
