"""Tiny models with tokenizers of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = [f"w{number}" for number in range(37)]
TOKENS = ["[UNK]", "[PAD]", "[EOS]", *WORDS]  # 40 of them


def give_tokenizer(folder: Path, tokens: Sequence[str], added: Sequence[str] = (), **settings: Any) -> None:
    """Write a tokenizer whose ids are the places in ``tokens``; those in ``added`` are added tokens after them."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_tokens([AddedToken(token, normalized=False) for token in added])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **(names | settings)).save_pretrained(folder)


def llama(rows: int, **more: Any) -> Any:
    settings = {
        "vocab_size": rows, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | more)))


def write_model(
    folder: Path,
    seed: int,
    rows: int = 40,
    tokens: Sequence[str] | None = TOKENS,
    added: Sequence[str] = (),
    build: Callable[..., Any] = llama,
    **more: Any,
) -> Path:
    """A tiny untied Llama of random numbers with a tokenizer, or none."""
    torch.manual_seed(seed)
    model = build(rows, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokens is not None:
        give_tokenizer(folder, tokens, added)
    return folder
