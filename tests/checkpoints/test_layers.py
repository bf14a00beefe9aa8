"""The map from modules to on-disk names, on every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from conftest import ARCHITECTURES, make_model
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import describe_layers, layers_of, map_parameters
from merganser.checkpoints.reader import align
from merganser.errors import CheckpointError


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_headers_alone_tell_the_same_layers_as_the_loaded_model(save_model, architecture: str) -> None:
    checkpoint = open_checkpoint(save_model("model", architecture))
    model = make_model(architecture)
    layers = layers_of(model, checkpoint)
    assert describe_layers(checkpoint) == layers and len(layers) > 8
    mapped = map_parameters(model, checkpoint)
    assert set(mapped) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    floating = {n for n, info in checkpoint.tensors.items() if info.dtype == "F32"}
    assert set(mapped.values()) == floating


def test_kinds_and_tying(save_model) -> None:
    layers = {x.module: x for x in describe_layers(open_checkpoint(save_model("gpt2", "gpt2")))}
    assert layers["transformer.h.0.attn.c_attn"].kind == "conv1d"
    assert layers["lm_head"].tied and layers["transformer.wte"].tied
    assert layers["lm_head"].weight == "transformer.wte.weight"
    assert not layers["transformer.wpe"].tied


def test_a_base_model_without_the_prefix(save_model) -> None:
    checkpoint = open_checkpoint(save_model("base"))
    model = make_model("bert", num_labels=2)
    bare = open_checkpoint_of(model.bert, checkpoint.path.parent / "bare")
    layers = {layer.module: layer.weight for layer in layers_of(model, bare)}
    key = "encoder.layer.1.attention.self.key"
    assert layers[f"bert.{key}"] == f"{key}.weight"
    assert "classifier" not in layers  # it is not on disk
    pairs = align(list(checkpoint.tensors), list(bare.tensors))
    assert pairs[f"bert.{key}.weight"] == f"{key}.weight"
    assert "classifier.weight" not in pairs
    assert align(list(bare.tensors), list(checkpoint.tensors))[f"{key}.weight"] == f"bert.{key}.weight"


def open_checkpoint_of(model: transformers.PreTrainedModel, folder: Path):  # type: ignore[no-untyped-def]
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def test_values_that_differ_are_not_mapped(save_model) -> None:
    checkpoint = open_checkpoint(save_model("model"))
    model = make_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(1)
    mapped = map_parameters(model, checkpoint)
    assert "bert.encoder.layer.0.output.dense.weight" not in mapped
    assert "bert.encoder.layer.1.output.dense.weight" in mapped


def test_legacy_norm_names(save_model) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model("old")
    state = load_file(folder / "model.safetensors")
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    save_file(renamed, folder / "model.safetensors")
    mapped = map_parameters(make_model("bert"), open_checkpoint(folder))
    assert mapped["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"


def test_an_unknown_architecture_is_an_error_with_a_mend(save_model) -> None:
    folder = save_model("odd")
    (folder / "config.json").write_text('{"model_type": "none-such", "architectures": ["NoneSuch"]}')
    with pytest.raises(CheckpointError, match="cannot build this architecture"):
        describe_layers(open_checkpoint(folder))


def test_names_are_paired_by_the_leading_component_that_pairs_most() -> None:
    """Before all of one side's or the other's; what is there literally stays; many first components take no search."""
    many = [f"{number}.{kind}" for number in range(3000) for kind in ("weight", "bias")]
    behind = [f"model.{name}" for name in many]
    assert align(many, behind) == dict(zip(many, behind, strict=True))
    assert align(behind, many) == dict(zip(behind, many, strict=True))
    assert align(["a.x", "b.y", "z"], ["x", "y", "a.z"]) == {"a.x": "x", "z": "a.z"}
    assert align(["w", "a.w"], ["a.w", "w"]) == {"w": "w", "a.w": "a.w"}
    assert align(many, [f"{name}x" for name in many]) == {}
