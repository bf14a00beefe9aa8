"""Alignment undoes a permutation of hidden units and heads: biases and next inputs move with them."""

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

from conftest import ARCHITECTURES, VOCABULARY
from merganser.errors import RecipeError
from merganser.merging import merge
from merganser.methods.alignment.blocks import UnitAxis, join, split
from merganser.methods.alignment.optimal_transport import match
from merganser.methods.alignment.rebasin import best_order, match_many
from permutation_examples import LAYOUTS, make, outputs, permuted, save_pair

PAIRWISE = ("ot", "rebasin")


def provenance(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "provenance.json").read_text())["tensors"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *((name, 2) for name in (*ARCHITECTURES, "llama-mha", "deberta-v2-apart")),
        *((name, 4) for name in ("bert", "distilbert", "gpt2", "llama-mha", "deberta-v2-apart")),
    ],
)
@pytest.mark.parametrize("method", PAIRWISE)
def test_a_model_and_its_permuted_copy_merge_to_the_model(tmp_path: Path, method: str, name: str, heads: int) -> None:
    one, two, expected = save_pair(tmp_path, name, heads)
    out = merge([one, two], tmp_path / "out", method=method, coefficients=[1, 3])
    original, merged = load_file(one / "model.safetensors"), load_file(out / "model.safetensors")
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, original[key], rtol=0, atol=1e-5, msg=key)
    opened = type(make(name, heads=heads)).from_pretrained(out).eval()
    assert torch.allclose(outputs(opened), expected, atol=1e-4)

    simple = load_file(merge([one, two], tmp_path / "simple", method="simple") / "model.safetensors")
    moving = {p + end for prefixes, ends, _ in LAYOUTS[name] for p in prefixes for end in ends}
    used = provenance(out)
    assert {key for key, entry in used.items() if entry["method"] == method} == moving
    for key, entry in used.items():
        if key in moving:
            assert not torch.allclose(simple[key], original[key], atol=1e-2), key
            assert "moved" in entry["note"]
        else:
            assert entry["method"] == "average" and entry["reason"], key


@pytest.mark.parametrize(
    ("method", "options"), [("ot", {}), ("rebasin", {}), ("rebasin", {"reference": "first"})], ids=str
)
def test_the_middle_of_three_follows_the_first_and_the_average_is_weighted(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """Against an average, made by hand, of models that are near each other before one of them is permuted."""
    model = make("bert")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    near = [{key: t + 0.01 * torch.randn(t.shape, generator=generator) for key, t in state.items()} for _ in range(3)]
    for number, values in enumerate((near[0], permuted(near[1], "bert"), permuted(near[2], "bert", seed=9))):
        model.load_state_dict(values)
        model.save_pretrained(tmp_path / str(number))
    c = [1.0, 2.0, 5.0]
    out = merge([tmp_path / str(i) for i in range(3)], tmp_path / "out", method=method, coefficients=c, options=options)
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


Places = dict[str, tuple[int, int, int]]  # of each tensor: the axis of the units, copies, and numbers of a unit
GROUPED: Places = {
    "q_proj.weight": (0, 1, 8),
    "k_proj.weight": (0, 1, 4),
    "v_proj.weight": (0, 1, 4),
    "o_proj.weight": (1, 1, 8),
}
_GATED: Places = {"gate_proj.weight": (0, 1, 1), "up_proj.weight": (0, 1, 1), "down_proj.weight": (1, 1, 1)}
_FC: Places = {"fc1.weight": (0, 1, 1), "fc1.bias": (0, 1, 1), "fc2.weight": (1, 1, 1)}


def _with_bias(ends: str, last: str) -> Places:
    return {f"{e}_proj.{k}": (0, 1, 4) for e in ends for k in ("weight", "bias")} | {last: (1, 1, 4)}


#: Written out by hand: class, more of the configuration, and for each block the number of units and their places.
OTHERS: dict[str, tuple[str, dict[str, Any], list[tuple[str, int, Places]]]] = {
    "llama, grouped": (
        "Llama", {"num_key_value_heads": 3},
        [("model.layers.{}.self_attn.", 3, GROUPED), ("model.layers.{}.mlp.", 20, _GATED)],
    ),
    "qwen3, grouped": (
        "Qwen3", {"num_key_value_heads": 3, "head_dim": 4},
        [("model.layers.{}.self_attn.", 3, GROUPED), ("model.layers.{}.mlp.", 20, _GATED)],
    ),
    "gemma2": (
        "Gemma2", {"num_key_value_heads": 3, "head_dim": 4},
        [("model.layers.{}.self_attn.", 3, GROUPED), ("model.layers.{}.mlp.", 20, _GATED)],
    ),
    "phi3": (
        "Phi3", {"num_key_value_heads": 6, "pad_token_id": 0},
        [("model.layers.{}.mlp.", 20, {"gate_up_proj.weight": (0, 2, 1), "down_proj.weight": (1, 1, 1)})],
    ),
    "phi": (
        "Phi", {"num_key_value_heads": 6},
        [("model.layers.{}.mlp.", 20, _FC), ("model.layers.{}.self_attn.", 6, _with_bias("qkv", "dense.weight"))],
    ),
    "gpt-neox": (
        "GPTNeoX", {},
        [("gpt_neox.layers.{}.mlp.", 20, {
            "dense_h_to_4h.weight": (0, 1, 1), "dense_h_to_4h.bias": (0, 1, 1), "dense_4h_to_h.weight": (1, 1, 1)
        })],
    ),
    "opt": (
        "OPT", {"ffn_dim": 20, "word_embed_proj_dim": 24},
        [("model.decoder.layers.{}.", 20, _FC),
         ("model.decoder.layers.{}.self_attn.", 6, _with_bias("qkv", "out_proj.weight"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", PAIRWISE)
@pytest.mark.parametrize("name", OTHERS)
def test_blocks_of_other_architectures_and_groups_of_heads(tmp_path: Path, name: str, method: str) -> None:
    """A permuted copy computes the same, which is the oracle of the places; merged with it, a model is what it was."""
    stem, more, blocks = OTHERS[name]
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = getattr(transformers, f"{stem}Config")(vocab_size=VOCABULARY, max_position_embeddings=32, **(sizes | more))
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "one")
    expected, state = outputs(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator, moving = torch.Generator().manual_seed(1), set[str]()
    for layer in range(2):
        for place, count, tensors in blocks:
            order = torch.randperm(count, generator=generator)
            while torch.equal(order, torch.arange(count)):
                order = torch.randperm(count, generator=generator)
            for end, (axis, copies, width) in tensors.items():
                key = place.format(layer) + end
                numbers = torch.arange(copies * count * width).view(copies, count, width)[:, order].flatten()
                assert len(numbers) == state[key].shape[axis], key
                state[key] = state[key].index_select(axis, numbers)
                moving.add(key)
    model.load_state_dict(state)
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "two")
    out = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", method=method)
    original = load_file(tmp_path / "one" / "model.safetensors")
    for key, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[key], rtol=0, atol=1e-6, msg=key)
    assert {key for key, entry in provenance(out).items() if entry["method"] == method} == moving


def test_both_halves_of_a_fused_block_and_all_thirds_of_attention_move_in_modernbert(tmp_path: Path) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ModernBertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "one")
    expected, state = outputs(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    units, heads = torch.randperm(20), torch.arange(24).view(6, 4).flip(0).flatten()
    for layer in range(2):
        for end, axis, order, copies in (
            ("mlp.Wi", 0, units, 2), ("mlp.Wo", 1, units, 1), ("attn.Wqkv", 0, heads, 3), ("attn.Wo", 1, heads, 1)
        ):  # fmt: skip
            key, whole = (
                f"model.layers.{layer}.{end}.weight",
                torch.cat([order + n * len(order) for n in range(copies)]),
            )
            state[key] = state[key].index_select(axis, whole)
    model.load_state_dict(state)
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "two")
    out = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", method="rebasin")
    original = load_file(tmp_path / "one" / "model.safetensors")
    for key, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[key], rtol=0, atol=1e-6, msg=key)


def test_an_architecture_without_a_known_block_is_an_error(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32
    )
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path / "one")
    with pytest.raises(RecipeError, match=r"can treat no tensor.*\n +to mend: choose another method"):
        merge([tmp_path / "one"] * 2, tmp_path / "out", method="ot")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "module", "package"), [("ot", "ot", "POT"), ("rebasin", "scipy", "scipy")])
def test_without_its_package_the_command_is_said_before_any_work(
    save_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    module: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=f"pip install {package}"):
        merge([save_model("one")] * 2, tmp_path / "out", method=method)


@pytest.mark.parametrize("method", PAIRWISE)
def test_the_bytes_do_not_depend_on_threads(tmp_path: Path, method: str) -> None:
    one, two, _ = save_pair(tmp_path, "bert")
    first, second = (merge([one, two], tmp_path / f"out-{n}", method=method, threads=n) for n in (1, 4))
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


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_best_order_is_the_best_of_all_permutations(seed: int, count: int) -> None:
    similarity = np.random.default_rng(seed).normal(size=(count, count))
    order = best_order(torch.from_numpy(similarity), torch.arange(count)).numpy()
    assert sorted(order) == list(range(count))

    def gain(chosen: Any) -> float:
        return float(similarity[np.arange(count), list(chosen)].sum())

    assert gain(order) == pytest.approx(max(map(gain, itertools.permutations(range(count)))), rel=1e-9, abs=1e-9)


def test_by_inner_products_and_by_distances_the_order_is_the_same() -> None:
    """Σ‖a − Pb‖² = ‖a‖² + ‖b‖² − 2Σ⟨a, Pb⟩, of which only the last depends on P."""
    rng = np.random.default_rng(4)
    one, two = torch.from_numpy(rng.normal(size=(2, 40, 12)))
    assert torch.equal(best_order(one @ two.T, torch.arange(40)), match(one, two))


def test_units_that_gain_nothing_stay_where_they_are() -> None:
    alike = torch.ones(6, 3, dtype=torch.float64)
    current = torch.tensor([2, 0, 1, 5, 4, 3])
    assert torch.equal(best_order(alike @ alike.T, current), current)
    assert torch.equal(best_order(torch.zeros(6, 6, dtype=torch.float64), current), current)
    noisy = alike @ alike.T * (1 + 1e-14 * torch.randn(6, 6, dtype=torch.float64))
    assert torch.equal(best_order(noisy, current), current)


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_matching_many_ends_where_no_model_gains_by_moving(seed: int, models: int, units: int) -> None:
    """Against every permutation of each model, the others as they are: ‖Σcᵢ Pᵢθᵢ‖ is as large as it gets."""
    rng = np.random.default_rng(seed)
    rows, weights = rng.normal(size=(models, units, 3)), rng.uniform(0.5, 2, models)
    orders = match_many(lambda number: torch.from_numpy(rows[number]), weights.tolist(), 100)
    assert orders[0].tolist() == list(range(units))

    def norm(chosen: Any) -> float:
        return float(np.linalg.norm(sum(w * r[list(o)] for w, r, o in zip(weights, rows, chosen, strict=True))))

    found = norm([order.tolist() for order in orders])
    for number in range(models):
        for other in itertools.permutations(range(units)):
            chosen = [order.tolist() for order in orders]
            chosen[number] = list(other)
            assert norm(chosen) <= found + 1e-9


def test_matching_many_recovers_planted_permutations() -> None:
    rng = np.random.default_rng(1)
    origin, planted = rng.normal(size=(30, 8)), [np.arange(30), *(rng.permutation(30) for _ in range(4))]
    rows = [(origin + 0.05 * rng.normal(size=origin.shape))[order] for order in planted]
    found = match_many(lambda number: torch.from_numpy(rows[number]), [1.0] * 5, 100)
    for order, hidden in zip(found, planted, strict=True):
        np.testing.assert_array_equal(hidden[order.numpy()], np.arange(30))


def test_the_mean_finds_what_the_first_model_alone_cannot() -> None:
    """Of noisy copies more units are put right, and the mean is longer."""
    right, norms = np.zeros(2), np.zeros(2)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        origin = rng.normal(size=(25, 10))
        planted = [np.arange(25), *(rng.permutation(25) for _ in range(7))]
        rows = [torch.from_numpy((origin + 0.9 * rng.normal(size=origin.shape))[order]) for order in planted]
        by_first = [best_order(rows[0] @ row.T, torch.arange(25)) for row in rows]
        by_mean = match_many(rows.__getitem__, [1.0] * 8, 100)
        for place, orders in enumerate((by_first, by_mean)):
            pairs = zip(orders, planted, strict=True)
            right[place] += sum(int((hidden[order.numpy()] == np.arange(25)).sum()) for order, hidden in pairs)
            norms[place] += float(sum(row[order] for row, order in zip(rows, orders, strict=True)).norm())
    assert right[1] > 1.05 * right[0] and norms[1] > 1.02 * norms[0]


def test_coefficients_of_zero_and_one_contributor_move_nothing(tmp_path: Path) -> None:
    one, two, _ = save_pair(tmp_path, "bert")
    out = merge([one, two], tmp_path / "zero", method="rebasin", coefficients=[1, 0])
    alone = merge([one], tmp_path / "alone", method="rebasin")
    original = load_file(one / "model.safetensors")
    for folder in (out, alone):
        for key, tensor in load_file(folder / "model.safetensors").items():
            assert torch.equal(tensor, original[key]), key
