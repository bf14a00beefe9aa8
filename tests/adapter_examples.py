"""PEFT folders written by hand, and what they mean, computed in numpy from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "task_type": None,
}  # fmt: skip


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], base: Path | str | None = None, **config: Any
) -> Path:
    """A PEFT folder with these tensors (without the prefix of their names); a base beside it is named as such."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = isinstance(base, Path) and base.parent == folder.parent
    name = None if base is None else base.name if beside else str(base)
    settings = {**CONFIG, "base_model_name_or_path": name, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({PREFIX + name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def factors(module: str, out: int, width: int, rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random factors of a layer, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": 0.2 * torch.randn(rank, width, generator=generator),
        f"{module}.lora_B.weight": 0.2 * torch.randn(out, rank, generator=generator),
    }


def adapt_linears(
    folder: Path, base: Path, modules: tuple[str, ...], rank: int = 3, seed: int = 0, **config: Any
) -> Path:
    """An adapter of every weight of the base whose module ends in one of ``modules``."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, weight) in enumerate(load_file(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(modules):
            out, width = weight.shape[::-1] if config.get("fan_in_fan_out") else weight.shape
            tensors |= factors(module, out, width, rank, 1000 * seed + number)
    assert tensors
    return write_adapter(folder, tensors, base, **{"r": rank, "lora_alpha": 2 * rank, **config})


def oracle(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What a linear-layer adapter makes of its base, in float64; for same names, one rank, no patterns."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    files = {
        n.removeprefix(PREFIX): t.double().numpy() for n, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    state = {n: t.double().numpy().copy() for n, t in load_file(base / "model.safetensors").items()}
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings["use_rslora"] else rank)
    for name, a in files.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            delta = scale * files[f"{module}.lora_B.weight"] @ a
            state[f"{module}.weight"] += delta.T if settings["fan_in_fan_out"] else delta
        elif ".lora_" not in name:
            state[name] = a
    return state


def materialise(folder: Path, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The full checkpoint that an adapter on its base means."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    state = {name: torch.from_numpy(array).to(dtype) for name, array in oracle(base, adapter).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
