"""Tiny sentence-transformers models, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

sentence_transformers = pytest.importorskip("sentence_transformers")

WORDS = [
    "the", "duck", "swims", "on", "a", "lake", "while", "dogs", "run", "and", "cats", "sleep", "in", "warm", "sun",
    "red", "blue", "green", "big", "small", "fast", "slow",
]  # fmt: skip
TEXTS = [
    "the duck swims", "a duck on a lake", "dogs run", "cats sleep in the sun", "red blue green", "fast dogs run",
    "small cats", "big warm lake",
]  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip


def save_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words, written to ``folder``."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def save_bert(folder: Path, seed: int, model_class: Any = transformers.BertModel, base: Path | None = None) -> Path:
    """A tiny BERT with its tokenizer; with ``base``, that one with a little noise."""
    torch.manual_seed(seed)
    if base is not None:
        model = model_class.from_pretrained(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    else:
        model = model_class(transformers.BertConfig(**SIZES))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_encoder(folder: Path, seed: int, *behind: Callable[[], Any], base: Path | None = None, **options: Any) -> Path:
    """A sentence-transformers model: BERT, mean pooling, then what each of ``behind`` makes.

    Args:
        folder: to be written.
        seed: of the random weights.
        behind: makers of the modules behind the pooling.
        base: a folder of BERT to start from.
        options: of ``SentenceTransformer``.
    """
    from sentence_transformers.models import Pooling, Transformer

    bert = save_bert(folder.parent / f"{folder.name}-bert", seed, base=base)
    torch.manual_seed(seed)
    modules = [Transformer(str(bert)), Pooling(16), *(make() for make in behind)]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return folder


def opened(folder: Path) -> Any:
    """What sentence-transformers opens from a folder, in eval mode, from the folder alone."""
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()


def averaged(folders: Sequence[Path], weights: Sequence[float] | None = None) -> Any:
    """The first model with the weighted average of all of their weights, computed in memory in float64."""
    shares = torch.tensor(weights or [1.0] * len(folders), dtype=torch.float64)
    states: list[Mapping[str, torch.Tensor]] = [opened(folder).state_dict() for folder in folders]
    model = opened(folders[0])
    model.load_state_dict(
        {
            name: sum(w * state[name].double() for w, state in zip(shares / shares.sum(), states, strict=True))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in states[0].items()
        }
    )
    return model


def embeddings(model: Any, **options: Any) -> torch.Tensor:
    """Of the example texts: float32 (texts, width)."""
    found: torch.Tensor = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False, **options)
    return found.to_dense() if found.is_sparse else found
