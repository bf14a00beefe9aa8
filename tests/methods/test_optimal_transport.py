"""Optimal transport undoes a permutation of hidden units and heads: biases and next inputs move with them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from conftest import ARCHITECTURES, VOCABULARY, make_model
from merganser.errors import RecipeError
from merganser.merging import merge
from merganser.methods.alignment.optimal_transport import UnitAxis, join, match, split

#: For each architecture, written out by hand: (tensors with units, axis they run along, copies, kind) of each layer.
#: The oracle of these tests; it shares nothing with the method's own table.
LAYOUTS: dict[str, list[tuple[list[str], dict[str, tuple[int, int]], str]]] = {
    "bert": [
        (
            ["bert.encoder.layer.0.", "bert.encoder.layer.1."],
            {"intermediate.dense.weight": (0, 1), "intermediate.dense.bias": (0, 1), "output.dense.weight": (1, 1)},
            "units",
        ),
        (
            ["bert.encoder.layer.0.attention.", "bert.encoder.layer.1.attention."],
            {
                **{f"self.{n}.{k}": (0, 1) for n in ("query", "key", "value") for k in ("weight", "bias")},
                "output.dense.weight": (1, 1),
            },
            "heads",
        ),
    ],
    "distilbert": [
        (
            ["distilbert.transformer.layer.0.ffn.", "distilbert.transformer.layer.1.ffn."],
            {"lin1.weight": (0, 1), "lin1.bias": (0, 1), "lin2.weight": (1, 1)},
            "units",
        ),
        (
            ["distilbert.transformer.layer.0.attention.", "distilbert.transformer.layer.1.attention."],
            {**{f"{n}_lin.{k}": (0, 1) for n in "qkv" for k in ("weight", "bias")}, "out_lin.weight": (1, 1)},
            "heads",
        ),
    ],
    "t5": [
        (
            [
                f"{side}.block.{i}.layer.{j}.DenseReluDense."
                for side, j in (("encoder", 1), ("decoder", 2))
                for i in (0, 1)
            ],
            {"wi_0.weight": (0, 1), "wi_1.weight": (0, 1), "wo.weight": (1, 1)},
            "units",
        ),
        (
            [f"decoder.block.{i}.layer.1.EncDecAttention." for i in (0, 1)],
            {"q.weight": (0, 1), "k.weight": (0, 1), "v.weight": (0, 1), "o.weight": (1, 1)},
            "heads",
        ),
    ],
    "gpt2": [
        (
            ["transformer.h.0.mlp.", "transformer.h.1.mlp."],
            {"c_fc.weight": (1, 1), "c_fc.bias": (0, 1), "c_proj.weight": (0, 1)},
            "units",
        ),
        (
            ["transformer.h.0.attn.", "transformer.h.1.attn."],
            {"c_attn.weight": (1, 3), "c_attn.bias": (0, 3), "c_proj.weight": (0, 1)},
            "heads",
        ),
    ],
    "llama": [
        (
            ["model.layers.0.mlp.", "model.layers.1.mlp."],
            {"gate_proj.weight": (0, 1), "up_proj.weight": (0, 1), "down_proj.weight": (1, 1)},
            "units",
        )
    ],
    "llama-mha": [
        (
            ["model.layers.0.self_attn.", "model.layers.1.self_attn."],
            {"q_proj.weight": (0, 1), "k_proj.weight": (0, 1), "v_proj.weight": (0, 1), "o_proj.weight": (1, 1)},
            "heads",
        )
    ],
}
LAYOUTS["roberta"] = [([p.replace("bert.", "roberta.", 1) for p in ps], t, k) for ps, t, k in LAYOUTS["bert"]]
LAYOUTS["deberta-v2"] = [
    (
        [p.replace("bert.", "deberta.", 1) for p in ps],
        {n.replace("query.", "query_proj.").replace("key.", "key_proj.").replace("value.", "value_proj."): a
         for n, a in t.items()},
        k,
    )
    for ps, t, k in LAYOUTS["bert"]
]  # fmt: skip
LAYOUTS["deberta-v2-apart"] = [
    LAYOUTS["deberta-v2"][0],
    (
        LAYOUTS["deberta-v2"][1][0],
        LAYOUTS["deberta-v2"][1][1]
        | {f"self.pos_{n}_proj.{k}": (0, 1) for n in ("key", "query") for k in ("weight", "bias")},
        "heads",
    ),
]
LAYOUTS["mpnet"] = [([p.replace("bert.", "mpnet.", 1) for p in LAYOUTS["bert"][0][0]], *LAYOUTS["bert"][0][1:])]
LAYOUTS["qwen2"] = LAYOUTS["llama"]
LAYOUTS["llama-mha"] += LAYOUTS["llama"]


def make(name: str, seed: int = 0, heads: int = 2) -> Any:
    """A tiny model, with ``heads`` heads of width 16 / heads; two variants beside the usual architectures."""
    architecture = name.removesuffix("-mha").removesuffix("-apart")
    if architecture == name and heads == 2:
        model = make_model(name, seed)
    else:
        torch.manual_seed(seed)
        make_config, model_class = ARCHITECTURES[architecture]
        config = make_config()
        config.num_attention_heads = heads
        if name == "llama-mha":
            config.num_key_value_heads, config.head_dim = heads, 16 // heads
        if name == "deberta-v2-apart":
            config.share_att_key = False
        model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def permuted(state: dict[str, Tensor], name: str, heads: int = 2, seed: int = 5) -> dict[str, Tensor]:
    """The state of a model that computes the same with its units in another order."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: tensor.clone() for key, tensor in state.items()}
    for prefixes, tensors, kind in LAYOUTS[name]:
        for prefix in prefixes:
            (last, (axis, _)) = list(tensors.items())[-1]
            width = state[prefix + last].shape[axis]
            if kind == "units":
                order = torch.randperm(width, generator=generator)
            else:  # reversed, so that every head (of two, or but the middle one) moves
                order = torch.arange(width).view(heads, -1).flip(0).flatten()
            for end, (axis, copies) in tensors.items():
                whole = torch.cat([order + copy * width for copy in range(copies)])
                state[prefix + end] = state[prefix + end].index_select(axis, whole)
    return state


def outputs(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def save_pair(tmp_path: Path, name: str, heads: int = 2) -> tuple[Path, Path, Any]:
    model = make(name, heads=heads)
    model.save_pretrained(tmp_path / "one")
    expected = outputs(model)
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = permuted(original, name, heads)
    changed = [key for key in state if not torch.equal(state[key], original[key])]
    assert len(changed) == len({p + end for prefixes, ends, _ in LAYOUTS[name] for p in prefixes for end in ends})
    model.load_state_dict(state)
    assert torch.allclose(outputs(model), expected, atol=1e-5)  # the oracle: the same function
    model.save_pretrained(tmp_path / "two")
    return tmp_path / "one", tmp_path / "two", expected


def provenance(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "provenance.json").read_text())["tensors"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *((name, 2) for name in (*ARCHITECTURES, "llama-mha", "deberta-v2-apart")),
        *((name, 4) for name in ("bert", "distilbert", "gpt2", "llama-mha", "deberta-v2-apart")),
    ],
)
def test_a_model_and_its_permuted_copy_merge_to_the_model(tmp_path: Path, name: str, heads: int) -> None:
    one, two, expected = save_pair(tmp_path, name, heads)
    out = merge([one, two], tmp_path / "out", method="ot", coefficients=[1, 3])
    original, merged = load_file(one / "model.safetensors"), load_file(out / "model.safetensors")
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, original[key], rtol=0, atol=1e-5, msg=key)
    opened = type(make(name, heads=heads)).from_pretrained(out).eval()
    assert torch.allclose(outputs(opened), expected, atol=1e-4)

    simple = load_file(merge([one, two], tmp_path / "simple", method="simple") / "model.safetensors")
    moving = {p + end for prefixes, ends, _ in LAYOUTS[name] for p in prefixes for end in ends}
    used = provenance(out)
    assert {key for key, entry in used.items() if entry["method"] == "ot"} == moving
    for key, entry in used.items():
        if key in moving:
            assert not torch.allclose(simple[key], original[key], atol=1e-2), key
            assert "moved" in entry["note"]
        else:
            assert entry["method"] == "average" and entry["reason"], key


def test_the_middle_of_three_follows_the_first_and_the_average_is_weighted(tmp_path: Path) -> None:
    """Against an average, made by hand, of models that are near each other before one of them is permuted."""
    model = make("bert")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    near = [{key: t + 0.01 * torch.randn(t.shape, generator=generator) for key, t in state.items()} for _ in range(3)]
    for number, values in enumerate((near[0], permuted(near[1], "bert"), permuted(near[2], "bert", seed=9))):
        model.load_state_dict(values)
        model.save_pretrained(tmp_path / str(number))
    c = [1.0, 2.0, 5.0]
    out = merge([tmp_path / str(i) for i in range(3)], tmp_path / "out", method="ot", coefficients=c)
    for key, tensor in load_file(out / "model.safetensors").items():
        expected = sum(ci * n[key].double() for ci, n in zip(c, near, strict=True)) / sum(c)
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "end", "reason"),
    [
        ("llama", "self_attn.q_proj.weight", "grouped-query"),
        ("qwen2", "self_attn.k_proj.bias", "grouped-query"),
        ("mpnet", "attention.attn.o.weight", "relative position bias"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q.weight", "relative position bias"),
        ("bert", "word_embeddings.weight", "not of a hidden unit"),
        ("bert", "intermediate.LayerNorm", None),
    ],
)
def test_what_is_averaged_says_why(tmp_path: Path, name: str, end: str, reason: str | None) -> None:
    make(name).save_pretrained(tmp_path / "one")
    out = merge([tmp_path / "one"] * 2, tmp_path / "out", method="ot")
    entries = [entry for key, entry in provenance(out).items() if key.endswith(end)]
    assert bool(entries) == (reason is not None)
    assert all(entry["method"] == "average" and reason in entry["reason"] for entry in entries)


def test_heads_can_be_switched_off(tmp_path: Path) -> None:
    one, two, _ = save_pair(tmp_path, "bert")
    used = provenance(merge([one, two], tmp_path / "out", method="ot", options={"heads": False}))
    name = "bert.encoder.layer.0.attention.self.key.bias"
    assert used[name]["method"] == "average" and "switched off" in used[name]["reason"]
    assert used["bert.encoder.layer.0.intermediate.dense.bias"]["method"] == "ot"


@pytest.mark.parametrize("excluded", ["intermediate.dense.bias", "intermediate.dense.weight", "output.dense.weight"])
def test_a_block_is_matched_whole_or_not_at_all(tmp_path: Path, excluded: str) -> None:
    """With a tensor excluded, permuting the others would break the block."""
    one, two, _ = save_pair(tmp_path, "bert")
    pattern = f"bert.encoder.layer.0.{excluded}"
    used = provenance(merge([one, two], tmp_path / "out", method="ot", exclude=[pattern]))
    for end in ("intermediate.dense.bias", "intermediate.dense.weight", "output.dense.weight"):
        assert used[f"bert.encoder.layer.0.{end}"]["method"] == "average"
        assert used[f"bert.encoder.layer.1.{end}"]["method"] == "ot"


def test_a_norm_over_all_heads_keeps_them_in_place(tmp_path: Path) -> None:
    config = transformers.Olmo2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path / "one")
    used = provenance(merge([tmp_path / "one"] * 2, tmp_path / "out", method="ot"))
    entry = used["model.layers.0.self_attn.q_proj.weight"]
    assert entry["method"] == "average" and "norm" in entry["reason"]
    assert used["model.layers.0.mlp.gate_proj.weight"]["method"] == "ot"


def test_an_architecture_without_a_known_block_is_an_error(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "one")
    with pytest.raises(RecipeError, match="can treat no tensor"):
        merge([tmp_path / "one"] * 2, tmp_path / "out", method="ot")
    assert not (tmp_path / "out").exists()


def test_without_pot_the_command_is_said_before_any_work(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(RecipeError, match="pip install POT"):
        merge([save_model("one")] * 2, tmp_path / "out", method="ot")


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    one, two, _ = save_pair(tmp_path, "bert")
    first, second = (merge([one, two], tmp_path / f"out-{n}", method="ot", threads=n) for n in (1, 4))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_match_is_the_best_of_all_permutations(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    reference, features = rng.normal(size=(2, count, 3))
    order = match(torch.from_numpy(reference), torch.from_numpy(features)).numpy()
    assert sorted(order) == list(range(count))

    def cost(chosen: Any) -> float:
        return float(np.square(reference - features[list(chosen)]).sum())

    best = min(cost(chosen) for chosen in itertools.permutations(range(count)))
    assert cost(order) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_match_agrees_with_the_hungarian_algorithm(scale: float) -> None:
    rng = np.random.default_rng(3)
    reference, features = scale * rng.normal(size=(2, 60, 10))
    cost = np.square(reference[:, None] - features[None]).sum(-1)
    order = match(torch.from_numpy(reference), torch.from_numpy(features)).numpy()
    np.testing.assert_array_equal(order, linear_sum_assignment(cost)[1])


def test_match_of_units_that_are_all_alike_is_still_a_permutation() -> None:
    order = match(torch.zeros(7, 3, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64))
    assert sorted(order.tolist()) == list(range(7))


@pytest.mark.parametrize(("shape", "axis", "fused"), [((6, 4), 0, 1), ((4, 6), 1, 1), ((4, 18), 1, 3), ((18,), 0, 3)])
def test_split_and_join(shape: tuple[int, ...], axis: int, fused: int) -> None:
    tensor = torch.arange(float(np.prod(shape))).reshape(shape)
    parts = split(tensor, UnitAxis(axis, fused), 3)
    assert parts.shape[:3] == (3, fused, 2)
    assert torch.equal(join(parts, UnitAxis(axis, fused)), tensor)
    along = tensor.movedim(axis, 0)
    assert torch.equal(parts[1, fused - 1, 0], along[(fused - 1) * 6 + 2])
