"""Statistics of experts: each from the tokens that were routed to it, against the routing of examples run alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from collection.test_padding import SMALL, check, inputs_of, saved
from merganser import collect
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.errors import UserError
from merganser.statistics import Statistics
from merganser.statistics.algebra import add
from merganser.tensors import unpack_upper
from statistics_examples import alone, batched, make_examples

ATTENTION = {**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}
#: name → model, the tensor on disk that has a matrix of an expert of layer 1 in it, and whether that has all experts.
MODELS: dict[str, tuple[Callable[[], Any], str, str, bool]] = {
    "one by one on disk": (
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**ATTENTION, num_local_experts=4)),
        "model.layers.1.block_sparse_moe.experts.{}.w3.weight",
        "model.layers.1.block_sparse_moe.experts.{}.w2.weight",
        False,
    ),
    "gate and up apart on disk": (
        lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**ATTENTION, num_experts=4, moe_intermediate_size=12, head_dim=8)
        ),
        "model.layers.1.mlp.experts.{}.up_proj.weight",
        "model.layers.1.mlp.experts.{}.down_proj.weight",
        False,
    ),
    "packed and transposed": (
        lambda: t.GptOssForCausalLM(t.GptOssConfig(**ATTENTION, num_local_experts=4, head_dim=8)),
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        True,
    ),
}


def routed(model: Any, examples: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """For each expert of layer 1 its inputs (n, d), and what is inside it (n, f), float64."""
    module = model.model.layers[1].mlp.experts
    outer: list[list[Tensor]] = [[] for _ in range(module.num_experts)]
    inner: list[list[Tensor]] = [[] for _ in range(module.num_experts)]

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, index = args[0], args[1]
        for expert in range(module.num_experts):
            own = x[(index == expert).any(-1)]
            weight = module.gate_up_proj[expert]
            made = own @ weight + module.gate_up_proj_bias[expert] if module.is_transposed else own @ weight.T
            outer[expert].append(own)
            inner[expert].append(module._apply_gate(made))

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for example in examples:
            model(**alone(model, example))
    handle.remove()
    return [torch.cat(rows).double() for rows in outer], [torch.cat(rows).double() for rows in inner]


def near(gram: Tensor, x: Tensor) -> bool:
    expected = x.T @ x / len(x)
    return bool((gram.double() - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_given_the_tokens_that_were_routed_to_them(tmp_path: Path, name: str) -> None:
    make, up, down, packed = MODELS[name]
    model, checkpoint = saved(make, tmp_path)
    implementation = model.config._experts_implementation
    examples = make_examples(model, 9, seed=4)
    outer, inner = routed(model, examples)
    for experts in ("exact", "shared", "none"):
        header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 4), experts=experts)
        statistics = Statistics.in_memory(header, tensors)
        found = []
        for expert, (x, y) in enumerate(zip(outer, inner, strict=True)):
            for stored, rows in ((up, x), (down, y)):
                layer = statistics.layer(stored.format(expert), expert if packed else None)
                if experts == "none":
                    assert layer is None
                    continue
                if experts == "shared" and stored is up:
                    rows = torch.cat(outer)
                elif not len(rows):
                    assert layer is None  # nothing was routed to it
                    continue
                assert layer is not None and layer.rows == len(rows) and layer.input is not None
                assert layer.expert == (expert if packed and (experts == "exact" or stored is down) else None)
                assert near(unpack_upper(tensors[f"gram.{layer.input}"]), rows)
                found.append(layer.input)
        assert len(set(found)) == {"exact": 2 * len(outer), "shared": len(outer) + 1, "none": 0}[experts]
        check(model, header, tensors, inputs_of(model, examples))
    assert model.config._experts_implementation == implementation


def test_files_add_up_whose_tokens_went_to_other_experts(tmp_path: Path) -> None:
    model, checkpoint = saved(MODELS["one by one on disk"][0], tmp_path)
    examples = make_examples(model, 6, seed=4)
    parts = [collect_statistics(model, checkpoint, [b], experts="exact") for b in batched(model, examples, 1)]
    assert len({len(header.layers) for header, _ in parts}) > 1
    header, tensors = add([Statistics.in_memory(*part) for part in parts])
    whole, truth = collect_statistics(model, checkpoint, batched(model, examples, 6), experts="exact")
    assert {layer.input for layer in header.layers} == {layer.input for layer in whole.layers}
    assert sum(layer.rows for layer in header.layers) == sum(layer.rows for layer in whole.layers)
    for name, value in truth.items():
        assert torch.allclose(tensors[name].float(), value.float(), rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_what_is_inside_experts_is_written_in_low_rank(tmp_path: Path) -> None:
    from conftest import save_tokenizer

    config = t.MixtralConfig(**{**ATTENTION, "intermediate_size": 140}, num_local_experts=4)
    saved(lambda: t.MixtralForCausalLM(config), tmp_path)
    save_tokenizer(tmp_path, "llama")
    (tmp_path / "data.jsonl").write_text('{"text": "the movie was good"}\n{"text": "not a bad movie , Anna"}\n' * 3)
    written = collect(tmp_path, tmp_path / "data.jsonl", shard_examples=2)
    statistics = Statistics.open(written.path)
    statistics.validate()
    kinds = {statistics.inputs[layer.input] for layer in statistics.header.layers if layer.weight.endswith("w2.weight")}
    others = {
        statistics.inputs[layer.input]
        for layer in statistics.header.layers
        if layer.input and not layer.weight.endswith("w2.weight")
    }
    assert kinds == {"factor"} and others == {"gram"}
    assert any("inside experts: lowrank:64" in note for note in written.header.notes)
    assert not statistics.check_binding(open_checkpoint(tmp_path))
    exact = collect(tmp_path, tmp_path / "data.jsonl", experts="exact", overwrite=True)
    assert set(Statistics.open(exact.path).inputs.values()) == {"gram"}
    with pytest.raises(UserError, match="unknown way 'all' with experts"):
        collect(tmp_path, tmp_path / "data.jsonl", experts="all", overwrite=True)
