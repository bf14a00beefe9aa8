"""Quantised checkpoints: codes read as the numbers that they mean, others refused; every kind written by hand."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import make_model
from merganser.checkpoints import CodedCheckpoint, QuantisedCheckpoint, QuantisedWeights, open_checkpoint
from quantised_examples import bfloat16, configure, fp8, mxfp4, write_quantised, write_shards

Save = Callable[..., Path]
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
#: How a weight is quantised, and what the configuration says of it. Matrices are 16 or 24 high and wide.
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "blocks, the last one short": ({"block": (16, 16)}, BLOCKS),
    "blocks": ({"block": (8, 4)}, BLOCKS | {"weight_block_size": [8, 4]}),
    "blocks, nothing said": ({"block": (8, 8)}, None),
    "one scale": ({"block": None}, BLOCKS | {"weight_block_size": None}),
    "one scale, compressed-tensors": (
        {"block": None, "end": "_scale"},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    ),
    "rows": ({"block": (1, 24), "end": "_scale", "scale_dtype": torch.bfloat16}, {"quant_method": "fbgemm_fp8"}),
    "groups of columns": ({"block": (1, 8), "end": "_scale"}, {"quant_method": "compressed-tensors"}),
    "compressed blocks": (
        {"block": (16, 16), "end": "_scale"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"block_structure": [16, 16]}}}},
    ),
    "e5m2": ({"dtype": torch.float8_e5m2}, BLOCKS),
    "exponents": ({"scale_dtype": torch.float8_e8m0fnu}, BLOCKS | {"scale_fmt": "ue8m0"}),
    "exponents in bytes": (
        {"scale_dtype": torch.uint8, "block": (1, 8)},
        {"quant_method": "mxfp8", "weight_block_size": [1, 8]},
    ),
    "modelopt": ({"block": None, "end": "_scale"}, {"quant_method": "modelopt", "quant_algo": "FP8"}),
}


def quantised(folder: Path, source: Path, key: str = "blocks", **more: Any) -> dict[str, np.ndarray]:
    """A folder in one of the formats."""
    how, settings = FORMATS[key]
    return write_quantised(folder, source, partial(fp8, **how), settings, **more)


@pytest.mark.parametrize("key", FORMATS)
def test_codes_are_read_as_the_numbers_that_they_mean(save_model: Save, tmp_path: Path, key: str) -> None:
    plain = save_model("plain", "llama")
    meaning = quantised(tmp_path / "q", plain, key)
    checkpoint = open_checkpoint(tmp_path / "q")
    assert isinstance(checkpoint, QuantisedCheckpoint)
    assert set(checkpoint.tensors) == set(open_checkpoint(plain).tensors) == set(meaning)
    assert "quantization_config" not in checkpoint.config
    for name, numbers in meaning.items():
        info, expected = checkpoint.tensors[name], bfloat16(numbers)
        assert (info.dtype, info.shape, info.nbytes) == ("BF16", numbers.shape, expected.nbytes)
        assert torch.equal(checkpoint.read(name), expected), name
        for start in range(numbers.shape[0]):
            for stop in (start + 1, start + 5):
                assert torch.equal(checkpoint.read(name, start, stop), expected[start:stop]), (name, start)


def test_transformers_reads_the_same_numbers(save_model: Save, tmp_path: Path) -> None:
    quantised(tmp_path / "q", save_model("plain", "llama"))
    checkpoint = open_checkpoint(tmp_path / "q")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("end", ["scale", "qscale_weight"])
def test_scales_by_other_names(save_model: Save, tmp_path: Path, end: str) -> None:
    meaning = quantised(tmp_path / "q", save_model("plain", "llama"))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    write_shards(tmp_path / "q", {name.replace("weight_scale_inv", end): t for name, t in tensors.items()})
    checkpoint = open_checkpoint(tmp_path / "q")
    assert set(checkpoint.tensors) == set(meaning)
    assert all(torch.equal(checkpoint.read(name), bfloat16(numbers)) for name, numbers in meaning.items())


def test_scales_in_other_shards(save_model: Save, tmp_path: Path) -> None:
    meaning = quantised(tmp_path / "q", save_model("plain", "llama"), shards=3)
    checkpoint = open_checkpoint(tmp_path / "q")
    stored = {info.name: info.file for info in checkpoint.stored.tensors.values()}  # type: ignore[attr-defined]
    assert any(stored[name] != stored[f"{name}_scale_inv"] for name in meaning if f"{name}_scale_inv" in stored)
    assert all(torch.equal(checkpoint.read(name), bfloat16(numbers)) for name, numbers in meaning.items())


def test_scales_of_activations_and_caches_do_not_show(save_model: Save, tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn"
    more = {
        f"{layer}.q_proj.{end}": torch.tensor(1.0)
        for end in ("input_scale", "activation_scale", "output_scale", "input_scale_ub")
    }
    more |= {f"{layer}.{end}": torch.ones(1) for end in ("k_scale", "v_scale", "q_scale")}
    meaning = quantised(tmp_path / "q", save_model("plain", "llama"), more=more)
    assert set(open_checkpoint(tmp_path / "q").tensors) == set(meaning)


def test_stacked_experts(tmp_path: Path) -> None:
    """Of fine-grained FP8: (E, out, in) in blocks; of fbgemm: (E, in, out), a scale for each output; or one each."""
    torch.manual_seed(0)
    weight = torch.randn(3, 24, 40)
    pieces = [fp8("", one, (16, 16)) for one in weight]
    codes = torch.stack([stored[""] for stored, _ in pieces])
    tensors = {
        "experts.a": codes,
        "experts.a_scale_inv": torch.stack([stored["_scale_inv"] for stored, _ in pieces]),
        "experts.a_activation_scale": torch.ones(3),
        "experts.gate_up_proj": codes.clone(),
        "experts.gate_up_proj_scale": torch.rand(3, 1, 40),
        "experts.down_proj": codes.clone(),
        "experts.down_proj_scale": torch.rand(3, 40, 1),
        "experts.each": codes.clone(),
        "experts.each_scale": torch.rand(3),
    }
    write_shards(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{}")
    configure(tmp_path, BLOCKS)
    checkpoint = open_checkpoint(tmp_path)
    numbers = codes.double()
    expected = {
        "experts.a": torch.from_numpy(np.stack([meaning for _, meaning in pieces])),
        "experts.gate_up_proj": numbers * tensors["experts.gate_up_proj_scale"].double(),
        "experts.down_proj": numbers * tensors["experts.down_proj_scale"].double().mT,
        "experts.each": numbers * tensors["experts.each_scale"].double()[:, None, None],
    }
    assert set(checkpoint.tensors) == set(expected)
    for name, wanted in expected.items():
        assert torch.equal(checkpoint.read(name), bfloat16(wanted.numpy())), name
        assert torch.equal(checkpoint.read(name, 1, 2), bfloat16(wanted.numpy())[1:2]), name


def test_mxfp4_experts_are_those_of_the_plain_table_and_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, meaning = mxfp4((3, 64, 10))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_shards(tmp_path, {f"{name}{end}": tensor for end, tensor in stored.items()}, shards=2)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors[name].shape == (3, 64, 10) and list(checkpoint.tensors) == [name]
    assert torch.equal(checkpoint.read(name), bfloat16(meaning))
    assert torch.equal(checkpoint.read(name), convert_moe_packed_tensors(stored["_blocks"], stored["_scales"]))
    assert torch.equal(checkpoint.read(name, 1, 2), bfloat16(meaning)[1:2])
    assert checkpoint.read(name).is_contiguous()


def test_fp4_in_bytes_beside_fp8(tmp_path: Path) -> None:
    """As DeepSeek-V4 stores its experts: two codes in each byte of an I8 weight, an exponent for every 32."""
    stored, meaning = mxfp4((1, 64, 6))
    codes = stored["_blocks"].reshape(6, 32).view(torch.int8)
    scale = stored["_scales"].reshape(6, 2).view(torch.float8_e8m0fnu)
    write_shards(tmp_path, {"experts.0.w1.weight": codes, "experts.0.w1.scale": scale})
    (tmp_path / "config.json").write_text("{}")
    configure(tmp_path, BLOCKS | {"weight_block_size": [128, 128]})
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("experts.0.w1.weight"), bfloat16(meaning[0].T))


def test_hashes_are_of_the_stored_bytes(save_model: Save, tmp_path: Path) -> None:
    plain = save_model("plain", "llama")
    meaning = quantised(tmp_path / "q", plain)
    quantised(tmp_path / "sharded", plain, shards=2)
    name = next(name for name in meaning if name.endswith("up_proj.weight"))
    first, again = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "q")
    for start in range(0, 24, 7):
        first.observe(name, first.read(name, start, start + 7), start)
    before = dict(first.hashes)
    assert first.hash(name, "blake3", torch.zeros(1)) == again.hash(name, "blake3")
    assert set(before) <= set(first.tensors)
    manifest = again.manifest_sha256()
    assert manifest == open_checkpoint(tmp_path / "sharded").manifest_sha256()
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for change in (name, f"{name}_scale_inv"):
        changed = {n: t.clone() for n, t in tensors.items()}
        changed[change].view(torch.uint8).view(-1)[0] ^= 1
        save_file(changed, tmp_path / "q" / "model.safetensors")
        other = open_checkpoint(tmp_path / "q")
        assert other.manifest_sha256() != manifest and other.hash(name, "blake3") != again.hash(name, "blake3")


def test_a_configuration_inside_another(save_model: Save, tmp_path: Path) -> None:
    meaning = quantised(tmp_path / "q", save_model("plain", "llama"), "blocks, nothing said")
    configure(tmp_path / "q", BLOCKS | {"weight_block_size": [8, 8]}, inside="text_config")
    checkpoint = open_checkpoint(tmp_path / "q")
    assert checkpoint.config["text_config"] == {}
    assert all(torch.equal(checkpoint.read(name), bfloat16(numbers)) for name, numbers in meaning.items())


def test_other_things_that_are_called_quantization_stay(save_model: Save) -> None:
    folder = save_model("plain", "llama")
    config = json.loads((folder / "config.json").read_text()) | {"quantization": {"codebooks": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).config == config and open_checkpoint(folder).quantisation is None


#: A weight's tensors in the formats that are refused, with the configuration and what the message must name.
REFUSED: dict[str, tuple[dict[str, Any] | None, Mapping[str, torch.Tensor], str]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {"qweight": torch.zeros(2, 16, dtype=torch.int32), "g_idx": torch.zeros(16, dtype=torch.int32)},
        "gptq, 4 bits",
    ),
    "gptq, nothing said": (None, {"qweight": torch.zeros(2, 16).int(), "qzeros": torch.zeros(2, 2).int()}, "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4}, {"qweight": torch.zeros(16, 2).int()}, "awq, 4 bits"),
    "bitsandbytes 4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            "weight": torch.zeros(128, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(4),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
        },
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes 4, nothing said": (
        None,
        {"weight": torch.zeros(128, 1, dtype=torch.uint8), "weight.absmax": torch.ones(4)},
        "bitsandbytes",
    ),
    "bitsandbytes 8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": torch.zeros(16, 16, dtype=torch.int8), "SCB": torch.ones(16)},
        "bitsandbytes, 8 bits",
    ),
    "bitsandbytes, plain": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"weight": torch.ones(16, 16)},
        "4",
    ),
    "gptq, plain": ({"quant_method": "gptq", "bits": 4}, {"weight": torch.ones(16, 16)}, "gptq"),
    "packed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"weight_packed": torch.zeros(16, 2).int(), "weight_scale": torch.ones(16, 1)},
        "pack-quantized",
    ),
    "int8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"weight": torch.zeros(16, 16, dtype=torch.int8), "weight_scale": torch.ones(16, 1)},
        "int-quantized",
    ),
    "int8, nothing said": (None, {"weight": torch.zeros(16, 16, dtype=torch.int8)}, "I8"),
    "nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "weight": torch.zeros(16, 8, dtype=torch.uint8),
            "weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
        },
        "NVFP4",
    ),
    "fp8 without scales": (None, {"weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}, "F8_E4M3"),
    "fp8, scales of another shape": (
        BLOCKS,
        {"weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 1)},
        "fp8",
    ),
    "fp8, scales beside plain numbers": (
        BLOCKS,
        {"weight": torch.ones(16, 16), "weight_scale_inv": torch.ones(1)},
        "fp8",
    ),
    "mxfp4 of another shape": (
        {"quant_method": "mxfp4"},
        {"w_blocks": torch.zeros(2, 4, 1, 8).byte(), "w_scales": torch.zeros(2, 4, 1).byte()},
        "mxfp4",
    ),
    "mxfp4, no scales": (None, {"w_blocks": torch.zeros(2, 4, 1, 16).byte()}, "U8"),
    "int8 experts, nothing said": (None, {"gate_up_proj": torch.zeros(2, 4, 4, dtype=torch.int8)}, "I8"),
    "hqq": ({"quant_method": "hqq"}, {"W_q": torch.zeros(16, 8).byte()}, "hqq"),
    "mlx": ({"group_size": 64, "bits": 4}, {"weight": torch.zeros(16, 2, dtype=torch.uint32)}, "mlx, 4 bits"),
    "not known": ({"quant_method": "exotic"}, {"weight": torch.zeros(16, 2).byte()}, "exotic"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_codes_are_refused_with_one_message(save_model: Save, tmp_path: Path, key: str) -> None:
    settings, stored, named = REFUSED[key]
    folder = save_model("q", "llama")
    tensors = load_file(folder / "model.safetensors")
    for module in [name.removesuffix(".weight") for name in tensors if name.endswith("q_proj.weight")]:
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{end}": tensor.clone() for end, tensor in stored.items()}
    write_shards(folder, tensors)
    configure(folder, settings)
    with pytest.raises(QuantisedWeights) as caught:
        open_checkpoint(folder)
    assert named in caught.value.what and "full precision" in str(caught.value.mend)
    assert caught.value.where == str(folder)
    coded = open_checkpoint(folder, codes=True)
    assert isinstance(coded, CodedCheckpoint) and set(coded.tensors) == set(tensors)


def test_every_quantisation_that_transformers_knows_is_read_or_refused(save_model: Save, tmp_path: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    folder = save_model("q", "llama")
    products = {"fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "compressed-tensors", "quark"}
    for method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        configure(folder, {"quant_method": method})
        if method in products:  # plain numbers are what is not quantised of such models
            assert isinstance(open_checkpoint(folder), QuantisedCheckpoint)
            continue
        with pytest.raises(QuantisedWeights, match=method):
            open_checkpoint(folder)


def test_buffers_are_no_codes(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {
        "bert.embeddings.position_ids": torch.arange(32)[None],
        "bert.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "bert.attn.table": torch.ones(4, 4, dtype=torch.int8),
        "bert.attn.mask": torch.ones(4, 4, dtype=torch.bool),
        "bert.norm.num_batches_tracked": torch.tensor(3),
        "bert.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
    }
    write_shards(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert not isinstance(checkpoint, QuantisedCheckpoint | CodedCheckpoint) and set(checkpoint.tensors) == set(tensors)


def test_an_adapter_on_codes_is_refused_with_the_mend_of_a_full_base(save_model: Save, tmp_path: Path) -> None:
    from adapter_examples import adapt_linears

    base = save_model("base", "llama")
    adapter = adapt_linears(tmp_path / "adapter", base, ("q_proj",))
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    coded = tmp_path / "coded"
    write_quantised(
        coded, base, lambda *_: ({"": torch.zeros(8, 1).byte(), ".absmax": torch.ones(1)}, np.zeros(1)), settings
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": coded.name}))
    with pytest.raises(QuantisedWeights) as caught:
        open_checkpoint(adapter)
    assert "bitsandbytes, 4 bits" in caught.value.what and "base+adapter" in str(caught.value.mend)
    assert caught.value.where == str(coded)
    assert open_checkpoint(f"{base}+{adapter}").tensors  # what the mend says


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(QuantisedWeights, match=r"model-q4_k_m\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
    ],
)
def test_the_command_that_dequantises_is_one_that_a_shell_takes(
    save_model: Save, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """It was run by hand with both libraries; here, that it parses and names the model's own class and folder."""
    folder = save_model("q", "llama")
    tensors = load_file(folder / "model.safetensors")
    coded = {n: torch.zeros(8, 1).byte() if n.endswith("q_proj.weight") else t for n, t in tensors.items()}
    write_shards(folder, coded)
    configure(folder, settings)
    with pytest.raises(QuantisedWeights) as caught:
        open_checkpoint(folder)
    command = re.search(r'python -c "([^"]+)"', str(caught.value.mend))
    assert command is not None
    ast.parse(command[1])
    assert "import LlamaForCausalLM as M" in command[1] and repr(str(folder)) in command[1]
