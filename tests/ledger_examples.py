"""Filling ledgers, solving them and comparing what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from merganser.merging import ledger
from merganser.statistics import FILE_NAME, Statistics, write_statistics

Family = Callable[..., tuple[Path, list[Path]]]


def fill(folder: Path, base: Path, models: Sequence[Path], c: Sequence[float], **settings: object) -> Path:
    ledger.init(folder, base, **settings)  # type: ignore[arg-type]
    for model, coefficient in zip(models, c, strict=True):
        ledger.add(folder, model, coefficient=coefficient)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def solved(folder: Path, output: Path, **settings: object) -> dict[str, torch.Tensor]:
    return weights(ledger.solve(folder, output, dtype="F64", **settings))  # type: ignore[arg-type]


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor, in the Frobenius norm."""
    assert set(found) == set(wanted)
    parts = [(found[n].double() - t.double(), t.double()) for n, t in wanted.items() if t.is_floating_point()]
    return max(float(d.norm() / t.norm().clamp_min(1e-300)) for d, t in parts)


def drop_layer(model: Path, weight: str) -> None:
    """Rewrite statistics as if this layer had none."""
    statistics = Statistics.open(model)
    header = statistics.header
    kept = tuple(layer for layer in header.layers if layer.weight != weight)
    (gone,) = [layer for layer in header.layers if layer.weight == weight]
    assert gone.input not in [layer.input for layer in kept]
    drop = (f"gram.{gone.input}", f"mean.{gone.input}")
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors if name not in drop}
    write_statistics(model / FILE_NAME, header.model_copy(update={"layers": kept}), tensors)
