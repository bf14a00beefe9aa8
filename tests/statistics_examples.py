"""Random token examples for tiny models, batches of them padded as a tokenizer would, and statistics without a model.

As a script, it writes the small file of protocol 5 that the tests keep, so that every later version reads it:

    PYTHONPATH=tests python tests/statistics_examples.py tests/statistics/data/protocol-5.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merganser.statistics import LayerStatistics, Statistics, StatisticsHeader, write_statistics
from merganser.statistics.storage import compress
from merganser.tensors import pack_upper

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


def make_inputs(width: int, rows: int, seed: int) -> Tensor:
    """(rows, width) float64: correlated inputs off zero; one large, one constant, one always zero."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.9 ** torch.arange(width, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) * decay[:, None]
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing
    x += 0.05 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x += torch.randn(width, generator=generator, dtype=torch.float64)
    x[:, 0] = 20 + 5 * x[:, 0]
    x[:, 1], x[:, 2] = 1.7, 0.0
    return x


def make_statistics(
    widths: Sequence[int] = (48, 24), *, rows: int = 400, seed: int = 1, fisher: bool = True, label: str = ""
) -> Statistics:
    """Statistics of layers of these widths and an embedding of 50 rows, of weights that do not exist."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    layers = [LayerStatistics(module="emb", kind="embedding", weight="emb.weight", rows=rows)]
    counts = torch.multinomial(torch.arange(50.0), rows, replacement=True, generator=generator)
    tensors["count.emb"] = torch.bincount(counts, minlength=50)
    for number, width in enumerate(widths):
        name = f"layer.{number}"
        layers.append(LayerStatistics(module=name, kind="linear", weight=f"{name}.weight", input=name, rows=rows))
        x = make_inputs(width, rows, 100 * seed + number)
        tensors[f"gram.{name}"] = pack_upper((x.T @ x / rows).float())
        tensors[f"mean.{name}"] = x.mean(0).float()
        if fisher:
            tensors[f"fisher.{name}.weight"] = torch.rand(5, width, generator=generator) ** 4
    header = StatisticsHeader(
        layers=tuple(layers),
        manifest_sha256="0" * 64,
        tensor_sha256={layer.weight: "1" * 64 for layer in layers},
        examples=rows // 10,
        tokens=rows,
        masking="none",
        fisher="expected" if fisher else None,
        fisher_examples=rows // 10 if fisher else 0,
        label=label,
    )
    return Statistics.in_memory(header, tensors)


def with_experts(statistics: Statistics) -> tuple[StatisticsHeader, dict[str, Tensor]]:
    """The same as statistics of the second of three packed experts, and of a convolution; of protocol 4."""
    embedding, first, second = statistics.header.layers
    experts = first.model_copy(update={"expert": 1, "weight": "experts"})
    convolution = second.model_copy(update={"kind": "convolution"})
    hashes = {"emb.weight": "1" * 64, "experts": "1" * 64, convolution.weight: "1" * 64}
    changes = {"protocol": 4, "hash_kind": "blake3", "tensor_hashes": hashes}
    header = statistics.header.model_copy(update={"layers": (embedding, experts, convolution), **changes})
    return header, {name: statistics.packed(name) for name in statistics.tensors}


def with_gradients(statistics: Statistics, height: int = 5) -> tuple[StatisticsHeader, dict[str, Tensor]]:
    """The same with gradients of the linear layers' outputs, of which there are as many; of protocol 5."""
    tensors = {name: statistics.packed(name) for name in statistics.tensors}
    layers = []
    for number, layer in enumerate(statistics.header.layers):
        if layer.kind != "embedding":
            key, g = f"{layer.module}:output", make_inputs(height, 60, 7 + number)
            layer = layer.model_copy(update={"output": key, "output_rows": 60})
            tensors |= {f"gram.{key}": pack_upper((g.T @ g / 60).float()), f"mean.{key}": torch.zeros(height)}
        layers.append(layer)
    changes = {"protocol": 5, "hash_kind": "blake3", "kfac": "sampled", "kfac_examples": 6, "layers": tuple(layers)}
    return statistics.header.model_copy(update=changes), tensors


def stored(storage: str, path: Path, statistics: Statistics | None = None) -> Statistics:
    file = write_statistics(path / "s.safetensors", *compress(statistics or make_statistics(), storage))
    return Statistics.open(file)


if __name__ == "__main__":
    write_statistics(
        sys.argv[1], *with_gradients(make_statistics((24, 3), rows=200, fisher=False, label="kept for ever"))
    )
