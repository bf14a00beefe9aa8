"""Layers stacked, skipped and repeated: the results open as they are, tensor by tensor what float64 says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from merganser.errors import UserError
from merganser.merging import make_plan, make_recipe, merge, reproduce, verify
from merganser.merging.plan import AdapterForm
from merganser.statistics import Statistics

State = dict[str, torch.Tensor]
Family = Callable[..., tuple[Path, list[Path]]]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIZES |= {"vocab_size": 32, "max_position_embeddings": 32}


def saved(folder: Path, kind: str, seed: int, **config: Any) -> Path:
    """A random model of a class, such as Llama, in a folder."""
    torch.manual_seed(seed)
    values = {**SIZES, "tie_word_embeddings": False, **config}
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def opened(folder: Path, kind: Any = AutoModelForCausalLM) -> tuple[State, Any]:
    """The parameters in float64 of the model that opens, and its configuration; no key may be missing or unexpected."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return {name: tensor.double() for name, tensor in model.state_dict().items()}, model.config


def stacked(folder: Path, models: list[Path], layers: list[dict[str, Any]], **recipe: Any) -> Path:
    people = recipe.pop("contributors", [{}] * len(models))
    listed = [{"model": str(model), **own} for model, own in zip(models, people, strict=True)]
    return Path(merge(make_recipe({"contributors": listed, "layers": layers, **recipe}), folder))


def moved(state: State, numbers: Mapping[int, int], stack: str = "layers") -> State:
    """The tensors of some layers under the numbers that they have in the result."""
    found = {}
    for new, old in numbers.items():
        for name, tensor in state.items():
            if re.search(rf"\b{stack}\.{old}\.", name):
                found[re.sub(rf"\b{stack}\.{old}\.", f"{stack}.{new}.", name)] = tensor
    return found


def block(name: str, start: int, stop: int, **more: Any) -> dict[str, Any]:
    return {"sources": [{"contributor": name, "range": [start, stop]}], **more}


def same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_two_models_on_top_of_each_other(tmp_path: Path) -> None:
    a, b = (
        saved(tmp_path / "a", "Llama", 0, num_hidden_layers=4),
        saved(tmp_path / "b", "Llama", 1, num_hidden_layers=3),
    )
    out = stacked(tmp_path / "out", [a, b], [block("a", 0, 3), block("b", 1, 3), block("a", 2, 4)])
    found, config = opened(out)
    first, second = opened(a)[0], opened(b)[0]
    assert config.num_hidden_layers == 7
    outside = {name: tensor for name, tensor in first.items() if ".layers." not in name}
    same(found, outside | moved(first, {0: 0, 1: 1, 2: 2, 5: 2, 6: 3}) | moved(second, {3: 1, 4: 2}))
    assert verify(out).parents and not reproduce(out, tmp_path / "again")
    hashes = json.loads((out / "provenance.json").read_text())["tensors"]
    assert hashes["model.layers.0.mlp.up_proj.weight"]["method"] == "taken"


def test_what_lies_outside_the_layers_goes_with_the_nearest_block(tmp_path: Path) -> None:
    a, b = (
        saved(tmp_path / "a", "Llama", 0, num_hidden_layers=2),
        saved(tmp_path / "b", "Llama", 1, num_hidden_layers=2),
    )
    found, _ = opened(stacked(tmp_path / "out", [a, b], [block("b", 0, 1), block("a", 1, 2)]))
    first, second = opened(a)[0], opened(b)[0]
    assert torch.equal(found["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], first["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], first["lm_head.weight"])


def test_blocks_are_merged_with_gradients_of_their_own(tmp_path: Path) -> None:
    a, b, base = (saved(tmp_path / name, "Llama", n, num_hidden_layers=5) for n, name in enumerate(("a", "b", "base")))
    layers = [
        {
            "sources": [
                {"contributor": "a", "range": [0, 3], "coefficient": [0, 1]},
                {"contributor": "b", "range": [0, 3], "coefficient": 0.5},
            ],
            "options": {"scale": [1, 2]},
        },
        {
            "sources": [
                {"contributor": "a", "range": [3, 4]},
                {"contributor": "b", "range": [1, 2]},
                {"contributor": "base", "range": [4, 5]},
            ],
            "rules": [{"role": "norm", "take": "b"}],
        },
    ]
    out = stacked(tmp_path / "out", [a, b], layers, method="task_arithmetic", options={"scale": 0.5}, base=str(base))
    found, _ = opened(out)
    states = [opened(one)[0] for one in (a, b, base)]
    expected = {}
    for new, olds in enumerate([(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 1, 4)]):
        own = [moved(state, {new: old}) for state, old in zip(states, olds, strict=True)]
        weights, scale = ([new / 2, 0.5], 1 + new / 2) if new < 3 else ([1, 1], 0.5)
        for name, origin in own[2].items():
            deltas = sum(w * (state[name] - origin) for w, state in zip(weights, own, strict=False))
            expected[name] = own[1][name] if new == 3 and "norm" in name else origin + scale * deltas
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_kinds_of_layers_follow_the_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    a = saved(tmp_path / "a", "Gemma3Text", 0, num_hidden_layers=4, layer_types=kinds, sliding_window=8)
    out = stacked(tmp_path / "out", [a], [block("a", 0, 2), block("a", 1, 2), block("a", 3, 4)])
    found, config = opened(out)
    assert config.num_hidden_layers == 4 and config.layer_types == [kinds[n] for n in (0, 1, 1, 3)]
    first = opened(a)[0]
    outside = {name: tensor for name, tensor in first.items() if ".layers." not in name}
    same(found, outside | moved(first, {0: 0, 1: 1, 2: 1, 3: 3}))


def test_layers_without_experts_stay_without(tmp_path: Path) -> None:
    moe = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "num_hidden_layers": 4}
    a = saved(tmp_path / "a", "Qwen3Moe", 0, **moe, mlp_only_layers=[0])
    b = saved(tmp_path / "b", "Qwen3Moe", 1, **moe, mlp_only_layers=[0])
    layers = [block("a", 0, 2), {"sources": [{"contributor": n, "range": [0, 4]} for n in "ab"], "method": "simple"}]
    found, config = opened(stacked(tmp_path / "out", [a, b], layers))
    assert config.mlp_only_layers == [0, 2] and config.num_hidden_layers == 6
    first, second = opened(a)[0], opened(b)[0]
    expected = moved(first, {0: 0, 1: 1})
    later = {n + 2: n for n in range(4)}
    expected |= {name: (one + moved(second, later)[name]) / 2 for name, one in moved(first, later).items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    sparse = saved(tmp_path / "c", "Qwen3Moe", 2, **moe, decoder_sparse_step=2)  # experts in layers 1 and 3
    found, config = opened(stacked(tmp_path / "step", [sparse], [block("c", 1, 3), block("c", 0, 1)]))
    first = opened(sparse)[0]
    outside = {name: tensor for name, tensor in first.items() if ".layers." not in name}
    same(found, outside | moved(first, {0: 1, 1: 2, 2: 0}))


def test_how_many_layers_are_dense(tmp_path: Path) -> None:
    settings = {"first_k_dense_replace": 1, "num_hidden_layers": 3, "n_routed_experts": 4, "num_experts_per_tok": 2}
    settings |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    settings |= {"moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2, "head_dim": 4}
    a = saved(tmp_path / "a", "DeepseekV3", 0, **settings)
    found, config = opened(stacked(tmp_path / "out", [a], [block("a", 0, 1), block("a", 0, 3)]))
    assert config.first_k_dense_replace == 2 and config.num_hidden_layers == 4
    first = opened(a)[0]
    outside = {name: tensor for name, tensor in first.items() if ".layers." not in name}
    same(found, outside | moved(first, {0: 0, 1: 0, 2: 1, 3: 2}))
    with pytest.raises(UserError, match=r"layer 0 of model.layers would be built otherwise .*cannot say it"):
        stacked(tmp_path / "no", [a], [block("a", 1, 2), block("a", 0, 1)])


def test_encoders_and_decoders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**sizes, num_layers=3, num_decoder_layers=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"2 stacks of layers.*\n.*stack: encoder.block or stack: decoder.block"):
        stacked(tmp_path / "out", [tmp_path / "a"], [block("a", 0, 1)])
    out = stacked(
        tmp_path / "out", [tmp_path / "a"], [block("a", 1, 3, stack="encoder"), block("a", 1, 2, stack="encoder")]
    )
    found, config = opened(out, AutoModelForSeq2SeqLM)
    assert (config.num_layers, config.num_decoder_layers) == (3, 2)
    first = opened(tmp_path / "a", AutoModelForSeq2SeqLM)[0]
    expected = {name: tensor for name, tensor in first.items() if "encoder.block" not in name}
    expected |= moved({n: t for n, t in first.items() if n.startswith("encoder")}, {0: 1, 1: 2, 2: 1}, "block")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    same(found, expected | {bias: first[bias]})  # which serves all layers, and lies in the first


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_other_names_of_the_depth(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    names = {
        "GPT2": ("n_embd", "n_head", "n_layer", "h"),
        "GPTNeoX": ("hidden_size", "num_attention_heads", "num_hidden_layers", "layers"),
    }
    width, heads, depth, stack = names[kind]
    values = {width: 16, heads: 2, depth: 3, "vocab_size": 32, "intermediate_size": 24}
    values = values if kind == "GPTNeoX" else {k: v for k, v in values.items() if k != "intermediate_size"}
    model = "GPT2LMHeadModel" if kind == "GPT2" else "GPTNeoXForCausalLM"
    getattr(transformers, model)(getattr(transformers, f"{kind}Config")(**values)).save_pretrained(tmp_path / "a")
    found, config = opened(stacked(tmp_path / "out", [tmp_path / "a"], [block("a", 0, 3), block("a", 1, 2)]))
    assert config.num_hidden_layers == 4 and json.loads((tmp_path / "out/config.json").read_text())[depth] == 4
    first = opened(tmp_path / "a")[0]
    outside = {name: tensor for name, tensor in first.items() if f".{stack}." not in name}
    same(found, outside | moved(first, {0: 0, 1: 1, 2: 2, 3: 1}, stack))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"sources": [{"contributor": "a", "layer_range": [0, 1]}]}], "layer_range is called range here"),
        ([{"sources": [{"contributor": "a", "range": [0, 9]}]}], r"a has 2 layers.*\n.*end at 2 at most"),
        ([{"sources": [{"contributor": "a", "range": [1, 1]}]}], "the one behind the last"),
        ([{"sources": [{"contributor": "c", "range": [0, 1]}]}], "no contributor is called 'c'"),
        ([block("a", 0, 1, options={"scale": 2})], "taken as they are: give a method too"),
        ([{"sources": block("a", 0, 1)["sources"] + block("b", 0, 2)["sources"]}], "of different length"),
        ([{"sources": block("a", 0, 1)["sources"] + block("a", 1, 2)["sources"]}], "stands here twice"),
        ([block("a", 0, 1, rules=[{"take": "b"}])], "b is no source of layers.0, where .* and"),
        ([block("a", 0, 1, stack="decoder")], "the stacks of layers are model.layers"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be(models: list[Path], tmp_path: Path, layers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stacked(tmp_path / "out", models, layers)


def test_a_rule_for_layers_of_the_base_alone_is_one_mistake(models: list[Path], tmp_path: Path) -> None:
    rules = [{"tensors": "*layers*", "method": "simple"}]
    with pytest.raises(UserError) as refused:
        stacked(tmp_path / "out", models, [block("base", 0, 1)], base=str(models[0]), rules=rules)
    assert str(refused.value).startswith("rules.0 (*layers*): method 'simple' merges 1 model or more, 0 are given")


def test_the_base_s_layer_has_to_be_known(models: list[Path], tmp_path: Path) -> None:
    layers = [{"sources": [{"contributor": "a", "range": [0, 1]}, {"contributor": "b", "range": [1, 2]}]}]
    with pytest.raises(UserError, match=r"layers.0: .*needs the base's layer"):
        stacked(tmp_path / "out", models, layers, method="ties", base=str(models[0]))
    recipe = {"contributors": [str(models[1])], "base": str(models[0]), "layers": [block("b", 0, 1)]}
    with pytest.raises(UserError, match="an adapter has its base's layers"):
        make_plan(make_recipe(recipe), adapter=AdapterForm(2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two Llamas that nothing is written to."""
    folder = tmp_path_factory.mktemp("models")
    return [saved(folder / name, "Llama", number, num_hidden_layers=2) for number, name in enumerate("ab")]


def test_statistics_are_those_of_the_layers_that_are_merged(family: Family, tmp_path: Path) -> None:
    _, models = family("llama", 2)
    layers = [
        {"sources": [{"contributor": "tuned-0", "range": [1, 2]}, {"contributor": "tuned-1", "range": [0, 1]}]},
        block("tuned-0", 0, 2),
    ]
    options = {"alpha": 1.0, "ridge": 1e-9}
    found, _ = opened(stacked(tmp_path / "out", models, layers, method="regmean", options=options))
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        right, grams = torch.zeros(()), torch.zeros(())
        for model, number in zip(models, (1, 0), strict=True):
            weight, statistics = f"model.layers.{number}.{name}.weight", Statistics.open(model)
            entry = next(one for one in statistics.header.layers if one.weight == weight)
            gram = statistics.gram(entry.input).double()
            right, grams = right + opened(model)[0][weight] @ gram, grams + gram
        tensor = found[f"model.layers.0.{name}.weight"]
        both = [opened(model)[0][f"model.layers.{n}.{name}.weight"] for model, n in zip(models, (1, 0), strict=True)]
        average = (both[0] + both[1]) / 2
        assert (tensor @ grams - right).norm() < 0.01 * (average @ grams - right).norm()
