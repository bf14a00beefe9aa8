"""Which mixtures of experts can be made of which dense models, and how their tensors and configurations are called.

A dense model of any of these kinds computes, in each layer, attention and then a gated feed-forward block. In the
mixture the block is there once for each expert, with a router that weighs them; everything else is the dense model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.errors import RecipeError
from merganser.merging.moe.config import MoeConfig

#: What the dense model's configuration says that the mixture's says likewise.
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
#: The matrices of a gated feed-forward block, as dense models call them.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class Architecture:
    """A mixture of experts that transformers knows.

    Attributes:
        name: as mergekit has it; recipes name it by its beginning.
        dense: the model types that it can be made of.
        stem: of its classes in transformers, such as ``Mixtral`` of ``MixtralForCausalLM``.
        block: a layer's feed-forward block.
        matrices: how the matrices of an expert are called there, by their names in the dense model.
        shared: it has one expert that works on every token, beside the others.
    """

    name: str
    dense: tuple[str, ...]
    stem: str
    block: str
    matrices: Mapping[str, str]
    shared: bool = False

    @property
    def router(self) -> str:
        """The name of a layer's router."""
        return f"{self.block}.gate.weight"

    @property
    def shared_router(self) -> str:
        """The name of what weighs the shared expert."""
        return f"{self.block}.shared_expert_gate.weight"

    def matrix(self, expert: int | None, matrix: str) -> str:
        """The name of a matrix of an expert, in a layer; None is the shared expert."""
        place = "shared_expert" if expert is None else f"experts.{expert}"
        return f"{self.block}.{place}.{self.matrices[matrix]}.weight"


_PLAIN = {GATE: GATE, UP: UP, DOWN: DOWN}
ARCHITECTURES = (
    Architecture("Mixtral", ("llama", "mistral"), "Mixtral", "block_sparse_moe", {GATE: "w1", DOWN: "w2", UP: "w3"}),
    Architecture("Qwen MoE", ("qwen2", "llama", "mistral"), "Qwen2Moe", "mlp", _PLAIN, shared=True),
    Architecture("Qwen3 MoE", ("qwen3",), "Qwen3Moe", "mlp", _PLAIN),
)


def choose_architecture(config: MoeConfig, model_type: str, where: str) -> Architecture:
    """The architecture of the result: the one that is asked for, or the first that fits.

    Args:
        config: of the mixture.
        model_type: of the base model.
        where: for messages.

    Raises:
        RecipeError: none fits, with the reason of each.
    """
    wanted = (config.architecture or "").lower()
    known = [one for one in ARCHITECTURES if one.name.lower().startswith(wanted)]
    names = ", ".join(one.name for one in ARCHITECTURES)
    if not known:
        what = f"the architecture {config.architecture!r} is none that is written here"
        raise RecipeError(what, where=where, mend=f"give the beginning of one of {names}, or leave it out")
    reasons = {one.name: _reason(one, config, model_type) for one in known}
    fitting = [one for one in known if reasons[one.name] is None]
    if not fitting:
        said = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        what = f"no architecture fits a base model of type {model_type!r}: {said}"
        raise RecipeError(what, where=where, mend=f"give models and shared experts for one of {names}")
    return fitting[0]


def _reason(architecture: Architecture, config: MoeConfig, model_type: str) -> str | None:
    """Why an architecture does not fit; None where it does."""
    if model_type not in architecture.dense:
        return f"is made of {' or '.join(architecture.dense)}"
    if architecture.shared and len(config.shared_experts) != 1:
        return f"has exactly one of shared_experts (not {len(config.shared_experts)})"
    if not architecture.shared and config.shared_experts:
        return "has no shared_experts"
    return None


def new_configuration(
    architecture: Architecture, dense: Any, widths: Sequence[int], shared_width: int | None, per_token: int, where: str
) -> dict[str, Any]:
    """The values of ``config.json`` of the mixture.

    Args:
        architecture: of the mixture.
        dense: transformers' configuration of the base model.
        widths: the hidden units of each expert, which are as many.
        shared_width: those of the shared expert, where there is one.
        per_token: how many experts work on each token.
        where: the base model, for messages.

    Raises:
        RecipeError: its sliding windows differ between layers in a way that the mixture cannot say.
    """
    import transformers

    width, count = widths[0], len(widths)
    values: dict[str, Any] = {key: getattr(dense, key) for key in _SHARED if hasattr(dense, key)}
    values |= {"num_experts_per_tok": per_token, "intermediate_size": width}
    values |= _attention(architecture, dense, where)
    if architecture.stem == "Mixtral":
        values |= {"num_local_experts": count}
    else:
        values |= {"num_experts": count, "moe_intermediate_size": width, "decoder_sparse_step": 1}
        values |= {"norm_topk_prob": True, "mlp_only_layers": []}
    if shared_width is not None:
        values |= {"shared_expert_intermediate_size": shared_width}
    made = getattr(transformers, f"{architecture.stem}Config")(**values)
    made.architectures = [f"{architecture.stem}ForCausalLM"]
    found: dict[str, Any] = json.loads(made.to_json_string(use_diff=True))
    return found


def _attention(architecture: Architecture, dense: Any, where: str) -> dict[str, Any]:
    """What the mixture's configuration says of biases and of windows, so that attention is the dense model's."""
    windows = _windows(dense)
    if architecture.stem == "Qwen2Moe":
        sizes = {window for window in windows if window is not None}
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        bias = dense.model_type == "qwen2" or bool(getattr(dense, "attention_bias", False))
        sliding = {"use_sliding_window": bool(sizes), "sliding_window": max(sizes, default=None)}
        return {**sliding, "layer_types": kinds, "qkv_bias": bias}
    if len(set(windows)) > 1:
        what = f"some layers attend to a sliding window and some to everything, which {architecture.name} cannot say"
        raise RecipeError(what, where=where, mend="give a base model whose layers are all of one kind")
    if architecture.stem == "Mixtral":
        return {"sliding_window": windows[0]}
    sliding = {"use_sliding_window": windows[0] is not None, "sliding_window": windows[0]}
    return {**sliding, "attention_bias": bool(dense.attention_bias)}


def _windows(dense: Any) -> list[int | None]:
    """The sliding window of each layer of a dense model; None where it attends to everything before."""
    window, kinds = getattr(dense, "sliding_window", None), getattr(dense, "layer_types", None)
    if not kinds:
        return [window] * dense.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
