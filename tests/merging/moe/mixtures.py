"""Tiny dense decoders, mixtures of them, and what a model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

Save = Callable[..., Path]


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama-tied": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"tie_word_embeddings": True, "head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama3": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 3}),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8, "attention_bias": True}),
}


ONE, TWO, NOT = "the movie was good", "Anna saw Paris", "I liked the food"


def mixture(base: Path, *experts: Path, **more: Any) -> dict[str, Any]:
    prompts: list[dict[str, Any]] = [
        {"positive_prompts": [ONE, "yes"]},
        {"positive_prompts": [TWO], "negative_prompts": [NOT]},
        {"positive_prompts": ["no"]},
    ]
    entries = [{"source_model": str(expert), **said} for expert, said in zip(experts, prompts, strict=False)]
    return {"base_model": str(base), "experts": entries, **more}


def opened(folder: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits
