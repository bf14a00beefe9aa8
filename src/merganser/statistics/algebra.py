"""Arithmetic on statistics: what merging does to Gram matrices, and statistics of several parts as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merganser.errors import StatisticsError
from merganser.statistics.checks import layer_tensors
from merganser.statistics.format import LayerStatistics, Statistics, StatisticsHeader


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """A Gram matrix (d, d) with its off-diagonals times ``alpha`` (RegMean, Jin et al. 2023, section 3.3)."""
    shrunk = gram * alpha
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk


def augment(gram: Tensor, mean: Tensor) -> Tensor:
    """The Gram matrix (d+1, d+1) of inputs with one more component that is always 1: it solves for the bias.

    Args:
        gram: (d, d), the mean of x xᵀ.
        mean: (d,), the mean of x.
    """
    one = gram.new_ones(1, 1)
    return torch.cat([torch.cat([gram, mean[:, None]], 1), torch.cat([mean[None, :], one], 1)])


def scale(gram: Tensor, factor: float) -> Tensor:
    """A Gram matrix times ``factor``, such as a contributor's coefficient, in float32 or wider."""
    return gram.to(torch.promote_types(gram.dtype, torch.float32)) * factor


def add(parts: Sequence[Statistics]) -> tuple[StatisticsHeader, dict[str, Tensor]]:
    """Statistics of several data sets, of one checkpoint, as if they had been collected together.

    Means are weighted by rows, Fisher information by examples, counts are added. Collecting the parts and
    adding them equals collecting the whole.

    Raises:
        StatisticsError: there is no part, or the parts are of different weights, layers or kinds.
    """
    if not parts:
        raise StatisticsError("there are no statistics to add", mend="give at least one statistics file")
    first = parts[0]
    for part in parts[1:]:
        _check_same(first, part)
    layers = tuple(
        layer.model_copy(update={"rows": sum(part.header.layers[i].rows for part in parts)})
        for i, layer in enumerate(first.header.layers)
    )
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        rows = [part.header.layers[i].rows for part in parts]
        tensors.update(_layer_sums(parts, layer, rows, tensors))
    examples = [part.header.fisher_examples for part in parts]
    for name in first.tensors:
        if name.startswith("fisher."):
            tensors[name] = _mean(parts, examples, name)
    headers = [part.header for part in parts]
    header = first.header.model_copy(
        update={
            "layers": layers,
            "examples": sum(h.examples for h in headers),
            "tokens": sum(h.tokens for h in headers),
            "fisher_examples": sum(examples),
            "label": "; ".join(dict.fromkeys(h.label for h in headers if h.label)),
            "notes": tuple(dict.fromkeys(note for h in headers for note in h.notes)),
        }
    )
    return header, tensors


def _check_same(first: Statistics, other: Statistics) -> None:
    a, b = first.header, other.header
    where = other.path
    if a.manifest_sha256 != b.manifest_sha256:
        raise StatisticsError(
            f"statistics of different weights cannot be added: manifest {a.manifest_sha256} "
            f"and {b.manifest_sha256}",
            where=where,
            mend="collect both from the same checkpoint",
        )
    same_layers = [x.model_copy(update={"rows": 0}) for x in a.layers] == [
        x.model_copy(update={"rows": 0}) for x in b.layers
    ]
    if not same_layers or a.fisher != b.fisher or set(first.tensors) != set(other.tensors):
        raise StatisticsError(
            "the files do not hold the same statistics (layers, or kind of Fisher information)",
            where=where,
            mend="collect both with the same options",
        )


def _layer_sums(
    parts: Sequence[Statistics], layer: LayerStatistics, rows: Sequence[int], done: dict[str, Tensor]
) -> dict[str, Tensor]:
    names = layer_tensors(layer.input, layer.module)
    if names[0] in done:
        return {}
    if layer.input is None:
        return {names[0]: sum((part.count(layer.module) for part in parts[1:]), parts[0].count(layer.module))}
    return {name: _mean(parts, rows, name) for name in names}


def _mean(parts: Sequence[Statistics], weights: Sequence[int], name: str) -> Tensor:
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        share = part.packed(name).to(torch.float64) * (weight / sum(weights))
        total = share if total is None else total.add_(share)
    if total is None:
        raise StatisticsError("there are no statistics to add")
    return total.to(torch.float32)
