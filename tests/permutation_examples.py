"""Models whose hidden units and heads were put in another order by hand: they compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conftest import ARCHITECTURES, VOCABULARY, make_model

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
