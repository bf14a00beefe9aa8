"""Adapters merged with one another, without their base: exact in ΔW, and an adapter that PEFT opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from adapter_examples import PREFIX, adapt_linears
from conftest import ARCHITECTURES
from merganser.merging import merge, reproduce, verify

Save = Callable[..., Path]
TARGETS = {
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "bert": ("query", "value", "output.dense"),
    "gpt2": ("c_attn", "c_proj"),
}


def changes(folder: Path) -> dict[str, np.ndarray]:
    """ΔW = s·BA of every module with factors, in float64, by hand."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    files = {
        n.removeprefix(PREFIX): t.double().numpy() for n, t in load_file(folder / "adapter_model.safetensors").items()
    }
    found = {}
    for name, a in files.items():
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            module = name.rpartition(".lora_")[0]
            b = files[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rank = settings["rank_pattern"].get(module, settings["r"])
            alpha = settings["alpha_pattern"].get(module, settings["lora_alpha"])
            assert a.shape[0] == b.shape[1] == rank
            found[module] = alpha / (rank**0.5 if settings["use_rslora"] else rank) * b @ a
    return found


def apart(folder: Path) -> Path:
    """The adapter as it is where its base is not: it names one that nobody has."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "somebody/a-base"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def adapters(tmp_path: Path, base: Path, architecture: str) -> list[Path]:
    """Three: another rank, another alpha, rank-stabilised, and of other modules."""
    targets = TARGETS[architecture]
    turned: dict[str, Any] = {"fan_in_fan_out": architecture == "gpt2", "target_modules": list(targets)}
    one = adapt_linears(tmp_path / "one", base, targets, 3, 1, **turned)
    two = adapt_linears(tmp_path / "two", base, targets, 2, 2, lora_alpha=5, use_rslora=True, **turned)
    turned["target_modules"] = [targets[0]]
    three = adapt_linears(tmp_path / "three", base, targets[:1], 4, 3, lora_alpha=1, **turned)
    return [one, two, three]


def weighted(parts: Sequence[dict[str, np.ndarray]], weights: Sequence[float]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: sum(w * part[n] for w, part in zip(weights, parts, strict=True) if n in part) for n in names}  # type: ignore[misc]


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=tolerance * np.abs(wanted[name]).max())


@pytest.mark.parametrize("architecture", TARGETS)
def test_sums_are_exact_and_what_peft_concatenates(save_model: Save, tmp_path: Path, architecture: str) -> None:
    base = save_model("base", architecture)
    folders = adapters(tmp_path, base, architecture)
    model = ARCHITECTURES[architecture][1].from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="one")
    theirs.load_adapter(folders[1], adapter_name="two")
    theirs.load_adapter(folders[2], adapter_name="three")
    weights = [0.7, 1.5, 2.0]
    theirs.add_weighted_adapter(["one", "two", "three"], weights, "sum", combination_type="cat")
    theirs.set_adapter("sum")
    wanted = {n: t.double() for n, t in theirs.merge_and_unload().state_dict().items()}
    parts = [changes(apart(folder)) for folder in folders]
    out = merge(folders, tmp_path / "out", method="task_arithmetic", options={"scale": 1.0}, coefficients=weights)
    assert any("without" in note or "base" in note for note in out.notes), out.notes
    close(changes(Path(out)), weighted(parts, weights))
    again = ARCHITECTURES[architecture][1].from_pretrained(base)
    state = peft.PeftModel.from_pretrained(again, Path(out)).merge_and_unload().state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-5, atol=1e-5, msg=name)
    settings = json.loads((Path(out) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "somebody/a-base" and settings["r"] == 5
    assert set(settings["rank_pattern"].values()) == {9}
    verified = verify(Path(out))
    assert verified.parents == 3 and reproduce(Path(out)) == []
