"""The bytes of merges, kept: a change of the code that changes a number of any method shows here.

The contributors are made of numpy's numbers, and the Gram matrices of whole numbers, so that nothing depends on the
machine but the merge itself. After a change that is meant, write the file anew:

    python tests/merging/test_bytes.py
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    sys.path.remove(str(Path(__file__).parent))  # whose conftest is another

from conftest import make_model
from merganser.checkpoints import Checkpoint, open_checkpoint
from merganser.checkpoints.layers import describe_layers
from merganser.merging import merge
from merganser.statistics import FILE_NAME, LayerStatistics, StatisticsHeader, write_statistics
from merganser.tensors import pack_upper

KEPT = Path(__file__).with_suffix(".json")
ROWS = 256  # of the inputs that Gram matrices are made of: a power of two, so that their means are exact
METHODS: dict[str, dict[str, Any]] = {
    "simple": {},
    "fisher": {},
    "regmean": {},
    "regmean-published": {"alpha": 0.1, "augment_bias": False, "embeddings": False},
    "regmean-full": {"alpha": 1.0, "ridge": 1e-3},
    "actmat": {},
    "task_arithmetic": {},
    "ties": {},
    "ties-dense": {"density": 0.7, "scale": 0.9},
    "ot": {},
}
FAMILIES = {"bert": "F32", "gpt2": "F32", "llama": "BF16"}
#: ACTMat's biases, norms and embeddings may be merged better than by the average; its weights stay as they are.
WEIGHTS_ALONE = ("actmat",)


def write_family(root: Path, architecture: str, dtype: str) -> tuple[Path, list[Path]]:
    """A base and three contributors with statistics, of numbers that do not depend on the machine."""
    model = make_model(architecture)
    folders = []
    for number in range(4):
        folder = root / f"{architecture}-{number}"
        model.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        draw = np.random.default_rng(7)
        change = np.random.default_rng(100 + number)
        tensors = {}
        for name in sorted(stored):
            values = draw.standard_normal(stored[name].shape)
            if number:
                values = values + 0.1 * change.standard_normal(stored[name].shape)
            tensors[name] = torch.from_numpy(values.astype(np.float32)).to(
                torch.bfloat16 if dtype == "BF16" else torch.float32
            )
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if number:
            write_exact_statistics(open_checkpoint(folder), folder / FILE_NAME, number)
        folders.append(folder)
    return folders[0], folders[1:]


def write_exact_statistics(checkpoint: Checkpoint, path: Path, seed: int) -> None:
    draw, gradients = np.random.default_rng(1000 + seed), np.random.default_rng(2000 + seed)
    layers, tensors = [], {}
    for layer in describe_layers(checkpoint):
        shape = checkpoint.tensors[layer.weight].shape
        linear = layer.kind != "embedding"
        layers.append(
            LayerStatistics(
                module=layer.module, kind=layer.kind, weight=layer.weight, bias=layer.bias, tied=layer.tied,
                input=layer.module if linear else None, rows=ROWS,
                output=f"{layer.module}:output" if linear else None, output_rows=ROWS if linear else 0,
            )
        )  # fmt: skip
        if linear:
            inputs = draw.integers(-8, 9, (ROWS, shape[0] if layer.kind == "conv1d" else shape[1]))
            gram = (inputs.T @ inputs) / ROWS
            tensors[f"gram.{layer.module}"] = pack_upper(torch.from_numpy(gram.astype(np.float32)))
            tensors[f"mean.{layer.module}"] = torch.from_numpy((inputs.sum(0) / ROWS).astype(np.float32))
            outputs = gradients.integers(-8, 9, (ROWS, shape[1] if layer.kind == "conv1d" else shape[0]))
            gram = (outputs.T @ outputs) / ROWS
            tensors[f"gram.{layer.module}:output"] = pack_upper(torch.from_numpy(gram.astype(np.float32)))
            tensors[f"mean.{layer.module}:output"] = torch.zeros(outputs.shape[1])
        else:
            tensors[f"count.{layer.module}"] = torch.from_numpy(draw.integers(0, 9, shape[0]))
    for name, info in checkpoint.tensors.items():
        tensors[f"fisher.{name}"] = torch.from_numpy(draw.integers(0, 64, info.shape).astype(np.float32) / 64)
    header = StatisticsHeader(
        layers=tuple(layers),
        manifest_sha256=checkpoint.manifest_sha256(),
        tensor_sha256={name: checkpoint.sha256(name) for name in checkpoint.tensors},
        examples=ROWS, tokens=ROWS, masking="none", fisher="expected", fisher_examples=ROWS,
        protocol=5, kfac="expected", kfac_examples=ROWS,
    )  # fmt: skip
    write_statistics(path, header, tensors)


def hashes(root: Path, architecture: str) -> dict[str, str]:
    """A hash of all tensors for each method."""
    base, models = write_family(root, architecture, FAMILIES[architecture])
    layers = {layer.weight for layer in describe_layers(open_checkpoint(base)) if layer.kind != "embedding"}
    found = {}
    for title, options in METHODS.items():
        method = title.split("-")[0]
        needs_base = method in ("actmat", "task_arithmetic", "ties")
        out = merge(
            models, root / f"{architecture}-{title}", method=method, options=options, coefficients=[1, 2, 0.5],
            base=base if needs_base else None,
        )  # fmt: skip
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(out / "model.safetensors").items()):
            if method not in WEIGHTS_ALONE or name in layers:
                digest.update(name.encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        found[title] = digest.hexdigest()
    return found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_merges_are_the_same_bytes_as_ever(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("ot", reason="POT is not installed: pip install 'merganser[ot]'")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))[architecture]
    assert hashes(tmp_path, architecture) == kept


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        written = {architecture: hashes(Path(scratch), architecture) for architecture in FAMILIES}
    KEPT.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    sys.stderr.write(f"wrote {KEPT.name}\n")
