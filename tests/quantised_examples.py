"""Quantised model folders written by hand, and the numbers that they mean, computed one by one in float64."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

#: The numbers of FP4 (1 sign, 2 exponent, 1 mantissa bit) by code, as the OCP specification of MX formats lists them.
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
#: Whatever a quantisation makes of a weight: the stored tensors by what their names end in, and what they mean.
Quantised = tuple[dict[str, torch.Tensor], np.ndarray]
Quantise = Callable[[str, torch.Tensor], Quantised]


def fp8(
    name: str,
    weight: torch.Tensor,
    block: Sequence[int] | None = (16, 16),
    *,
    end: str = "_scale_inv",
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    enlarge: float = 1.0,
) -> Quantised:
    """Codes with one scale for each block of a matrix (None: one for all), the last blocks as short as they come."""
    rows, columns = weight.shape
    high, wide = block or weight.shape
    codes = torch.empty(weight.shape, dtype=dtype)
    scales = torch.empty(math.ceil(rows / high), math.ceil(columns / wide), dtype=torch.float32)
    meaning = np.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scale = weight[place].abs().max() / torch.finfo(dtype).max
            if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scale = scale.to(scale_dtype if scale_dtype != torch.uint8 else torch.float32).float()
            codes[place] = (weight[place].float() / scale).to(dtype)
            scales[i, j] = scale * enlarge
            meaning[place] = codes[place].double().numpy() * float(scales[i, j])
    stored = scales.to(scale_dtype) if scale_dtype != torch.uint8 else (torch.log2(scales) + 127).to(torch.uint8)
    return {"": codes, end: stored if block else stored.reshape(())}, meaning


def mxfp4(shape: tuple[int, int, int], seed: int = 0) -> Quantised:
    """Random experts: codes (E, out, groups, 16) of the weight (E, in, out), in groups of 32 along ``in``."""
    experts, inward, out = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out, inward // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(119, 124, (experts, out, inward // 32), generator=generator, dtype=torch.uint8)
    meaning = np.empty((experts, inward, out))
    for e in range(experts):
        for o in range(out):
            for i in range(inward):
                byte = int(blocks[e, o, i // 32, i % 32 // 2])
                code = byte >> 4 if i % 2 else byte & 15
                meaning[e, i, o] = FP4[code] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    return {"_blocks": blocks, "_scales": scales}, meaning


def write_quantised(
    folder: Path,
    source: Path,
    quantise: Quantise,
    settings: Mapping[str, Any] | None,
    *,
    which: Callable[[str], bool] = lambda name: name.endswith("_proj.weight"),
    more: Mapping[str, torch.Tensor] | None = None,
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """A quantised copy of a model folder; with shards, each tensor lies in another than the one before.

    Returns:
        What each tensor means, in float64.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = dict(more or {})
    meaning = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if which(name):
            stored, meaning[name] = quantise(name, weight)
            tensors |= {f"{name}{end}": tensor.contiguous() for end, tensor in stored.items()}
        else:
            tensors[name] = weight.to(torch.bfloat16)
            meaning[name] = tensors[name].double().numpy()
    configure(folder, settings)
    write_shards(folder, tensors, shards)
    return meaning


def configure(folder: Path, settings: Mapping[str, Any] | None, inside: str | None = None) -> None:
    """Put a quantisation into a folder's configuration, or into the part of it that is called ``inside``."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if settings is not None:
        (config.setdefault(inside, {}) if inside else config)["quantization_config"] = dict(settings)
    config["dtype"] = "bfloat16"
    file.write_text(json.dumps(config))


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Weight files, the tensors dealt out to them by turns."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    places = {name: names[n % shards] for n, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bfloat16(numbers: np.ndarray) -> torch.Tensor:
    """Numbers as they are read."""
    return torch.from_numpy(numbers).to(torch.float32).to(torch.bfloat16)


def dequantised(folder: Path, source: Path, meaning: Mapping[str, np.ndarray]) -> Path:
    """A plain BF16 folder of the same numbers."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    configure(folder, None)
    write_shards(folder, {name: bfloat16(numbers) for name, numbers in meaning.items()})
    return folder
