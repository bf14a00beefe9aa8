"""LoRA adapters as checkpoints: each way of writing one, reading by rows, hashing by parts, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_examples import PREFIX, adapt_linears, factors, oracle, write_adapter
from conftest import ARCHITECTURES, VOCABULARY, make_model
from merganser.checkpoints import AdapterCheckpoint, Checkpoint, adapters, open_checkpoint
from merganser.errors import Problems, UserError
from merganser.tensors import one_thread

Save = Callable[..., Path]
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "up_proj"),
    "bert": ("query", "output.dense"),
    "gpt2": ("c_attn", "c_proj"),
}


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", TARGETS)
def test_an_adapter_is_its_base_plus_the_product(
    save_model: Save, tmp_path: Path, architecture: str, rslora: bool
) -> None:
    base = save_model("base", architecture)
    turned = architecture == "gpt2"
    adapter = adapt_linears(tmp_path / "adapter", base, TARGETS[architecture], use_rslora=rslora, fan_in_fan_out=turned)
    expected = oracle(base, adapter)
    alone, paired = open_checkpoint(adapter), open_checkpoint(f"{base}+{adapter}")
    assert isinstance(alone, AdapterCheckpoint) and alone.changes
    assert alone.config == open_checkpoint(base).config
    assert set(alone.tensors) == set(expected) == set(paired.tensors)
    for name, tensor in expected.items():
        close(alone.read(name), tensor)
        assert torch.equal(alone.read(name), paired.read(name))
        assert tuple(alone.read(name).shape) == alone.tensors[name].shape
    assert alone.manifest_sha256() == paired.manifest_sha256() != alone.base.manifest_sha256()


def test_storage_dtype_stays_the_base_s_and_values_are_float32(tmp_path: Path) -> None:
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = adapt_linears(tmp_path / "adapter", tmp_path / "base", ("q_proj",))
    checkpoint = open_checkpoint(adapter)
    expected = oracle(tmp_path / "base", adapter)
    for name, (change,) in checkpoint.changes.items():
        assert checkpoint.tensors[name].dtype == "BF16" and change.scale == 2.0
        assert checkpoint.read(name).dtype == torch.float32
        close(checkpoint.read(name), expected[name])
    assert checkpoint.read("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_bits_however_it_is_cut(tmp_path: Path, transposed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 37)
    (tmp_path / "base").mkdir()
    save_file({"x.weight": weight, "y.weight": torch.randn(4, 4)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    shape = (37, 300) if transposed else (300, 37)
    adapter = write_adapter(tmp_path / "adapter", factors("x", *shape, rank=8), tmp_path / "base", r=8)
    checkpoint = open_checkpoint(adapter)
    whole = checkpoint.read("x.weight")
    for start, stop in ((0, 1), (127, 129), (128, 256), (5, 299), (299, 300), (250, 400), (10, 10)):
        assert torch.equal(checkpoint.read("x.weight", start, stop), whole[start:stop]), (start, stop)
    with one_thread():
        assert torch.equal(checkpoint.read("x.weight"), whole)


def test_patterns_of_rank_and_alpha(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "llama")
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    tensors = factors(first, 16, 16, rank=2) | factors(second, 16, 16, rank=4, seed=1)
    adapter = write_adapter(
        tmp_path / "adapter", tensors, base, r=2, lora_alpha=6,
        rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={r".*\.1\..*q_proj": 10},
    )  # fmt: skip
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.changes[f"{first}.weight"][0].scale == 3.0
    assert checkpoint.changes[f"{second}.weight"][0].scale == 2.5
    scaled = 2.5 * tensors[f"{second}.lora_B.weight"] @ tensors[f"{second}.lora_A.weight"]
    close(checkpoint.read(f"{second}.weight") - checkpoint.base.read(f"{second}.weight"), scaled.numpy())


def test_embeddings_biases_and_heads(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "bert", num_labels=3)
    query, embedding = "bert.encoder.layer.0.attention.self.query", "bert.embeddings.word_embeddings"
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        **factors(query, 16, 16),
        f"{query}.base_layer.bias": random(16),
        f"{query.replace('.0.', '.1.')}.bias": random(16),
        f"{embedding}.lora_embedding_A": random(3, VOCABULARY),
        f"{embedding}.lora_embedding_B": random(16, 3),
        "classifier.modules_to_save.default.weight": random(3, 16),
        "classifier.modules_to_save.bias": random(3),
        "classifier.original_module.bias": random(3),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, base, bias="all", modules_to_save=["classifier"])
    checkpoint, before = open_checkpoint(adapter), load_file(base / "model.safetensors")
    assert torch.equal(checkpoint.read(f"{query}.bias"), tensors[f"{query}.base_layer.bias"])
    assert torch.equal(checkpoint.read("classifier.weight"), tensors["classifier.modules_to_save.default.weight"])
    assert torch.equal(checkpoint.read("classifier.bias", 1, 3), tensors["classifier.modules_to_save.bias"][1:])
    low_rank = tensors[f"{embedding}.lora_embedding_A"].T @ tensors[f"{embedding}.lora_embedding_B"].T
    close(checkpoint.read(f"{embedding}.weight"), (before[f"{embedding}.weight"] + 2 * low_rank).numpy())
    assert set(checkpoint.tensors) == set(before)


def test_lora_biases_are_added_scaled(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "gpt2")
    module = "transformer.h.0.attn.c_attn"
    tensors = {**factors(module, 48, 16), f"{module}.lora_B.bias": torch.arange(48.0)}
    checkpoint = open_checkpoint(write_adapter(tmp_path / "a", tensors, base, fan_in_fan_out=True))
    before = load_file(base / "model.safetensors")[f"{module}.bias"]
    close(checkpoint.read(f"{module}.bias"), (before + 2 * torch.arange(48.0)).numpy())
    assert torch.equal(checkpoint.read(f"{module}.bias", 7, 9), checkpoint.read(f"{module}.bias")[7:9])


@pytest.mark.parametrize("flag", [False, True])
def test_square_conv1d_weights_are_turned_whatever_the_flag_says(save_model: Save, tmp_path: Path, flag: bool) -> None:
    base = save_model("base", "gpt2")
    module = "transformer.h.1.attn.c_proj"  # 16 × 16: its shape does not tell
    adapter = write_adapter(tmp_path / "a", factors(module, 16, 16), base, fan_in_fan_out=flag)
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.changes[f"{module}.weight"][0].transposed
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"{PREFIX}{module}.lora_{x}.weight"] for x in "AB")
    before = load_file(base / "model.safetensors")[f"{module}.weight"]
    close(checkpoint.read(f"{module}.weight"), (before + 2 * (b @ a).T).numpy())


def test_names_with_and_without_the_model_s_prefix(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = ARCHITECTURES["bert"][0]()
    transformers.BertModel(config).save_pretrained(tmp_path / "base")  # no "bert." before its names
    query = "encoder.layer.0.attention.self.query"
    tensors = {
        **factors(f"bert.{query}", 16, 16),
        "classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3),
    }  # fmt: skip
    settings = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    checkpoint = open_checkpoint(write_adapter(tmp_path / "a", tensors, tmp_path / "base", **settings))
    assert checkpoint.config["architectures"] == ["BertForSequenceClassification"]
    assert checkpoint.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert f"bert.{query}.weight" in checkpoint.changes and f"{query}.weight" not in checkpoint.tensors
    assert torch.equal(checkpoint.read("classifier.weight"), tensors["classifier.weight"])
    body = open_checkpoint(write_adapter(tmp_path / "b", factors(f"bert.{query}", 16, 16), tmp_path / "base"))
    assert torch.equal(body.read(f"{query}.weight"), checkpoint.read(f"bert.{query}.weight"))
    assert body.config["architectures"] == ["BertModel"]
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({"model_type": "bert", "id2label": {"0": "x", "1": "y", "2": "z"}})
    )
    assert list(open_checkpoint(tmp_path / "a").config["id2label"].values()) == ["x", "y", "z"]


def test_a_language_model_s_head_gives_way_to_the_adapter_s(tmp_path: Path) -> None:
    import transformers

    transformers.RobertaForMaskedLM(ARCHITECTURES["roberta"][0]()).save_pretrained(tmp_path / "base")
    tensors = factors("roberta.encoder.layer.0.attention.self.query", 16, 16)
    for part in ("dense", "out_proj"):
        rows = 16 if part == "dense" else 2
        tensors[f"classifier.{part}.weight"] = torch.randn(rows, 16)
        tensors[f"classifier.{part}.bias"] = torch.randn(rows)
    settings = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    checkpoint = open_checkpoint(write_adapter(tmp_path / "a", tensors, tmp_path / "base", **settings))
    assert not any(name.startswith("lm_head") for name in checkpoint.tensors)
    assert "classifier.out_proj.weight" in checkpoint.tensors


def test_hashes_are_of_the_parts_and_known_without_the_sum(
    save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model("base", "llama")
    adapter = adapt_linears(tmp_path / "a", base, ("q_proj",), seed=1)
    monkeypatch.setattr(adapters, "apply", lambda *_: pytest.fail("a sum was made"))
    first = open_checkpoint(adapter).manifest_sha256()
    assert first == open_checkpoint(adapter).manifest_sha256()
    other = adapt_linears(tmp_path / "b", base, ("q_proj",), seed=2)
    same = write_adapter(
        tmp_path / "c",
        {n.removeprefix(PREFIX): t for n, t in load_file(adapter / "adapter_model.safetensors").items()},
        base, lora_alpha=7,
    )  # fmt: skip
    assert len({first, *(open_checkpoint(one).manifest_sha256() for one in (other, same))}) == 3
    changed = open_checkpoint(adapter)
    untouched = [name for name in changed.tensors if name not in changed.changes]
    assert all(changed.sha256(name) == changed.base.sha256(name) for name in untouched)


def test_a_base_that_was_read_by_rows_is_not_read_again_to_be_hashed(
    save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapt_linears(tmp_path / "a", save_model("base", "llama"), ("q_proj",))
    checkpoint = open_checkpoint(adapter)
    expected = open_checkpoint(adapter).manifest_hash("blake3")
    for name in checkpoint.tensors:
        for start, stop in checkpoint.pieces(name, 300):
            checkpoint.observe(name, checkpoint.read(name, start, stop), start)
    monkeypatch.setattr(Checkpoint, "read", _only_factors(Checkpoint.read))
    assert set(checkpoint.hashes) == set(checkpoint.tensors)
    assert checkpoint.manifest_hash("blake3") == expected


def _only_factors(read: Any) -> Any:
    def checked(self: Checkpoint, name: str, *arguments: Any) -> torch.Tensor:
        assert ".lora_" in name, f"{name} was read again"
        return read(self, name, *arguments)

    return checked


def test_a_row_slice_reads_its_rows_and_the_factors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    weights = {"big.weight": torch.randn(4096, 512), "other.weight": torch.randn(2048, 512)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    tensors = factors("big", 4096, 512, 4) | factors("other", 2048, 512, 4)
    checkpoint = open_checkpoint(write_adapter(tmp_path / "a", tensors, tmp_path / "base", r=4))
    read: list[int] = []
    original = Checkpoint._read_into

    def counted(self: Checkpoint, view: memoryview, file: str, offset: int) -> None:
        read.append(len(view))
        original(self, view, file, offset)

    monkeypatch.setattr(Checkpoint, "_read_into", counted)
    rows = checkpoint.read("big.weight", 1000, 1064)
    assert sum(read) == 64 * 512 * 4 + 4 * 512 * 4 + 256 * 4 * 4  # rows, A, the blocks of B that hold them
    close(
        rows,
        (weights["big.weight"] + 1.5 * tensors["big.lora_B.weight"] @ tensors["big.lora_A.weight"])[1000:1064].numpy(),
    )
    read.clear()
    checkpoint.read("big.weight")
    assert sum(read) == (4096 * 512 + 4 * 512 + 4096 * 4) * 4  # the other tensor stays on disk


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(*arguments)
    assert "to mend" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"trainable_token_indices": [1]}, "names trained tokens (trainable_token_indices), and the weights have none"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices is"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'"),
        ({"r": 0}, "the rank r is 0"),
        ({"r": "8"}, "the rank r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern is malformed or holds a rank below 1"),
        ({"alpha_pattern": {r"(a+)\1": 2}}, "no pattern that can be used"),
        ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'"),
    ],
)
def test_other_kinds_and_malformed_settings(
    save_model: Save, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    adapter = adapt_linears(tmp_path / "a", save_model("base", "llama"), ("q_proj",))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    text = refused(adapter)
    assert says in text and "adapter_config.json" in text


def test_every_tensor_that_does_not_fit_is_named_at_once(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "llama")
    good = "model.layers.0.self_attn.q_proj"
    tensors = factors(good, 16, 16)
    tensors |= factors("model.layers.1.self_attn.q_proj", 16, 20)  # another width
    tensors |= factors("model.layers.7.self_attn.q_proj", 16, 16)  # no such layer
    tensors |= factors("model.layers.0.mlp.up_proj", 24, 16, rank=2)  # not the rank of the configuration
    tensors |= factors("model.layers.1.mlp.up_proj", 24, 16, rank=0)
    tensors["model.layers.0.self_attn.v_proj.lora_A.weight"] = torch.zeros(3, 16)  # no B
    one, two = (factors("model.layers.0.mlp.gate_proj", 24, 16), factors("model.layers.0.mlp.gate_proj", 24, 16, 5))
    tensors |= {n: (one if "lora_A" in n else two)[n] for n in one}
    tensors["model.layers.0.self_attn.o_proj.lora_magnitude_vector"] = torch.zeros(16)
    adapter = write_adapter(tmp_path / "a", tensors, base)
    with pytest.raises(Problems) as caught:
        open_checkpoint(adapter)
    text = str(caught.value)
    for says in (
        "model.layers.1.self_attn.q_proj: B·A is [16, 20], tensor 'model.layers.1.self_attn.q_proj.weight'",
        "changes 'model.layers.7.self_attn.q_proj.weight', which",
        "model.layers.0.mlp.up_proj: A [2, 16] is of rank 2, adapter_config.json says 3",
        "model.layers.1.mlp.up_proj: rank 0",
        "model.layers.0.self_attn.v_proj: lora_A without lora_B",
        "model.layers.0.mlp.gate_proj: A [3, 16] is of rank 3, B [24, 5] of rank 5",
        "lora_magnitude_vector' is no part of a LoRA adapter",
    ):
        assert says in text, says
    assert len(caught.value.problems) == 7 and good not in text
    assert text.count("adapter_model.safetensors") == 7 and text.count("to mend") == 7


def test_an_adapter_of_another_model(save_model: Save, tmp_path: Path) -> None:
    small, other = save_model("small", "llama"), save_model("other", "bert")
    adapter = adapt_linears(tmp_path / "a", small, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))
    text = refused(f"{other}+{adapter}")
    assert "which" in text and "lacks" in text and "2 more tensors like these" in text
    assert "as base+adapter" in text


def test_places_that_hold_no_base_or_no_adapter(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "llama")
    adapter = adapt_linears(tmp_path / "a", base, ("q_proj",))
    assert "what follows the + is no PEFT adapter" in refused(f"{base}+{base}")
    assert "is itself an adapter" in refused(f"{adapter}+{adapter}")
    lost = adapt_linears(tmp_path / "b", base, ("q_proj",), base_model_name_or_path=str(tmp_path / "gone"))
    assert "the base of this adapter" in refused(lost) and f"org/base+{lost}" in refused(lost)
    unnamed = adapt_linears(tmp_path / "c", base, ("q_proj",), base_model_name_or_path=None)
    assert "names no base" in refused(unnamed)
    assert isinstance(open_checkpoint(f"{base}+{unnamed}"), AdapterCheckpoint)
    beside = adapt_linears(tmp_path / "d", base, ("q_proj",), base_model_name_or_path="base")
    assert open_checkpoint(beside).base.path.samefile(base)
    (unnamed / "adapter_config.json").unlink()
    assert "without its adapter_config.json" in refused(unnamed)


def test_folders_with_a_plus_in_their_names(save_model: Save, tmp_path: Path) -> None:
    base = save_model("a+b", "llama")
    adapter = adapt_linears(tmp_path / "c+d", base, ("q_proj",))
    assert not isinstance(open_checkpoint(base), AdapterCheckpoint)
    found = open_checkpoint(f"{base}+{adapter}")
    assert found.base.path == base and found.adapter.path == adapter


def test_damaged_and_pickled_files(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "llama")
    adapter = adapt_linears(tmp_path / "a", base, ("q_proj",))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    file.write_bytes(file.read_bytes()[:-40])
    assert "truncated safetensors file" in refused(adapter)
    file.unlink()
    assert "without its weights" in refused(adapter)
    torch.save(tensors, adapter / "adapter_model.bin")
    assert "pickled (adapter_model.bin)" in refused(adapter)
    pickled = open_checkpoint(adapter, allow_pickle=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(pickled.read(name), pickled.base.read(name))
    save_file(tensors, file)
    assert torch.equal(open_checkpoint(adapter).read(name), pickled.read(name))


def test_quantised_and_resized_bases_are_refused(save_model: Save, tmp_path: Path) -> None:
    base = save_model("base", "llama")
    adapter = adapt_linears(tmp_path / "a", base, ("q_proj",))
    state = load_file(base / "model.safetensors")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text((base / "config.json").read_text())
    for name in state:
        if "q_proj" in name:
            state[name] = state[name].to(torch.int8)
    save_file(state, tmp_path / "q" / "model.safetensors")
    assert "the weights are quantised" in refused(f"{tmp_path / 'q'}+{adapter}")
    longer = {"model.embed_tokens.weight": torch.zeros(VOCABULARY + 2, 16), **factors("lm_head", VOCABULARY, 16)}
    resized = write_adapter(tmp_path / "r", longer, base, modules_to_save=["embed_tokens"])
    assert f"embed_tokens.weight is [{VOCABULARY + 2}, 16]" in refused(resized)


# --- against PEFT itself, where it is installed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "all"}),
        ("bert", {"target_modules": ["word_embeddings", "value"], "bias": "lora_only", "use_rslora": True}),
        ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"1.mlp.*": 3}}),
        ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    ],
)
def test_equals_peft_s_own_merge(save_model: Save, tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'merganser[test]'")
    base = save_model("base", architecture)
    model_class = ARCHITECTURES[architecture][1]
    config = peft.LoraConfig(r=3, lora_alpha=7, **settings)
    model = peft.get_peft_model(model_class.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'adapter'}")
    expected = {n: t.clone() for n, t in model.merge_and_unload().state_dict().items()}
    before = load_file(base / "model.safetensors")
    moved = 0
    for name in checkpoint.tensors:
        torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(expected[name], before[name])
    assert moved == len(checkpoint.changes) > 0
