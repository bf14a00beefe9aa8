"""Checkpoints to measure with: random weights in the shape of real models, written tensor by tensor.

    python benchmarks/checkpoints.py /scratch --size 1.1B

A family is a base and contributors, each the base plus a little noise: ``base``, ``model-0``, ``model-1``, … in one
folder. Weights are seeded by tensor name, so that families come out the same on every machine with the same PyTorch.
A family that is already complete is left as it is. Nothing is ever whole in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

SHARD_BYTES = 1_000_000_000
SPARE_BYTES = 2_000_000_000  # left free on the disk beside a family
_BASE_DEVIATION, _NOISE_DEVIATION = 0.02, 0.0005
_TYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama-shaped decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int = 32000

    def shapes(self) -> Shapes:
        """Every tensor by its on-disk name."""
        hidden, keys = self.hidden, self.hidden // self.heads * self.key_heads
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for layer in range(self.layers):
            inner = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (self.intermediate, hidden),
                "mlp.up_proj": (self.intermediate, hidden),
                "mlp.down_proj": (hidden, self.intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }
            found.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()})
        return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Encoder:
    """Sizes of a BERT-shaped encoder with a classification head."""

    layers: int = 12
    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    vocabulary: int = 30522
    positions: int = 512

    def linear(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """The linear layers of the blocks, by module: the key of their input and (out, in)."""
        hidden, wide = self.hidden, self.intermediate
        found = {}
        for layer in range(self.layers):
            at = f"bert.encoder.layer.{layer}"
            for part in ("query", "key", "value"):
                found[f"{at}.attention.self.{part}"] = (f"{at}.attention.self.query", (hidden, hidden))
            for part, shape in (
                ("attention.output.dense", (hidden, hidden)),
                ("intermediate.dense", (wide, hidden)),
                ("output.dense", (hidden, wide)),
            ):
                found[f"{at}.{part}"] = (f"{at}.{part}", shape)
        return found

    def shapes(self) -> Shapes:
        """Every tensor by its on-disk name."""
        hidden = self.hidden
        found: Shapes = {
            "bert.embeddings.word_embeddings.weight": (self.vocabulary, hidden),
            "bert.embeddings.position_embeddings.weight": (self.positions, hidden),
            "bert.embeddings.token_type_embeddings.weight": (2, hidden),
        }
        linear = {module: shape for module, (_, shape) in self.linear().items()}
        linear |= {"bert.pooler.dense": (hidden, hidden), "classifier": (2, hidden)}
        for module, shape in linear.items():
            found |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
        norms = ["bert.embeddings.LayerNorm"]
        for layer in range(self.layers):
            at = f"bert.encoder.layer.{layer}"
            norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        for norm in norms:
            found |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
        return found

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "model_type": "bert",
            "architectures": ["BertForSequenceClassification"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "type_vocab_size": 2,
            "torch_dtype": "float32",
        }


#: By their number of parameters; the largest has TinyLlama's shape.
SIZES = {
    "20M": Llama(6, 256, 704, 4, 2),
    "50M": Llama(8, 512, 1408, 8, 2),
    "100M": Llama(12, 768, 2048, 12, 4, 16000),
    "200M": Llama(14, 1024, 2816, 16, 4),
    "500M": Llama(18, 1536, 4096, 24, 4),
    "1.1B": Llama(22, 2048, 5632, 32, 4),
}


def parameters(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def llama_family(scratch: Path, size: str, contributors: int = 3) -> tuple[Path, list[Path]]:
    """The base and the contributors of a size of :data:`SIZES`, bfloat16; made where they are not there yet."""
    model = SIZES[size]
    return write_family(scratch / f"llama-{size}", model.shapes(), model.config(), torch.bfloat16, contributors)


def write_family(
    folder: Path, shapes: Shapes, config: Mapping[str, Any], dtype: torch.dtype, contributors: int
) -> tuple[Path, list[Path]]:
    """Write a family with a tiny tokenizer, all its members tensor by tensor side by side.

    Raises:
        SystemExit: too little disk.
    """
    base, models = folder / "base", [folder / f"model-{number}" for number in range(contributors)]
    members, done = [base, *models], folder / f"complete-{contributors}"
    if done.exists():
        return base, models
    check_space(folder, len(members) * parameters(shapes) * dtype.itemsize)
    for member in members:
        shutil.rmtree(member, ignore_errors=True)
        member.mkdir(parents=True)
        (member / "config.json").write_text(json.dumps(config, indent=1))
        _write_tokenizer(member)
    files = list(_shards(shapes, dtype.itemsize))
    for file, names in files:
        streams = [_open(member / file, {name: shapes[name] for name in names}, dtype) for member in members]
        for name in names:
            for stream, tensor in zip(streams, _tensors(name, shapes[name], contributors), strict=True):
                stream.write(tensor.to(dtype).view(torch.uint8).numpy().data)
        for stream in streams:
            stream.close()
    if len(files) > 1:
        where = {name: file for file, names in files for name in names}
        total = {"total_size": parameters(shapes) * dtype.itemsize}
        for member in members:
            index = json.dumps({"metadata": total, "weight_map": where})
            (member / "model.safetensors.index.json").write_text(index)
    done.touch()
    return base, models


def check_space(folder: Path, needed: int) -> None:
    """Refuse to fill the disk.

    Raises:
        SystemExit: fewer than ``needed`` bytes and some to spare are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free")


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on nothing but a name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _tensors(name: str, shape: tuple[int, ...], contributors: int) -> Iterator[Tensor]:
    """The base's tensor and each contributor's; a norm's weights lie around one."""
    norm = "norm" in name.lower() and name.endswith("weight")
    base = torch.randn(shape, generator=generator(name)).mul_(_BASE_DEVIATION).add_(1.0 if norm else 0.0)
    yield base.reshape(-1)
    for number in range(contributors):
        noise = torch.randn(shape, generator=generator(f"{name} of {number}"))
        yield noise.mul_(_NOISE_DEVIATION).add_(base).reshape(-1)


def _shards(shapes: Shapes, itemsize: int) -> Iterator[tuple[str, list[str]]]:
    groups: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * itemsize
        if groups[-1] and nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= nbytes
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else "model"
        yield f"{file}.safetensors", names


def _open(path: Path, shapes: Shapes, dtype: torch.dtype) -> IO[bytes]:
    """A safetensors file with its header written, ready for the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream = path.open("wb")
    stream.write(struct.pack("<Q", len(text)) + text)
    return stream


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make families from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder to write into")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["1.1B"])
    options = parser.parse_args(arguments)
    for size in options.size:
        base, models = llama_family(options.scratch, size)
        count = parameters(SIZES[size].shapes())
        print(f"{size}: {count / 1e6:.1f} M parameters, {2 * count / 1e9:.2f} GB each")
        print("\n".join(str(path) for path in [base, *models]))


if __name__ == "__main__":
    main()
