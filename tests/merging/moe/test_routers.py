"""Routers and noise of mixtures of experts: of the prompts' hidden states, or random numbers from a seed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser.merging.moe import build_moe
from merganser.merging.moe.routers import normal_numbers
from merging.moe.mixtures import NOT, ONE, TWO, Save, logits, mixture, opened


def states(folder: Path, text: str, how: str) -> np.ndarray:
    """What comes into each layer for a text, (layers, hidden) in float64: of the last token or the mean over tokens."""
    model, tokenizer = opened(folder), transformers.AutoTokenizer.from_pretrained(folder)
    seen: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].double().numpy()))
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        model(torch.tensor([ids]))
    if how == "cheap_embed":
        table = model.get_input_embeddings().weight.detach().double().numpy()
        return np.stack([table[ids].sum(0)] * len(seen))
    return np.stack([one.mean(0) if how == "hidden_avg" else one[-1] for one in seen])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("llama", mode) for mode in ("hidden", "hidden_last", "hidden_avg", "cheap_embed")),
        *((kind, "hidden") for kind in ("llama-tied", "llama3", "mistral", "qwen3")),
        ("mistral", "hidden_avg"),
    ],
)
def test_routers_are_made_of_the_prompts(kind: str, mode: str, save: Save, tmp_path: Path) -> None:
    base, other = save("base", kind), save("other", kind, seed=1)
    out = build_moe(mixture(base, base, other, gate_mode=mode), tmp_path / "out")
    one, yes, two, wrong = (states(base, text, mode) for text in (ONE, "yes", TWO, NOT))
    if mode == "cheap_embed":  # directions of sums are subtracted, as in mergekit
        rows = np.stack([unit(one + yes), unit(unit(two) - unit(wrong))], 1)
    else:
        rows = np.stack([unit((one + yes) / 2), unit(two - wrong)], 1)
    for number, expected in enumerate(rows):
        block = "mlp" if kind == "qwen3" else "block_sparse_moe"
        found = load_file(out / "model.safetensors")[f"model.layers.{number}.{block}.gate.weight"]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert any(not np.allclose(layer[0], layer[1], atol=1e-2) for layer in rows)


def test_the_token_that_begins_texts_is_not_doubled(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    config = mixture(base, base, other)
    first = build_moe(config, tmp_path / "first")
    config["experts"][1] |= {"positive_prompts": f"<s>{TWO}", "negative_prompts": NOT}  # one text is a list of one
    second = build_moe(config, tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_prompts_that_say_the_same_are_noted_and_finite(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    config = mixture(base, base, other)
    config["experts"][1] |= {"positive_prompts": [TWO], "negative_prompts": [TWO]}
    out = build_moe(config, tmp_path / "out")
    assert "hardly tell the experts apart" in out.notes[-1]
    assert torch.isfinite(logits(opened(out))).all()


def test_the_bytes_depend_on_the_seed_alone(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    written = {}
    for name, mode, run, seed in [
        ("hidden", "hidden", {"threads": 1}, 0), ("hidden-again", "hidden", {"threads": 3, "max_memory": "2GB"}, 5),
        ("random", "random", {"threads": 1}, 0), ("random-again", "random", {"threads": 3}, 0),
        ("random-seed", "random", {}, 1), ("uniform", "uniform_random", {}, 0),
    ]:  # fmt: skip
        out = build_moe(mixture(base, base, other, gate_mode=mode, seed=seed), tmp_path / name, **run)
        written[name] = (out / "model.safetensors").read_bytes()
    assert written["hidden"] == written["hidden-again"] and written["random"] == written["random-again"]
    assert len(set(written.values())) == 4
    rows = load_file(tmp_path / "uniform" / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    assert 0.1 < float(rows.abs().max()) <= 0.25  # 1/√16
    random = load_file(tmp_path / "random" / "model.safetensors")
    gates = [tensor for name, tensor in random.items() if "gate.weight" in name]
    assert not torch.equal(gates[0], gates[1])


def test_noise_is_normal_the_same_in_any_slices_and_another_for_each_expert(save: Save, tmp_path: Path) -> None:
    whole = normal_numbers("a", range(400), 50, 3).double()
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02 and abs((whole**4).mean() - 3) < 0.2
    assert torch.equal(
        torch.cat([normal_numbers("a", range(7), 50, 3), normal_numbers("a", range(7, 400), 50, 3)]).double(), whole
    )
    base = save("base")
    config = mixture(base, base, base, gate_mode="random")
    for expert in config["experts"]:
        expert |= {"noise_scale": 0.1, "residual_scale": 2.0}
    found = load_file(build_moe(config, tmp_path / "out") / "model.safetensors")
    dense = load_file(base / "model.safetensors")
    noise = []
    for matrix, name, factor in (("w1", "gate_proj", 1), ("w2", "down_proj", 2), ("w3", "up_proj", 1)):
        for expert in (0, 1):
            made = found[f"model.layers.0.block_sparse_moe.experts.{expert}.{matrix}.weight"] / factor
            noise.append(made - dense[f"model.layers.0.mlp.{name}.weight"])
            assert 0.08 < float(noise[-1].std()) < 0.12
    assert not any(torch.allclose(a.flatten(), b.flatten()) for a, b in itertools.pairwise(noise))
