"""The best adapter of a rank: optimal against an oracle, whole at full rank, and opened by us and by PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapter_examples import PREFIX, adapt_linears
from conftest import ARCHITECTURES
from merganser.checkpoints import AdapterCheckpoint, Checkpoint, open_checkpoint
from merganser.engines import SerialEngine
from merganser.errors import Problems, UserError
from merganser.merging import make_recipe, memory, merge, reproduce, verify
from merganser.merging.inputs import open_inputs
from merganser.merging.targets.low_rank import best_low_rank

Save = Callable[..., Path]
TARGETS = {
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "bert": ("query", "value", "output.dense"),
    "gpt2": ("c_attn", "c_proj"),
}


def adapter_of(output: Path, rank: int, models: list[Path], overwrite: bool = False, **recipe: Any) -> Path:
    values = {"contributors": [str(m) for m in models], **recipe}
    return Path(merge(make_recipe(values), output, as_adapter=rank, overwrite=overwrite))


def norm(matrix: np.ndarray, gram: np.ndarray) -> float:
    return float(np.sqrt(max(np.trace(matrix @ gram @ matrix.T), 0)))


def optimum(delta: np.ndarray, gram: np.ndarray, rank: int) -> float:
    """The least error of any matrix of this rank: the tail of the singular values of ΔW G^½."""
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(values.clip(0))
    return float(np.sqrt((np.linalg.svd(delta @ root, compute_uv=False)[rank:] ** 2).sum()))


def plain(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
@pytest.mark.parametrize("seen", [40, 7])  # rows of x: fewer than inputs make G singular
@pytest.mark.parametrize("rank", [1, 4])
def test_no_matrix_of_the_rank_is_nearer(shape: tuple[int, int], seen: int, rank: int) -> None:
    generator = np.random.default_rng(3)
    delta = generator.normal(size=shape)
    x = generator.normal(size=(seen, shape[1])) * 4.0 ** -np.arange(shape[1])
    gram = x.T @ x / seen
    found = best_low_rank(torch.from_numpy(delta), torch.from_numpy(gram), rank)
    product = (found.b @ found.a).numpy()
    assert np.linalg.matrix_rank(product) <= rank
    best = optimum(delta, gram, rank)
    assert best - 1e-9 <= norm(delta - product, gram) <= best * 1.01 + 1e-6 * norm(delta, gram)
    assert norm(delta - product, gram) < 0.9 * norm(delta - plain(delta, rank), gram)
    assert found.error == pytest.approx(norm(delta - product, gram) / norm(delta, gram), rel=1e-6)


def test_diagonal_and_missing_grams_and_the_true_rank() -> None:
    generator = np.random.default_rng(4)
    delta = generator.normal(size=(9, 3)) @ generator.normal(size=(3, 14))
    weights = generator.uniform(size=14)
    weights[5:] = 0  # never seen
    one = best_low_rank(torch.from_numpy(delta), torch.from_numpy(weights), 2)
    full = best_low_rank(torch.from_numpy(delta), torch.from_numpy(np.diag(weights)), 2)
    torch.testing.assert_close(one.b @ one.a, full.b @ full.a)
    nothing = best_low_rank(torch.from_numpy(delta), None, 2)
    np.testing.assert_allclose((nothing.b @ nothing.a).numpy(), plain(delta, 2), atol=1e-9)
    for gram in (None, torch.from_numpy(weights), torch.zeros(14)):
        for rank in (3, 5, 11):  # beyond the smaller side, too
            found = best_low_rank(torch.from_numpy(delta), gram, rank)
            assert found.a.shape == (rank, 14) and found.b.shape == (9, rank)
            np.testing.assert_allclose((found.b @ found.a).numpy(), delta, atol=1e-7)
            assert found.error < 1e-6


@pytest.mark.parametrize("architecture", TARGETS)
def test_at_the_true_rank_the_adapter_is_the_merge(save_model: Save, tmp_path: Path, architecture: str) -> None:
    base = save_model("base", architecture)
    settings = {"fan_in_fan_out": architecture == "gpt2", "rank": 3}
    models = [adapt_linears(tmp_path / f"a{i}", base, TARGETS[architecture], seed=i, **settings) for i in (1, 2)]
    full = load_file(merge(models, tmp_path / "full", method="simple") / "model.safetensors")
    out = adapter_of(tmp_path / "out", 6, models, method="simple")
    assert {path.name for path in out.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "provenance.json",
    }  # fmt: skip
    checkpoint = open_checkpoint(f"{base}+{out}")
    assert isinstance(checkpoint, AdapterCheckpoint) and checkpoint.base.path == base
    assert set(checkpoint.changes) == set(open_checkpoint(models[0]).changes)
    for name, tensor in full.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert verify(out).parents == 3 and reproduce(out) == []
    notes = json.loads((out / "provenance.json").read_text())["notes"]
    assert any("layers at rank 6" in note for note in notes) and not any("lost" in note for note in notes)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_full_fine_tunes_lose_nothing_at_full_rank(family, tmp_path: Path, architecture: str) -> None:
    """Embeddings, norms, biases and heads differ, too: all are held."""
    base, models = family(architecture, 2)
    full = load_file(merge(models, tmp_path / "full", method="regmean") / "model.safetensors")
    out = adapter_of(tmp_path / "out", 16, models, method="regmean", base=str(base))
    checkpoint = open_checkpoint(f"{base}+{out}")
    for name, tensor in full.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=1e-4, atol=1e-4, msg=name)
    record = json.loads((out / "provenance.json").read_text())
    assert record["as_adapter"] == 16 and set(record["tensors"]) == set(checkpoint.adapter.tensors)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_below_the_true_rank_it_is_the_best_in_the_gram_norm(family, tmp_path: Path, architecture: str) -> None:
    base, models = family(architecture, 2)
    rank, coefficients = 3, [1.0, 3.0]
    contributors = [{"model": str(m), "coefficient": c} for m, c in zip(models, coefficients, strict=True)]
    recipe = make_recipe({"contributors": contributors, "method": "simple", "base": str(base)})
    out = Path(merge(recipe, tmp_path / "out", as_adapter=rank))
    parents = open_inputs(recipe).parents
    full = load_file(merge(models, tmp_path / "full", method="simple", coefficients=coefficients) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    checkpoint = open_checkpoint(f"{base}+{out}")
    recorded = json.loads((out / "provenance.json").read_text())["tensors"]
    checked = 0
    for layer in parents[0].statistics.header.layers:
        name = layer.weight
        if layer.tied or layer.input is None or not checkpoint.changes[name][0].a:
            continue
        delta = (full[name] - before[name]).double().numpy()
        error = (full[name] - checkpoint.read(name)).double().numpy()
        if layer.kind == "conv1d":
            delta, error = delta.T, error.T
        gram = sum(
            c * parent.statistics.gram(parent.statistics.layer(name).input).double().numpy()
            for c, parent in zip(coefficients, parents, strict=True)
        )
        best = optimum(delta, gram, rank)
        assert norm(error, gram) == pytest.approx(best, rel=1e-3)
        assert norm(error, gram) < norm(delta - plain(delta, rank), gram)
        said = recorded[f"{PREFIX}{layer.module}.lora_A.weight"]["note"]
        stated = re.search(r"relative error (\S+) in the norm of the Gram matrices", said)
        assert stated and float(stated[1]) == pytest.approx(best / norm(delta, gram), rel=1e-2)
        checked += 1
    assert checked >= 8


def test_the_card_says_what_is_lost(family, tmp_path: Path) -> None:
    base, models = family("bert", 2, statistics=False)
    out = adapter_of(tmp_path / "out", 2, models, method="simple", base=str(base), exclude=["*.pooler.*"])
    card = (out / "README.md").read_text()
    assert "base_model: base\n" in card and "library_name: peft" in card
    assert "as a LoRA adapter of rank 2" in card and "layers at rank 2: relative error" in card
    assert "plain norm: no statistics" in (out / "provenance.json").read_text()
    assert "tmp" not in card


def test_what_an_adapter_cannot_be(family, save_model: Save, tmp_path: Path) -> None:
    base, models = family("bert", 2, statistics=False)
    plain_recipe = {"method": "simple"}
    with pytest.raises(Problems) as caught:
        adapter_of(tmp_path / "out", 0, models, keep_separate=["classifier.*"], base=str(base), **plain_recipe)
    assert "the rank is 0" in str(caught.value) and "kept separate" in str(caught.value)
    with pytest.raises(UserError, match="add --base MODEL, or merge adapters of one base"):
        adapter_of(tmp_path / "out", 4, models, **plain_recipe)
    with pytest.raises(UserError, match=r"rank 4096 is more than any layer has(.|\n)*a rank of \d+ at most"):
        adapter_of(tmp_path / "out", 4096, models, base=str(base), **plain_recipe)
    with pytest.raises(UserError, match="no linear layer of the merge differs"):
        adapter_of(tmp_path / "out", 4, [base, base], base=str(base), **plain_recipe)
    assert not (tmp_path / "out").exists()
    out = adapter_of(tmp_path / "out", 4, models, base=str(base), **plain_recipe)
    with pytest.raises(UserError, match="the output exists"):
        adapter_of(out, 4, models, base=str(base), **plain_recipe)
    first = (out / "adapter_model.safetensors").read_bytes()
    adapter_of(out, 4, models, overwrite=True, base=str(base), **plain_recipe)
    assert (out / "adapter_model.safetensors").read_bytes() == first
    with pytest.raises(UserError, match="the output is one of the inputs"):
        adapter_of(out, 4, [f"{base}+{out}"] * 2, overwrite=True, **plain_recipe)


def test_statistics_of_other_weights_are_not_used(family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    file = "merge_statistics.safetensors"
    (models[0] / file).write_bytes((models[1] / file).read_bytes())
    with pytest.raises(UserError, match="statistics of other weights"):
        adapter_of(tmp_path / "out", 4, models, method="simple", base=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_peft_reads_what_we_write(family, tmp_path: Path, architecture: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'merganser[test]'")
    base, models = family(architecture, 2)
    out = adapter_of(tmp_path / "out", 4, models, method="regmean", base=str(base))
    model = ARCHITECTURES[architecture][1].from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(model, out)
    state = loaded.merge_and_unload().state_dict()
    checkpoint = open_checkpoint(f"{base}+{out}")
    for name in checkpoint.tensors:
        if name not in checkpoint.base.tensors:  # a tied head, which PEFT changes only where it merges in memory
            torch.testing.assert_close(checkpoint.read(name), checkpoint.base.read("transformer.wte.weight"))
            continue
        torch.testing.assert_close(state[name], checkpoint.read(name), rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_is_hashed_before_everything_is_checked(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong rank, no base, an engine or a URL: said from headers alone."""
    base, models = family("bert", 2)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read before everything was checked")

    monkeypatch.setattr(Checkpoint, "hash", never)
    monkeypatch.setattr(Checkpoint, "read", never)
    for settings, word in (
        ({"as_adapter": 0, "base": base}, "the rank is 0"),
        ({"as_adapter": 4}, "add --base MODEL"),
        ({"as_adapter": 4, "base": base, "engine": SerialEngine()}, "written by this process"),
        ({"as_adapter": 4, "base": base, "vocabulary": "largest"}, "another vocabulary"),
    ):
        with pytest.raises(UserError, match=word):
            merge(models, tmp_path / "out", method="regmean", **settings)
    with pytest.raises(UserError, match="written by this process"):
        merge(models, "memory://out", method="regmean", as_adapter=4, base=base)


@pytest.mark.parametrize("method", ["ties", "regmean"])
def test_an_adapter_is_made_of_slices_in_little_memory(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base, models = family("bert", 2)
    whole = merge(models, tmp_path / "whole", method=method, as_adapter=4, base=base, threads=1)
    with pytest.raises(UserError, match="GB at once"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "anonymous_bytes", lambda: 10_000_000)
        room = 10_000_000 + memory.OWN_BYTES + 30_000
        merge(models, tmp_path / "out", method=method, as_adapter=4, base=base, max_memory=room)
    monkeypatch.setattr(memory, "SLICE", 48)
    sliced = merge(models, tmp_path / "sliced", method=method, as_adapter=4, base=base, threads=2)
    first, second = ((one / "adapter_model.safetensors").read_bytes() for one in (whole, sliced))
    assert first == second
    left = {path.name for path in (tmp_path / "sliced").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()} and not [n for n in left if "tmp" in n]
