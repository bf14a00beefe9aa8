"""Adapters merged with one another, without their base: exact in ΔW, and an adapter that PEFT opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_examples import PREFIX, adapt_linears, factors, write_adapter
from conftest import ARCHITECTURES
from merganser.checkpoints import open_checkpoint
from merganser.errors import UserError
from merganser.merging import AdapterForm, make_recipe, memory, merge, prepare, reproduce, verify
from merganser.methods import METHODS

Save = Callable[..., Path]
TARGETS = {
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "bert": ("query", "value", "output.dense"),
    "gpt2": ("c_attn", "c_proj"),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n.removeprefix(PREFIX): t for n, t in load_file(folder / "adapter_model.safetensors").items()}


def changes(folder: Path) -> dict[str, np.ndarray]:
    """ΔW = s·BA of every module with factors, in float64, by hand."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    files = {name: tensor.double().numpy() for name, tensor in stored(folder).items()}
    found = {}
    for name, a in files.items():
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            module = name.rpartition(".lora_")[0]
            b = files[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rank = settings["rank_pattern"].get(module, settings["r"])
            alpha = settings["alpha_pattern"].get(module, settings["lora_alpha"])
            assert a.shape[0] == b.shape[1] == rank
            found[module] = alpha / (rank**0.5 if settings["use_rslora"] else rank) * b @ a
    return found


def apart(folder: Path) -> Path:
    """The adapter as it is where its base is not: it names one that nobody has."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "somebody/a-base"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def adapters(tmp_path: Path, base: Path, architecture: str) -> list[Path]:
    """Three: another rank, another alpha, rank-stabilised, and of other modules."""
    targets = TARGETS[architecture]
    turned: dict[str, Any] = {"fan_in_fan_out": architecture == "gpt2", "target_modules": list(targets)}
    one = adapt_linears(tmp_path / "one", base, targets, 3, 1, **turned)
    two = adapt_linears(tmp_path / "two", base, targets, 2, 2, lora_alpha=5, use_rslora=True, **turned)
    turned["target_modules"] = [targets[0]]
    three = adapt_linears(tmp_path / "three", base, targets[:1], 4, 3, lora_alpha=1, **turned)
    return [one, two, three]


def weighted(parts: Sequence[dict[str, np.ndarray]], weights: Sequence[float]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: sum(w * part[n] for w, part in zip(weights, parts, strict=True) if n in part) for n in names}  # type: ignore[misc]


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=tolerance * np.abs(wanted[name]).max())


@pytest.mark.parametrize("architecture", TARGETS)
def test_sums_are_exact_and_what_peft_concatenates(save_model: Save, tmp_path: Path, architecture: str) -> None:
    base = save_model("base", architecture)
    folders = adapters(tmp_path, base, architecture)
    model = ARCHITECTURES[architecture][1].from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="one")
    theirs.load_adapter(folders[1], adapter_name="two")
    theirs.load_adapter(folders[2], adapter_name="three")
    weights = [0.7, 1.5, 2.0]
    theirs.add_weighted_adapter(["one", "two", "three"], weights, "sum", combination_type="cat")
    theirs.set_adapter("sum")
    wanted = {n: t.double() for n, t in theirs.merge_and_unload().state_dict().items()}
    parts = [changes(apart(folder)) for folder in folders]
    out = merge(folders, tmp_path / "out", method="task_arithmetic", options={"scale": 1.0}, coefficients=weights)
    assert any("without" in note or "base" in note for note in out.notes), out.notes
    close(changes(Path(out)), weighted(parts, weights))
    again = ARCHITECTURES[architecture][1].from_pretrained(base)
    state = peft.PeftModel.from_pretrained(again, Path(out)).merge_and_unload().state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-5, atol=1e-5, msg=name)
    settings = json.loads((Path(out) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "somebody/a-base" and settings["r"] == 5
    assert set(settings["rank_pattern"].values()) == {9}
    verified = verify(Path(out))
    assert verified.parents == 3 and reproduce(Path(out)) == []


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def test_a_rank_gives_the_nearest_of_that_rank(save_model: Save, tmp_path: Path) -> None:
    """By factors for a sum, by the matrix for what is elected; each module says its error."""
    base = save_model("base", "qwen2")
    folders = [apart(folder) for folder in adapters(tmp_path, base, "qwen2")]
    parts = [changes(folder) for folder in folders]
    total = weighted(parts, [0.5, 1.0, 1.0])
    out = merge(
        folders,
        tmp_path / "sum",
        method="task_arithmetic",
        options={"scale": 1.0},
        coefficients=[0.5, 1, 1],
        as_adapter=3,
    )
    close(changes(Path(out)), {name: truncated(matrix, 3) for name, matrix in total.items()})
    recorded = json.loads((Path(out) / "provenance.json").read_text())["tensors"]
    for name, matrix in total.items():
        error = np.linalg.norm(matrix - truncated(matrix, 3)) / np.linalg.norm(matrix)
        said = recorded[f"{PREFIX}{name}.lora_A.weight"]["note"]
        assert float(said.split("relative error ")[1].split(" ")[0]) == pytest.approx(error, rel=1e-2)
    pruned = merge(
        folders, tmp_path / "pruned", method="breadcrumbs", as_adapter=2,
        options={"scale": 1.0, "gamma": 0, "density": 0.3, "whole": True},
    )  # fmt: skip
    kept = []
    for part in parts:
        kept.append({})
        for name, matrix in part.items():
            least = np.sort(np.abs(matrix).ravel())[-int(0.3 * matrix.size)]
            kept[-1][name] = np.where(np.abs(matrix) >= least, matrix, 0)
    close(changes(Path(pruned)), {n: truncated(m, 2) for n, m in weighted(kept, [1, 1, 1]).items()}, 1e-5)


#: Spectral methods raise the directions that a change of low rank has not, where with the base there is rounding, and
#: Arcee Fusion looks at the weights themselves.
OF_MORE_THAN_CHANGES = ("tsv_m", "dual_basis", "iso_c", "iso_cts", "arcee_fusion")
OF_CHANGES = [
    name
    for name, method in METHODS.items()
    if method.needs.base and not (method.needs.statistics or method.needs.data or name in OF_MORE_THAN_CHANGES)
]


@pytest.mark.parametrize("method", ["simple", *OF_CHANGES])
def test_methods_give_the_change_that_they_give_with_the_base(save_model: Save, tmp_path: Path, method: str) -> None:
    base = save_model("base", "qwen2")
    folders = adapters(tmp_path, base, "qwen2")[: METHODS[method].needs.models or 3]
    full = load_file(merge(folders, tmp_path / "full", method=method) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    wanted = {name: (full[name] - before[name]).double().numpy() for name in full}
    out = Path(merge(folders, tmp_path / "alone", method=method, without_base=True, as_adapter=16))
    found = changes(out)
    assert found
    for module, change in found.items():
        scale = max(np.abs(wanted[f"{module}.weight"]).max(), 1e-6)
        np.testing.assert_allclose(change, wanted[f"{module}.weight"], rtol=0, atol=2e-3 * scale)
    for name, change in wanted.items():
        if name.removesuffix(".weight") not in found:
            assert np.abs(change).max() < 1e-6, name


def test_with_the_base_at_hand_it_is_a_choice(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "qwen2")
    folders = adapters(tmp_path, base, "qwen2")
    assert (merge(folders, tmp_path / "full", method="simple") / "config.json").is_file()
    among = Path(merge(folders, tmp_path / "among", method="simple", without_base=True))
    assert not (among / "config.json").exists()
    wanted = weighted([changes(folder) for folder in folders], [1 / 3] * 3)
    close(changes(among), wanted)
    summed = Path(merge(folders, tmp_path / "summed", method="simple", as_adapter=AdapterForm()))
    close(changes(summed), wanted)
    assert json.loads((summed / "provenance.json").read_text())["base"] is not None
    for out in (among, summed):
        verify(out)
        assert reproduce(out) == []
    shutil.rmtree(base)
    assert reproduce(among) == []
    close(changes(Path(merge(folders, tmp_path / "again", method="simple"))), wanted)


def test_embeddings_are_changes_too(save_model: Save, tmp_path: Path) -> None:
    base, table, folders = save_model("base", "llama"), "model.embed_tokens", []
    for number, rank in enumerate((2, 3)):
        draw = torch.Generator().manual_seed(number)
        tensors = {
            f"{table}.lora_embedding_A": torch.randn(rank, 40, generator=draw),
            f"{table}.lora_embedding_B": torch.randn(16, rank, generator=draw),
        }
        settings = {"r": rank, "target_modules": ["embed_tokens"], "base_model_name_or_path": "somebody/a-base"}
        folders.append(write_adapter(tmp_path / f"a{number}", tensors, **settings))
    out = Path(merge(folders, tmp_path / "out", method="simple", coefficients=[1, 3]))
    close(changes(out), weighted([changes(folder) for folder in folders], [0.25, 0.75]))
    model = ARCHITECTURES["llama"][1].from_pretrained(base)
    before = model.get_input_embeddings().weight.detach().clone()
    merged = peft.PeftModel.from_pretrained(model, out).merge_and_unload().get_input_embeddings().weight
    np.testing.assert_allclose((merged - before).detach().numpy().T, changes(out)[table], atol=1e-5)
    ties = Path(merge(folders, tmp_path / "ties", method="ties", as_adapter=16))
    full = merge([f"{base}+{folder}" for folder in folders], tmp_path / "full", method="ties")
    wanted = load_file(Path(full) / "model.safetensors")[f"{table}.weight"] - before
    np.testing.assert_allclose(changes(ties)[table].T, wanted.numpy(), atol=1e-4)


def test_vectors_and_heads(save_model: Save, tmp_path: Path) -> None:
    """What is no plain factor: vectors on biases are changes, and whole tensors are averaged and said so."""
    base = save_model("base", "bert")
    folders = []
    for number, rank in enumerate((2, 3)):
        generator = torch.Generator().manual_seed(number)
        module = "bert.encoder.layer.0.attention.self.query"
        tensors = factors(module, 16, 16, rank, number)
        tensors |= {
            f"{module}.lora_B.bias": torch.randn(16, generator=generator),
            "classifier.weight": torch.randn(2, 16, generator=generator),
            "classifier.bias": torch.randn(2, generator=generator),
        }
        if number:
            tensors |= factors("bert.encoder.layer.1.output.dense", 16, 24, rank, 7)
        settings = {
            "r": rank,
            "lora_alpha": 4,
            "task_type": "SEQ_CLS",
            "modules_to_save": ["classifier"],
            "lora_bias": True,
        }
        targets = [name.split(".lora_")[0] for name in tensors if ".lora_" in name]
        folder = write_adapter(tmp_path / f"a{number}", tensors, "somebody/a-base", target_modules=targets, **settings)
        folders.append(folder)
    result = merge(folders, tmp_path / "out", method="task_arithmetic", options={"scale": 1.0}, coefficients=[1, 2])
    out = Path(result)
    close(changes(out), weighted([changes(folder) for folder in folders], [1, 2]))
    assert any("averaged as a whole" in note and "classifier" in note for note in result.notes)
    one, two, found = (stored(folder) for folder in (*folders, out))
    for kind in ("weight", "bias"):
        wanted = (one[f"classifier.{kind}"] + 2 * two[f"classifier.{kind}"]) / 3
        torch.testing.assert_close(found[f"classifier.{kind}"], wanted)
    vector = "bert.encoder.layer.0.attention.self.query.lora_B.bias"
    torch.testing.assert_close(found[vector], 4 / 2 * one[vector] + 2 * (4 / 3) * two[vector])
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier"] and settings["task_type"] == "SEQ_CLS"
    model = ARCHITECTURES["bert"][1].from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    again = open_checkpoint(f"{base}+{out}")
    for name in again.tensors:
        torch.testing.assert_close(merged[name], again.read(name), rtol=1e-5, atol=1e-5, msg=name)
    assert reproduce(out) == []


def test_a_head_of_one_alone_is_kept(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "bert")
    one, two = (apart(folder) for folder in adapters(tmp_path, base, "bert")[:2])
    weights = load_file(two / "adapter_model.safetensors")
    head = {f"{PREFIX}classifier.weight": torch.ones(2, 16), f"{PREFIX}classifier.bias": torch.ones(2)}
    save_file({**weights, **head}, two / "adapter_model.safetensors")
    settings = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["classifier"]}))
    result = merge([one, two], tmp_path / "out", method="simple")
    found = load_file(Path(result) / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in head.items())
    assert any("averaged over the adapters that have them" in note for note in result.notes)


def test_what_cannot_be_merged_without_the_base(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "qwen2")
    one, two = (apart(folder) for folder in adapters(tmp_path, base, "qwen2")[:2])

    def changed(name: str, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        folder = Path(shutil.copytree(two, tmp_path / name))
        settings = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        if tensors is not None:
            named = {PREFIX + own: tensor for own, tensor in tensors.items()}
            save_file(named, folder / "adapter_model.safetensors")
        return folder

    q = "model.layers.0.self_attn.q_proj"
    stem = "model.layers.0.mlp.experts"
    experts = {f"{stem}.lora_A.weight": torch.ones(4, 16), f"{stem}.lora_B.weight": torch.ones(8, 4)}
    vector = {**factors(q, 16, 16, 2), f"{q}.lora_B.bias": torch.ones(16)}
    table = {"embed.lora_embedding_A": torch.ones(2, 9), "embed.lora_embedding_B": torch.ones(4, 2)}
    cases = {
        "dora": (changed("dora", use_dora=True), "DoRA"),
        "prompt": (changed("prompt", peft_type="PROMPT_TUNING"), "only LoRA adapters can be merged"),
        "experts": (changed("experts", experts, r=2, target_parameters=["mlp.experts.weight"]), "a stack of experts"),
        "tokens": (
            changed(
                "tokens",
                {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)},
                trainable_token_indices={"embed_tokens": [3, 4]},
            ),
            "single trained tokens",
        ),
        "shape": (changed("shape", factors(q, 16, 12, 2), r=2), r"is \[16, 12\], and \[16, 16\]"),
        "prefix": (changed("prefix", factors(f"language_model.{q}", 16, 16, 2), r=2), "as far as names tell"),
        "whole": (changed("whole", {f"{q}.weight": torch.ones(16, 16)}), "by factors in another"),
        "vector": (changed("vector", vector | table, r=2, lora_bias=True), "which PEFT cannot have"),
        "base": (changed("base-2", base_model_name_or_path="somebody/another"), "name different bases"),
        "full": (base, "this is a full model"),
    }  # fmt: skip
    for name, (folder, words) in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            merge([one, folder], tmp_path / "out", method="simple", without_base=True)
        assert "to mend" in str(caught.value), name
        assert not (tmp_path / "out").exists()
    table = "model.embed_tokens.lora_embedding"
    untied = {f"{table}_A": torch.ones(2, 9), f"{table}_B": torch.ones(4, 2)}
    tied = changed("tied", ensure_weight_tying=True)
    with pytest.raises(UserError, match="without keeping it tied"):
        merge([tied, changed("untied", untied, r=2)], tmp_path / "out", method="simple")
    merge([one, tied], tmp_path / "both", method="simple")
    with pytest.raises(UserError, match="statistics"):
        merge([one, two], tmp_path / "out", method="regmean")
    other = cases["base"][0]
    out = Path(merge([one, other], tmp_path / "out", method="simple", without_base=True, base="org/their-base"))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/their-base"
    assert reproduce(out) == []


def test_bytes_do_not_depend_on_threads_or_memory_and_of_one_it_is_itself(
    save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model("base", "qwen2")
    folders = [apart(folder) for folder in adapters(tmp_path, base, "qwen2")]
    for method in ("simple", "ties", "knots", "dare_ties"):
        one = Path(merge(folders, tmp_path / f"{method}-1", method=method, threads=1))
        with monkeypatch.context() as patch:
            patch.setattr(memory, "SLICE", 48)
            two = Path(merge(folders, tmp_path / f"{method}-2", method=method, threads=2))
        assert (one / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()
    alone = Path(merge(folders[1:2], tmp_path / "alone", method="simple"))
    close(changes(alone), changes(folders[1]))
    nothing = Path(merge(folders[:1] * 2, tmp_path / "nothing", method="task_arithmetic", coefficients=[1, -1]))
    assert all(np.abs(change).max() < 1e-6 for change in changes(nothing).values())
    for method in OF_MORE_THAN_CHANGES:
        out = Path(merge(folders[: METHODS[method].needs.models or 2], tmp_path / method, method=method))
        assert all(np.isfinite(change).all() for change in changes(out).values())


def test_factors_are_not_multiplied_out(save_model: Save, tmp_path: Path) -> None:
    """The plan's memory is that of the factors, and a number that is none is found in them."""
    folders = []
    for number in range(2):
        tensors = factors("model.layers.0.mlp.down_proj", 3000, 4000, 2, number)
        folders.append(
            write_adapter(tmp_path / f"a{number}", tensors, "somebody/a-base", r=2, target_modules=["down_proj"])
        )
    for method in ("simple", "task_arithmetic", "knots", "core_space"):
        prepared = prepare(make_recipe({"contributors": [str(f) for f in folders], "method": method}), None)
        assert prepared.schedule.peak_bytes - prepared.schedule.resident < 3000 * 4000 * 4 / 4, method
    weights = load_file(folders[1] / "adapter_model.safetensors")
    weights[f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(weights, folders[1] / "adapter_model.safetensors")
    with pytest.raises(UserError, match="NaN or Inf"):
        merge(folders, tmp_path / "out", method="simple")
    with pytest.raises(UserError, match="written by this process"):
        merge(folders, "memory://out", method="simple")


#: Of an adapter that PEFT saves: the architecture and what LoraConfig is given, for each of two contributors.
SAVED_BY_PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all biases": ("bert", {"bias": "all", "target_modules": ["query"]}, {"bias": "all", "target_modules": ["query"]}),
    "adapted biases": (
        "bert",
        {"bias": "lora_only", "target_modules": ["key"]},
        {"bias": "lora_only", "target_modules": ["key"], "r": 4},
    ),
    "a head": (
        "bert",
        {"task_type": "SEQ_CLS", "target_modules": ["query"]},
        {"task_type": "SEQ_CLS", "r": 5, "target_modules": ["value"]},
    ),
    "norms": (
        "llama",
        {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["norm"], "target_modules": "all-linear"},
    ),
    "patterns": (
        "qwen2",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 7}, "use_rslora": True},
        {"target_modules": r".*\.(q_proj|up_proj)", "alpha_pattern": {"up_proj": 3}, "r": 2},
    ),
    "Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["c_proj"], "fan_in_fan_out": True},
    ),
    "tied embeddings": (
        "qwen2",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED_BY_PEFT)
def test_what_peft_saves_is_averaged_to_what_peft_opens(save_model: Save, tmp_path: Path, case: str) -> None:
    architecture, *configs = SAVED_BY_PEFT[case]
    base, states, folders = save_model("base", architecture), [], []
    model_class = ARCHITECTURES[architecture][1]
    for number, config in enumerate(configs):
        torch.manual_seed(number)
        settings = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **config})
        trained = peft.get_peft_model(model_class.from_pretrained(base), settings)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad and parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        trained.save_pretrained(tmp_path / f"a{number}")
        folders.append(apart(tmp_path / f"a{number}"))
        states.append(trained.merge_and_unload().state_dict())
    out = Path(merge(folders, tmp_path / "out", method="simple", coefficients=[1, 3]))
    found = peft.PeftModel.from_pretrained(model_class.from_pretrained(base), out).merge_and_unload().state_dict()
    assert set(found) == set(states[0])
    for name, tensor in found.items():
        wanted = (states[0][name] + 3 * states[1][name]) / 4
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5, msg=name)
    assert reproduce(out) == []
