"""TIES and the weighted average in float64, written for clarity, to hold results against.

TIES (Yadav et al. 2023) of contributors θᵢ and a base θ₀, all with the same coefficient, one tensor at a time: of
dᵢ = θᵢ − θ₀ the k = ⌊density · n⌋ largest magnitudes are kept, and all that equal the k-th; the sign of Σdᵢ is elected,
plus where it is 0; and θ = θ₀ + the mean of those dᵢ ≠ 0 that have this sign.

A float64 answer is not always the only right one, so a number that differs from it is looked at again:

ties      magnitudes equal to the k-th largest are many where weights are bfloat16, and the method does not say which
          of them to keep, nor which sign wins where Σdᵢ = 0: the result is right for another choice
boundary  the answer lies halfway between two bfloat16 numbers but for the rounding of float32 sums

    python benchmarks/ties_reference.py RESULT MODEL MODEL… --base BASE --density 0.5
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

PIECE = 1 << 22  # numbers at a time
_TIED = 2.0**-22  # magnitudes closer than this, relative, may be equal in float32
_ROUNDING = 8 * 2.0**-24  # of float32 sums, relative to the largest number that goes in


def compare(result: Path, models: Sequence[Path], base: Path | None, density: float) -> dict[str, int]:
    """Hold every tensor of a bfloat16 result against the float64 reference.

    Args:
        result: the folder to judge.
        models: the contributors.
        base: for TIES; None for the average.
        density: share of each task vector that TIES keeps.

    Returns:
        How many ``numbers`` there are, how many ``differ`` from the reference rounded to bfloat16, and of those,
        how many are explained by ``ties``, by a rounding ``boundary``, and ``unexplained``.

    Raises:
        SystemExit: the result lacks a tensor.
    """
    found = dict.fromkeys(("numbers", "differ", "ties", "boundary", "unexplained"), 0)
    places = [tensor_files(folder) for folder in ([base] if base else []) + list(models)]
    ours = tensor_files(result)
    if set(ours) != set(places[0]):
        raise SystemExit(f"{result.name} has other tensors than the inputs")
    for name in places[0]:
        judged, *stored = (_read(place, name) for place in [ours, *places])
        thresholds = [_threshold(x, stored[0], density) for x in stored[1:]] if base else []
        found["numbers"] += judged.numel()
        for at in range(0, judged.numel(), PIECE):
            inputs = torch.stack([x[at : at + PIECE].double() for x in stored])
            piece = judged[at : at + PIECE]
            for key, count in _judge(piece, inputs, thresholds, base is not None).items():
                found[key] += count
    return found


def ties(inputs: Tensor, keep: Tensor, zero_sign: float = 1.0, zero: float = 0.0) -> Tensor:
    """The merge of one piece.

    Args:
        inputs: (1 + contributors, n) float64, the base first.
        keep: (contributors, n), what is left after trimming.
        zero_sign: the sign where Σdᵢ = 0; 0 leaves the base there.
        zero: sums up to here count as 0, relative to the largest number that goes in.
    """
    trimmed = (inputs[1:] - inputs[0]).where(keep, 0.0)
    total = trimmed.sum(0)
    sign = torch.where(total.abs() <= zero * inputs.abs().amax(0), zero_sign, total.sign())
    elected = (trimmed.sign() == sign) & (trimmed != 0)
    return inputs[0] + trimmed.where(elected, 0.0).sum(0) / elected.sum(0).clamp_min(1)


def _judge(piece: Tensor, inputs: Tensor, thresholds: Sequence[float], trimmed: bool) -> dict[str, int]:
    if not trimmed:
        wanted = inputs.mean(0)
        differ = piece != wanted.to(piece.dtype)
        near = _near(piece, wanted, inputs)
        return _counts(differ, torch.zeros_like(differ), near)
    magnitudes = (inputs[1:] - inputs[0]).abs()
    limits = torch.tensor(thresholds, dtype=torch.float64)[:, None]
    keep = magnitudes >= limits
    wanted = ties(inputs, keep)
    differ = piece != wanted.to(piece.dtype)
    if not bool(differ.any()):
        return {}
    at = differ.nonzero()[:, 0]  # only these are looked at again
    piece, inputs, keep, wanted = piece[at], inputs[:, at], keep[:, at], wanted[at]
    tied = (magnitudes[:, at] - limits).abs() <= _TIED * limits
    explained = torch.zeros(len(at), dtype=torch.bool)
    for choice in itertools.product((False, True), repeat=len(keep)):
        chosen = torch.where(tied, torch.tensor(choice)[:, None], keep)
        for zero_sign in (-1.0, 0.0, 1.0):
            other = ties(inputs, chosen, zero_sign, _ROUNDING)
            explained |= _near(piece, other, inputs)
    near = _near(piece, wanted, inputs)
    return _counts(torch.ones_like(near), explained & ~near, near)


def _counts(differ: Tensor, tied: Tensor, near: Tensor) -> dict[str, int]:
    masks = {"differ": differ, "ties": differ & tied, "boundary": differ & near, "unexplained": differ & ~tied & ~near}
    return {key: int(mask.sum()) for key, mask in masks.items()}


def _near(piece: Tensor, wanted: Tensor, inputs: Tensor) -> Tensor:
    """Whether numbers are ``wanted`` rounded, give or take what float32 sums lose."""
    _, exponent = torch.frexp(wanted)
    half = torch.ldexp(torch.ones_like(wanted), (exponent - 9).clamp_min(-134))  # half a unit in the last of 8 places
    return (piece.double() - wanted).abs() <= half + _ROUNDING * inputs.abs().amax(0)


def _threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    """The k-th largest magnitude of a task vector; infinite where none is kept."""
    magnitudes = (tensor.double() - base.double()).abs_().numpy()
    kept = int(density * magnitudes.size)
    if kept == 0:
        return float("inf")
    place = magnitudes.size - kept
    magnitudes.partition(place)
    return float(np.float64(magnitudes[place]))


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _read(places: dict[str, Path], name: str) -> Tensor:
    with safe_open(places[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.reshape(-1)


def main() -> int:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--density", type=float, default=0.5)
    options = parser.parse_args()
    found = compare(options.result, options.models, options.base, options.density)
    print("\n".join(f"{key:12}{count:15,}" for key, count in found.items()))
    return 1 if found["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main())
