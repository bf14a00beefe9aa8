"""Random token examples for tiny models, and batches of them padded as a tokenizer would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Example = dict[str, Any]


def make_examples(model: nn.Module, count: int = 9, seed: int = 1) -> list[Example]:
    """Examples of 3 to 12 tokens that are no padding; those of an encoder-decoder with labels of 2 to 6."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()

    examples: list[Example] = []
    for _ in range(count):
        example: Example = {"input_ids": ids(3, 12)}
        if model.config.is_encoder_decoder:
            example["labels"] = ids(2, 6)
        examples.append(example)
    return examples


def collate(model: nn.Module, examples: Sequence[Example]) -> dict[str, Tensor]:
    """One batch, padded on the right; integer labels as they are."""
    pad_id = model.config.pad_token_id or 0
    ids = [example["input_ids"] for example in examples]
    batch = {"input_ids": _pad(ids, pad_id), "attention_mask": _pad([[1] * len(row) for row in ids], 0)}
    if "labels" in examples[0]:
        labels = [example["labels"] for example in examples]
        batch["labels"] = _pad(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels)
    return batch


def batched(model: nn.Module, examples: Sequence[Example], size: int) -> list[dict[str, Tensor]]:
    return [collate(model, examples[at : at + size]) for at in range(0, len(examples), size)]


def alone(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """One example without padding and without a mask."""
    return {key: torch.tensor([value]) for key, value in example.items()}


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    wide = torch.full((len(rows), max(map(len, rows))), value)
    for index, row in enumerate(rows):
        wide[index, : len(row)] = torch.tensor(row)
    return wide
