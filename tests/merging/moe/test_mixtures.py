"""Mixtures of experts: what opens computes what the dense models say, and routers are those of the prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_examples import adapt_linears, materialise
from conftest import ARCHITECTURES, save_tokenizer
from merganser.checkpoints.header import read_infos
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.cli import main
from merganser.errors import UserError
from merganser.merging import reproduce, verify
from merganser.merging.moe import build_moe
from merganser.merging.provenance import FILE_NAME, hash_file, own_hash, read_provenance
from merging.moe.mixtures import KINDS, ONE, Save, logits, mixture, opened

CLASSES = dict.fromkeys(KINDS, "Mixtral") | {"qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


@pytest.mark.parametrize("kind", KINDS)
def test_identical_experts_compute_what_the_dense_model_computes(kind: str, save: Save, tmp_path: Path) -> None:
    """Weights of the chosen experts sum to 1; a shared expert adds to them, and here nothing."""
    dense = save("dense", kind)
    shared = [{"source_model": str(dense), "residual_scale": 0}] if kind == "qwen2" else []
    config = mixture(dense, dense, dense, dense, gate_mode="random", shared_experts=shared)
    out = build_moe(config, tmp_path / "out")
    model = opened(out)
    assert type(model).__name__ == f"{CLASSES[kind]}ForCausalLM"
    torch.testing.assert_close(logits(model), logits(opened(dense)), rtol=0, atol=2e-5)
    assert "one model" in " ".join(out.notes) and "random" in " ".join(out.notes)


class _ByHand(torch.nn.Module):
    """A layer's feed-forward block: that of each expert, weighed by the softmax of the chosen ones' scores."""

    def __init__(self, experts: list[Any], router: Tensor, chosen: int, shared: tuple[Any, Tensor, float] | None):
        super().__init__()
        self.experts, self.router, self.chosen, self.shared = experts, router, chosen, shared

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.router.T
        found = torch.zeros_like(x)
        for place in np.ndindex(*x.shape[:-1]):
            best = sorted(range(len(self.experts)), key=lambda e: -float(scores[place][e]))[: self.chosen]
            weights = torch.softmax(scores[place][best], 0)
            found[place] = sum(w * self.experts[e](x[place]) for w, e in zip(weights, best, strict=True))
            if self.shared is not None:
                block, gate, scale = self.shared
                found[place] += torch.sigmoid(gate @ x[place]) * scale * block(x[place])
        return found


@pytest.mark.parametrize(("kind", "mode"), [("llama", "hidden"), ("qwen2", "hidden_avg"), ("qwen3", "cheap_embed")])
def test_a_mixture_computes_what_its_experts_and_routers_say(kind: str, mode: str, save: Save, tmp_path: Path) -> None:
    """The oracle is the base model with blocks put together by hand, from the models and the routers in the files."""
    width = {"intermediate_size": 20}  # not the base's: only experts' blocks are used
    base, folders = save("base", kind), [save(f"e{n}", kind, n, **width) for n in (1, 2, 3)]
    config = mixture(base, *folders, gate_mode=mode)
    config["experts"][1]["residual_scale"] = 0.5
    if kind == "qwen2":
        entry = {"source_model": str(save("s", kind, 9)), "positive_prompts": [ONE], "residual_scale": 0.1}
        config["shared_experts"] = [entry]
    out = build_moe(config, tmp_path / "out")
    files = load_file(out / "model.safetensors")
    dense, experts = opened(base), [opened(folder) for folder in folders]
    experts[1].requires_grad_(False)
    for number, layer in enumerate(dense.model.layers):
        experts[1].model.layers[number].mlp.down_proj.weight *= 0.5
        name = f"model.layers.{number}.{'block_sparse_moe' if kind == 'llama' else 'mlp'}."
        shared = None
        if kind == "qwen2":
            other = opened(tmp_path / "s").model.layers[number].mlp
            shared = (other, files[f"{name}shared_expert_gate.weight"][0], 0.1)
        blocks = [one.model.layers[number].mlp for one in experts]
        layer.mlp = _ByHand(blocks, files[f"{name}gate.weight"], 2, shared)
    torch.testing.assert_close(logits(opened(out)), logits(dense), rtol=0, atol=5e-5)


def test_an_adapter_on_its_base_is_an_expert_and_a_base(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    adapter = adapt_linears(tmp_path / "adapter", base, ("down_proj", "q_proj"))
    full = materialise(tmp_path / "full", base, adapter)
    save_tokenizer(full, "llama")
    for name in ("by-adapter", "by-full"):
        model = f"{base}+{adapter}" if name == "by-adapter" else full
        build_moe(mixture(model, model, other), tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("by-adapter", "by-full"))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=1e-5, rtol=0, msg=key)


def test_mergekit_s_way_to_write_models_and_dtypes(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    config = mixture(base, base, other, gate_mode="cheap_embed", dtype="bfloat16", architecture="mixtral")
    config["base_model"] = {"model": {"path": str(base), "revision": None}}
    config["shared_experts"] = None
    config["experts"][0]["negative_prompts"] = None
    out = build_moe(config, tmp_path / "out", max_shard_size="10KB")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list(out.glob("*.safetensors"))) == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".mlp." not in name:
            assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16)), name
    verify(out)


def test_a_mixture_says_what_it_is_and_can_be_checked(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    (base / "notes.txt").write_text("not part of the model")
    out = Path(build_moe(mixture(base, base, other), tmp_path / "out"))
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "provenance.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["base", "other"] and "moe" in front["tags"] and "| 1 | other | 1 | 1 |" in card
    checked = verify(out)
    assert checked.parents == 2 and not checked.absent
    assert reproduce(out) == []
    assert verify(out, deep="all").tensors == len(read_provenance(out)["tensors"])
    assert verify(out, deep=3).tensors == 3
    used = {entry["method"] for entry in read_provenance(out)["tensors"].values()}
    assert used == {"base", "expert", "router"}


@pytest.mark.parametrize("what", ["weights", "config", "routers", "experts", "parent"])
def test_what_was_changed_is_found(what: str, save: Save, tmp_path: Path) -> None:
    """Even where provenance is made to agree with itself."""
    base, other = save("base"), save("other", seed=1)
    out = Path(build_moe(mixture(base, base, other, gate_mode="random"), tmp_path / "out"))
    found = read_provenance(out)
    if what == "weights":
        tensors = load_file(out / "model.safetensors")
        save_file({n: t + 1e-3 for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    elif what == "config":
        text = (out / "config.json").read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
        (out / "config.json").write_text(text)
        found["files"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    elif what == "routers":
        found["recipe"]["options"]["experts"][0]["residual_scale"] = 3.0
    elif what == "experts":
        found["recipe"]["options"]["experts"][1]["source_model"] = str(base)
    else:
        save("other", seed=2)
    found["sha256"] = own_hash(found)
    (out / FILE_NAME).write_text(json.dumps(found))
    with pytest.raises(UserError):
        verify(out)


def test_a_damaged_expert_leaves_nothing_behind(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="NaN"):
        build_moe(mixture(base, base, other), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few experts": ({"experts_per_token": 3}, "there are 2 experts"),
    "no expert a token": ({"experts_per_token": 0}, "experts_per_token"),
    "unknown key": ({"expert_per_token": 2}, "did you mean 'experts_per_token'"),
    "unknown mode": ({"gate_mode": "magic"}, "gate_mode"),
    "unknown architecture": ({"architecture": "deepseek"}, "beginning of one of Mixtral, Qwen MoE, Qwen3 MoE"),
    "wrong architecture": ({"architecture": "qwen3"}, "is made of qwen3"),
    "no shared expert in a Mixtral": (
        {"architecture": "mixtral", "shared_experts": [{"source_model": "{base}", "positive_prompts": ["a"]}]},
        "Mixtral has no shared_experts",
    ),
    "no prompts": ({"experts": [{"source_model": "{base}"}, {"source_model": "{other}"}]}, "positive_prompts"),
    "the same prompts": (
        {"experts": [{"source_model": f"{{{n}}}", "positive_prompts": ["a"]} for n in ("base", "other")]},
        "same prompts",
    ),
    "the same model": (
        {"experts": [{"source_model": "{base}", "positive_prompts": [text]} for text in "ab"]},
        "--allow-same",
    ),
    "an empty prompt": (
        {"experts": [{"source_model": f"{{{n}}}", "positive_prompts": [n, " "]} for n in ("base", "other")]},
        "empty",
    ),
    "no expert": ({"experts": []}, "experts"),
    "noise that is no number": (
        {"experts": [{"source_model": "{base}", "positive_prompts": ["a"], "noise_scale": -1}]}, "noise_scale"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_any_work(case: str, save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=1)
    changes, message = WRONG[case]
    text = json.dumps(mixture(base, base, other) | changes).replace("{base}", str(base)).replace("{other}", str(other))
    with pytest.raises(UserError, match=message):
        build_moe(json.loads(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_size": 8}, "hidden_size is 8, the base model's 16"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"intermediate_size": 20}, "different widths"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("qwen3", {}, "of type 'qwen3'"),
    ],
)
def test_an_expert_that_does_not_fit(
    kind: str, changes: dict[str, Any], message: str, save: Save, tmp_path: Path
) -> None:
    base, other = save("base"), save("other", kind, 1, **changes)
    with pytest.raises(UserError, match=message):
        build_moe(mixture(base, base, other), tmp_path / "out")


def test_a_base_that_does_not_fit(save: Save, tmp_path: Path) -> None:
    other = save("other")
    biased = save("biased", attention_bias=True)
    with pytest.raises(UserError, match="q_proj\\.bias has no place"):
        build_moe(mixture(biased, other, biased), tmp_path / "out")
    mixed = save("mixed", "qwen3", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    with pytest.raises(UserError, match="sliding window"):
        build_moe(mixture(mixed, mixed, mixed, gate_mode="random"), tmp_path / "out")
    make, _ = ARCHITECTURES["llama"]
    transformers.LlamaForSequenceClassification(make()).save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="ForCausalLM"):
        build_moe(mixture(tmp_path / "classifier", other, other, gate_mode="random"), tmp_path / "out")
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        build_moe(mixture(other, other, biased), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = save("base"), save("other", seed=1)
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(mixture(base, base, other, gate_mode="random")))

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return int(stop.value.code or 0)

    assert run("merge", file, "-o", tmp_path / "out") == 2
    assert f"merganser moe {file}" in capsys.readouterr().err
    assert run("moe", file, "--dry-run") == 0
    assert "2 experts in a Mixtral" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert run("moe", file, "-o", tmp_path / "out", "--seed", 4) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "out") and "random" in printed.err
    assert read_provenance(tmp_path / "out")["recipe"]["options"]["seed"] == 4
    assert run("moe", file, "-o", tmp_path / "out") == 2
    assert run("moe", file, "-o", tmp_path / "out", "--overwrite") == 0
    assert run("inspect", tmp_path / "out") == 0 and run("verify", tmp_path / "out") == 0
    assert run("moe", file, "-o", base, "--overwrite") == 2


@pytest.mark.parametrize("what", ["router", "expert"])
def test_a_tensor_that_was_replaced_with_all_hashes_is_found_by_making_it_again(
    what: str, save: Save, tmp_path: Path
) -> None:
    base, other = save("base"), save("other", seed=1)
    out = Path(build_moe(mixture(base, base, other), tmp_path / "out"))
    part = "gate.weight" if what == "router" else "experts.1.w2.weight"
    name = f"model.layers.1.block_sparse_moe.{part}"
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name] + 0.01
    wrong = tmp_path / "wrong"
    with SafetensorsWriter(tmp_path, {"wrong": specs_of(out)}) as writer:
        for key, tensor in tensors.items():
            writer.write("wrong", key, tensor)
    wrong.replace(out / "model.safetensors")
    found = read_provenance(out)
    digest, hashes = hash_file(out / "model.safetensors", "blake3:")
    found["files"]["model.safetensors"], found["tensors"][name]["blake3"] = digest, hashes[name]
    found["sha256"] = own_hash(found)
    (out / FILE_NAME).write_text(json.dumps(found))
    verify(out)
    with pytest.raises(UserError, match=name):
        verify(out, deep="all")


def specs_of(folder: Path) -> list[TensorSpec]:
    infos = read_infos(folder / "model.safetensors", "model.safetensors")
    return [TensorSpec(info.name, info.dtype, info.shape) for info in infos]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_qwen_mixture_of_llamas_has_their_attention(kind: str, save: Save, tmp_path: Path) -> None:
    """Without the biases that Qwen2 has, and with Mistral's window in every layer."""
    dense, other = save("dense", kind), save("other", kind, 1)
    shared = [{"source_model": str(other), "residual_scale": 0}]
    config = mixture(dense, dense, dense, gate_mode="random", shared_experts=shared, architecture="qwen")
    out = build_moe(config, tmp_path / "out")
    model = opened(out)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not [name for name in load_file(out / "model.safetensors") if name.endswith("bias")]
    torch.testing.assert_close(logits(model), logits(opened(dense)), rtol=0, atol=2e-5)
