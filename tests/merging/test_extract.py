"""LoRA adapters extracted from fine-tuned models: the best of their rank, opened by PEFT, with the outputs promised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from adapter_examples import PREFIX, adapt_linears
from conftest import ARCHITECTURES, make_model
from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.merging import extract, merge, reproduce, verify
from merganser.merging.targets.low_rank import best_low_rank
from merganser.methods.products import Product

Family = Callable[..., tuple[Path, list[Path]]]


def outputs(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def opened(base: Path, adapter: Path, architecture: str) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(ARCHITECTURES[architecture][1].from_pretrained(base), adapter)


def weights_file(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def settings_of(adapter: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((adapter / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "distilbert", "deberta-v2", "mpnet", "llama", "gpt2", "qwen2"]
)
def test_all_of_the_energy_gives_the_model(family: Family, tmp_path: Path, architecture: str) -> None:
    """Heads that PEFT replaces whatever the file says, and embeddings that are tied to the head, among them."""
    base, (model,) = family(architecture, 1, statistics=False)
    result = extract(model, tmp_path / "out", base=base, energy=1.0)
    out, tuned = Path(result), ARCHITECTURES[architecture][1].from_pretrained(model)
    found = opened(base, out, architecture)
    if architecture == "gpt2":  # PEFT does not tie what is called wte, and the notes say so
        assert any("transformer.wte is tied to another layer" in note for note in result.notes)
        found = found.merge_and_unload()
    torch.testing.assert_close(outputs(found), outputs(tuned), rtol=1e-4, atol=1e-4)
    assert verify(out).parents == 2 and reproduce(out) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_module_has_the_least_rank_that_keeps_the_energy(
    family: Family, tmp_path: Path, architecture: str
) -> None:
    base, (model,) = family(architecture, 1, statistics=False)
    out = Path(extract(model, tmp_path / "out", base=base, energy=0.8))
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    checkpoint, ranks = open_checkpoint(f"{base}+{out}"), set[int]()
    recorded = json.loads((out / "provenance.json").read_text())["tensors"]
    for name, (change, *_) in checkpoint.changes.items():
        if change.a is None:
            continue
        delta = (after[name] - before[name]).double().numpy()
        values = np.linalg.svd(delta, compute_uv=False) ** 2
        wanted = 1 + int((np.cumsum(values) < 0.8 * values.sum()).sum())
        found = checkpoint.adapter.tensors[change.a].shape[0]
        assert found == wanted, name
        error = np.linalg.norm((after[name] - checkpoint.read(name)).double().numpy()) / np.linalg.norm(delta)
        assert error == pytest.approx(np.sqrt(values[wanted:].sum() / values.sum()), rel=1e-3)
        said = re.search(r"relative error (\S+) in the plain norm", recorded[change.a]["note"])
        assert said and float(said[1]) == pytest.approx(error, rel=1e-2)
        ranks.add(found)
    assert len(ranks) > 1 and settings_of(out)["rank_pattern"] == settings_of(out)["alpha_pattern"] != {}
    theirs = opened(base, out, architecture).merge_and_unload().state_dict()
    for name in before:
        torch.testing.assert_close(theirs[name], checkpoint.read(name), rtol=1e-5, atol=1e-5, msg=name)


def test_ranks_have_a_bound_and_a_default(family: Family, tmp_path: Path) -> None:
    base, (model,) = family("llama", 1, statistics=False)
    bounded = Path(extract(model, tmp_path / "bounded", base=base, energy=0.99, max_rank=3))
    assert settings_of(bounded)["r"] == 3 and settings_of(bounded)["rank_pattern"] == {}
    fixed = Path(extract(model, tmp_path / "fixed", base=base, rank=5))
    weights = load_file(fixed / "adapter_model.safetensors")
    assert {w.shape[0] for n, w in weights.items() if "lora_A" in n or "embedding_A" in n} == {5}
    plain = merge([model], tmp_path / "plain", method="simple", base=base, as_adapter=5)
    assert (Path(plain) / "adapter_model.safetensors").read_bytes() == (
        fixed / "adapter_model.safetensors"
    ).read_bytes()
    default = Path(extract(model, tmp_path / "default", base=base))
    same = Path(extract(model, tmp_path / "same", base=base, energy=0.95, max_rank=128))
    assert weights_file(default) == weights_file(same)


def test_what_is_whole_and_what_is_left_out(family: Family, tmp_path: Path) -> None:
    base, (model,) = family("llama", 1, statistics=False)
    kept = {
        "embeddings": "whole",
        "others": "left out",
        "left_out": ["*.v_proj.weight"],
        "whole": ["*.0.*.o_proj.weight"],
    }
    result = extract(model, tmp_path / "out", base=base, energy=1.0, **kept)
    out, checkpoint = Path(result), open_checkpoint(f"{base}+{Path(result)}")
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    left = {name for name in before if name.endswith("v_proj.weight") or before[name].dim() == 1}
    for name in before:
        wanted = before[name] if name in left else after[name]
        torch.testing.assert_close(checkpoint.read(name), wanted, rtol=1e-5, atol=1e-5, msg=name)
    saved = settings_of(out)["modules_to_save"]
    assert isinstance(saved, list) and {"model.embed_tokens", "model.layers.0.self_attn.o_proj"} <= set(saved)
    (note,) = (note for note in result.notes if note.startswith("lost: "))
    assert f"and {len(left) - 1} more, changed by " in note and "left out as asked for" in note
    shares = {n: float((after[n] - before[n]).norm() / before[n].norm()) for n in left}
    assert float(note.split("changed by ")[1].split(" ")[0]) == pytest.approx(max(shares.values()), rel=1e-2)
    only = Path(extract(model, tmp_path / "only", base=base, energy=1.0, only=["*.q_proj.weight"]))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in load_file(only / "adapter_model.safetensors")} == {
        "q_proj"
    }
    assert reproduce(out) == [] and reproduce(only) == []


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(
    "kept",
    [{"only": ["*.0.*"]}, {"left_out": ["*classifier*"]}, {"left_out": ["classifier*bias"]}, {"others": "left out"}],
)
def test_peft_opens_an_adapter_that_leaves_the_head_as_it_is(
    family: Family, tmp_path: Path, architecture: str, kept: dict[str, Any]
) -> None:
    base, (model,) = family(architecture, 1, statistics=False)
    out = Path(extract(model, tmp_path / "out", base=base, energy=1.0, **kept))
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")

    def changes(name: str) -> bool:
        if "others" in kept:
            return before[name].dim() > 1
        matches = [fnmatch(name, pattern) for patterns in kept.values() for pattern in patterns]
        return any(matches) is ("only" in kept)

    expected = ARCHITECTURES[architecture][1].from_pretrained(base)
    expected.load_state_dict({name: (after if changes(name) else before)[name] for name in before}, strict=False)
    torch.testing.assert_close(outputs(opened(base, out, architecture)), outputs(expected), rtol=1e-4, atol=1e-4)


def test_statistics_give_the_norm(family: Family, tmp_path: Path) -> None:
    base, (model,) = family("bert", 1)
    out = Path(extract(model, tmp_path / "out", base=base, energy=0.7))
    tensors = json.loads((out / "provenance.json").read_text())["tensors"]
    notes = [
        entry["note"]
        for name, entry in tensors.items()
        if name.startswith(f"{PREFIX}bert.encoder") and "lora_A" in name
    ]
    assert notes and all("in the norm of the Gram matrices" in note for note in notes)
    errors = [float(note.split("relative error ")[1].split(" ")[0]) for note in notes]
    assert max(errors) ** 2 <= 0.3 + 1e-6
    assert verify(out).parents == 2


def test_mistakes_are_told_at_once(family: Family, tmp_path: Path) -> None:
    base, (model,) = family("llama", 1, statistics=False)
    for options, word in (
        ({"rank": 4, "energy": 0.9}, "the same for all modules"),
        ({"rank": 4, "max_rank": 9}, "the same for all modules"),
        ({"rank": 0}, "the rank is 0"),
        ({"energy": 1.5}, "the energy to keep is 1.5"),
        ({"energy": 0.0}, "the energy to keep is 0"),
        ({"only": ["*.q_pro.weight"]}, "no tensor is called"),
        ({"rank": 4, "only": ["*norm.weight"]}, "no linear layer"),
    ):
        with pytest.raises(UserError, match=word):
            extract(model, tmp_path / "out", base=base, **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no linear layer of the merge differs"):
        extract(base, tmp_path / "out", base=base)


@pytest.mark.parametrize("seen", [None, 30, 5])
def test_a_product_is_not_multiplied_out_for_its_best(seen: int | None) -> None:
    generator = np.random.default_rng(5)
    left, right = generator.normal(size=(17, 6)), generator.normal(size=(6, 11))
    x = generator.normal(size=(seen or 1, 11))
    gram = None if seen is None else torch.from_numpy(x.T @ x / seen)
    product = Product(torch.from_numpy(left), torch.from_numpy(right))
    for rank, energy in ((2, None), (9, None), (11, 0.9), (2, 0.99)):
        one = best_low_rank(product, gram, rank, energy)
        other = best_low_rank(torch.from_numpy(left @ right), gram, rank, energy)
        torch.testing.assert_close(one.b @ one.a, other.b @ other.a, atol=1e-7, rtol=1e-7)
        assert one.error == pytest.approx(other.error, abs=1e-6)


def test_another_vocabulary_is_whole_and_said(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base, model = save_model("base", "llama"), tmp_path / "tuned"
    tuned = make_model("llama", 1)
    tuned.resize_token_embeddings(45)
    tuned.save_pretrained(model)
    result = extract(model, tmp_path / "out", base=base, energy=1.0)
    told = [note for note in result.notes if "has 45 rows, and 40 in the base" in note]
    assert len(told) == 2 and "resize_token_embeddings" in told[0]
    resized = make_model("llama", 0)
    resized.resize_token_embeddings(45)
    found = peft.PeftModel.from_pretrained(resized, Path(result))
    torch.testing.assert_close(outputs(found), outputs(tuned), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_brought_to_a_lower_rank(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model("base", "qwen2")
    adapter = adapt_linears(tmp_path / "adapter", base, ("q_proj", "down_proj"), rank=6, target_modules=["q_proj"])
    out = Path(extract(f"{base}+{adapter}", tmp_path / "out", base=base, rank=2))
    before, full, found = (
        load_file(base / "model.safetensors"),
        open_checkpoint(adapter),
        open_checkpoint(f"{base}+{out}"),
    )
    assert set(found.changes) == set(full.changes)
    for name in full.changes:
        delta = (full.read(name) - before[name]).double().numpy()
        u, s, v = np.linalg.svd(delta)
        wanted = (u[:, :2] * s[:2]) @ v[:2]
        np.testing.assert_allclose((found.read(name) - before[name]).double().numpy(), wanted, atol=1e-5)
