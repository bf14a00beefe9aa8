"""The bytes of statistics files, kept: what is written, and what arithmetic on files makes of it.

All numbers are whole, or quotients by powers of two, so that nothing depends on the machine. After a change that is
meant, print the new hashes:

    python tests/statistics/test_bytes.py
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from merganser.statistics import LayerStatistics, Statistics, StatisticsHeader, write_statistics
from merganser.statistics.algebra import add, scale
from merganser.statistics.storage import compress
from merganser.tensors import pack_upper

ROWS = 256
KEPT = {
    "collected": "27f27c63750981a91926f1b7b406d20bb2d1df6eb1995925ce7ff83c173e6493",
    "bfloat16": "b182a68be78936b2ad1d15c52d5ef64bc0246a774108faefadb20885ede8eb6e",
    "float32 of bfloat16": "3a5b5bb04a571a565146bc8d0cf3fa84e2471c8a42fbb03780b607f4feb791cc",
    "added": "00e66f34d9bb920aa78151f6f930354b10709e2361556c1e63f882d4919b2ff2",
    "scaled": "72883960760a1dad4d076e4fa02d41a57521f18c0da55ad9d3ac98263853381d",
}


def exact_statistics(seed: int) -> Statistics:
    """Statistics of two layers with one input, a third layer and an embedding, of weights that do not exist."""
    draw = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {"count.emb": torch.from_numpy(draw.integers(0, 9, 50))}
    for name, width in (("a", 24), ("c", 7)):
        x = draw.integers(-8, 9, (ROWS, width))
        tensors[f"gram.{name}"] = pack_upper(torch.from_numpy((x.T @ x / ROWS).astype(np.float32)))
        tensors[f"mean.{name}"] = torch.from_numpy((x.sum(0) / ROWS).astype(np.float32))
        fisher = draw.integers(0, 64, (5, width)) / 64
        tensors[f"fisher.{name}.weight"] = torch.from_numpy(fisher.astype(np.float32))
    layers = [
        LayerStatistics(module="emb", kind="embedding", weight="emb.weight", rows=ROWS),
        *(
            LayerStatistics(module=name, kind="linear", weight=f"{name}.weight", input=seen, rows=ROWS)
            for name, seen in (("a", "a"), ("b", "a"), ("c", "c"))
        ),
    ]
    header = StatisticsHeader(
        layers=tuple(layers),
        manifest_sha256="0" * 64,
        tensor_sha256={layer.weight: "1" * 64 for layer in layers},
        examples=32,
        tokens=ROWS,
        masking="attention_mask",
        fisher="expected",
        fisher_examples=32,
        label=f"part {seed}",
    )
    return Statistics.in_memory(header, tensors)


def hashes(folder: Path) -> dict[str, str]:
    found = {}

    def write(title: str, header: StatisticsHeader, tensors: Mapping[str, Tensor]) -> Statistics:
        path = write_statistics(folder / f"{title}.safetensors", header, tensors)
        found[title] = hashlib.sha256(path.read_bytes()).hexdigest()
        return Statistics.open(path)

    one, two = exact_statistics(1), exact_statistics(2)
    file = write("collected", one.header, {name: one.packed(name) for name in one.tensors})
    small = write("bfloat16", *compress(file, "bfloat16"))
    write("float32 of bfloat16", *compress(small, "float32"))
    write("added", *add([file, two, small]))
    write("scaled", *scale(small, 2.5))
    return found


def test_files_are_the_same_bytes_as_ever(tmp_path: Path) -> None:
    assert hashes(tmp_path) == KEPT


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for title, digest in hashes(Path(scratch)).items():
            sys.stdout.write(f'    "{title}": "{digest}",\n')
