"""RegMean as it is usually written: all in memory, sums of Grams and of Gram times weight, ``torch.inverse``, matmul.

    python benchmarks/naive_regmean.py OUT --alpha 0.9 MODEL MODEL…

Every model's folder has a ``grams.safetensors`` beside it in ``naive/`` with full float32 matrices by input and a
JSON of which layer has which input, so that nothing has to be unpacked. With ``--shared`` a matrix that several
layers share is inverted once, which public code does not do. What is no linear layer is averaged. Everything is
float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def regmean(weights: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """One layer: (Σ GᵢWᵢᵀ) after the inverse of ΣGᵢ.

    Args:
        weights: (out, in) of each contributor.
        grams: (in, in) of each contributor.
    """
    inverse = torch.inverse(sum_of(grams))
    return (inverse @ sum_of([gram @ weight.T for gram, weight in zip(grams, weights, strict=True)])).T


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in a new tensor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """The off-diagonals times alpha."""
    return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def merge_layers(
    weights: Sequence[Mapping[str, Tensor]],
    grams: Sequence[Mapping[str, Tensor]],
    inputs: Mapping[str, str],
    alpha: float,
    shared: bool,
) -> dict[str, Tensor]:
    """Every linear layer.

    Args:
        weights: of each contributor, by tensor name.
        grams: of each contributor, by input.
        inputs: the input of each weight.
        alpha: multiplier of off-diagonals.
        shared: whether layers of the same input are stacked and solved at once.
    """
    groups: dict[str, list[str]] = {}
    for name, key in inputs.items():
        groups.setdefault(key if shared else name, []).append(name)
    merged: dict[str, Tensor] = {}
    for names in groups.values():
        shrunk = [shrink(of[inputs[names[0]]], alpha) for of in grams]
        solved = regmean([torch.cat([model[name] for name in names]) for model in weights], shrunk)
        pieces = solved.split([weights[0][name].shape[0] for name in names])
        merged.update(zip(names, pieces, strict=True))
    return merged


def main() -> None:
    """Merge folders into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--shared", action="store_true")
    options = parser.parse_args()
    weights = [load_file(model / "model.safetensors") for model in options.models]
    files = [model / "naive" / "grams.safetensors" for model in options.models]
    grams = [load_file(file) for file in files]
    with safe_open(files[0], "pt") as file:
        inputs = json.loads(file.metadata()["inputs"])
    merged = {name: sum_of([model[name] for model in weights]) / len(weights) for name in weights[0]}
    merged |= merge_layers(weights, grams, inputs, options.alpha, options.shared)
    options.output.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, options.output / "model.safetensors")


if __name__ == "__main__":
    main()
