"""Arithmetic on statistics: what merging does to Gram matrices, and statistics of several parts as one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from merganser.checkpoints.writer import TensorSpec
from merganser.errors import StatisticsError
from merganser.statistics.format import FISHER_OF_ANNOTATED, LayerStatistics, StatisticsHeader
from merganser.statistics.gram_encodings import gram_specs, spec_of
from merganser.statistics.reading import Statistics
from merganser.statistics.writing import LazyTensors, TensorGroup
from merganser.tensors import pack_upper

MOST_ROWS = 2**53  # whole numbers up to here are exact in float64


def add(parts: Sequence[Statistics]) -> tuple[StatisticsHeader, Mapping[str, Tensor]]:
    """Statistics of several data sets, of one checkpoint, as if they had been collected together.

    Means are weighted by rows, Fisher information by examples, counts are added. Collecting the parts and
    adding them equals collecting the whole. The sum is float32, whatever the parts' storage.

    Returns:
        Header and tensors, which are computed when they are asked for, one input at a time.

    Raises:
        StatisticsError: there is no part, or the parts are of different weights, layers or kinds.
    """
    if not parts:
        raise StatisticsError("there are no statistics to add", mend="give at least one statistics file")
    first = parts[0]
    for part in parts[1:]:
        _check_same(first, part)
    headers = [part.header for part in parts]
    specs = [spec_of(name, first.tensors[name].shape) for name in first.others]
    widths = {input: part.width(input) for part in reversed(parts) for input in part.inputs}
    specs += [spec for input, width in widths.items() for spec in gram_specs("gram", input, width)]
    groups: list[TensorGroup] = [([spec], partial(_sum_of_those_with, parts, spec.name)) for spec in specs]
    labels = dict.fromkeys(header.label for header in headers if header.label)
    update = {"protocol": headers[0].protocol_with(1), "label": "; ".join(labels), "notes": _notes(headers)}
    return sum_headers(headers).model_copy(update=update), LazyTensors(groups)


def sum_headers(headers: Sequence[StatisticsHeader]) -> StatisticsHeader:
    """The first header with the rows, examples and tokens of all, and the layers of any."""
    found: dict[LayerStatistics, list[LayerStatistics]] = {}
    for layer in (layer for header in headers for layer in header.layers):
        found.setdefault(layer.without_rows.model_copy(update={"output": None}), []).append(layer)
    layers = tuple(
        parts[0].model_copy(
            update={
                "rows": sum(part.rows for part in parts),
                "output": next((part.output for part in parts if part.output is not None), None),
                "output_rows": sum(part.output_rows for part in parts),
            }
        )
        for parts in found.values()
    )
    fields = ("examples", "tokens", "fisher_examples", "kfac_examples")
    sums = {field: sum(getattr(header, field) for header in headers) for field in fields}
    return headers[0].model_copy(update={"layers": layers, **sums})


def weights_of(header: StatisticsHeader) -> dict[str, int]:
    """How many rows or examples each tensor is the mean of; token counts are sums and absent."""
    keys = [one for layer in header.layers for one in layer.gram_rows.items()]
    rows = {f"{kind}.{key}": count for key, count in keys for kind in ("gram", "mean")}
    return rows | {f"fisher.{name}": header.fisher_examples for name in header.tensor_hashes}


def _notes(headers: Sequence[StatisticsHeader]) -> tuple[str, ...]:
    """The notes of all parts; that Fisher information has a mask is said of those parts of which it is true."""
    notes = dict.fromkeys(note for header in headers for note in header.notes)
    masked = sum(FISHER_OF_ANNOTATED in header.notes for header in headers)
    if 0 < masked < len(headers):
        del notes[FISHER_OF_ANNOTATED]
        notes[f"{FISHER_OF_ANNOTATED} in {masked} of the {len(headers)} files that were added"] = None
    return tuple(notes)


def scale(statistics: Statistics, factor: float) -> tuple[StatisticsHeader, Mapping[str, Tensor]]:
    """The same statistics with ``factor`` times the weight of evidence in :func:`add`.

    Gram matrices, means and Fisher information are averages and stay as they are. What :func:`add` weights them by
    is multiplied: rows, token counts and the number of Fisher examples, rounded to whole numbers and never from
    something to nothing. Adding a file weighted by 2 equals adding it twice. The weight of a contributor in a merge
    is another matter: it is the merge's coefficient, and no row count enters there.

    Args:
        statistics: in any storage, which the result shares.
        factor: above 0.

    Raises:
        StatisticsError: no such factor, or more rows than can be counted.
    """
    if not 0 < factor < math.inf:
        mend = "give a number above 0"
        raise StatisticsError(f"statistics cannot be weighted by {factor:g}", where="FACTOR", mend=mend)
    header = statistics.header
    counted = [max(layer.rows, layer.output_rows) for layer in header.layers]
    most = max([header.fisher_examples, *counted])
    if most * factor > MOST_ROWS:
        mend = "give a smaller number"
        raise StatisticsError(f"{most} rows times {factor:g} are too many to count", where="FACTOR", mend=mend)
    changes = {
        "layers": tuple(
            layer.model_copy(update={name: _scaled(getattr(layer, name), factor) for name in ("rows", "output_rows")})
            for layer in header.layers
        ),
        "fisher_examples": _scaled(header.fisher_examples, factor),
        "kfac_examples": _scaled(header.kfac_examples, factor),
        "notes": (*header.notes, f"weight of evidence: rows, counts and Fisher examples times {factor:g}"),
    }
    groups: list[TensorGroup] = [
        ([TensorSpec(name, info.dtype, info.shape)], partial(_scaled_tensor, statistics, name, factor))
        for name, info in statistics.tensors.items()
    ]
    return header.model_copy(update=changes), LazyTensors(groups)


def _check_same(first: Statistics, other: Statistics) -> None:
    a, b = first.header, other.header
    where = other.path
    if (a.hash_kind, a.manifest_hash) != (b.hash_kind, b.manifest_hash):
        what = "statistics of different weights cannot be added: manifest "
        what += f"{a.hash_kind} {a.manifest_hash} and {b.hash_kind} {b.manifest_hash}"
        raise StatisticsError(what, where=where, mend="collect both from the same checkpoint")
    kinds = (a.fisher, a.kfac) == (b.fisher, b.kfac)
    if not kinds or not same_layers(a, b) or _shapes(first) != _shapes(other):
        what = "the files do not hold the same statistics (layers, or kind of Fisher information or K-FAC)"
        raise StatisticsError(what, where=where, mend="collect both with the same options")
    for input in first.inputs.keys() & other.inputs.keys():
        if first.width(input) != other.width(input):
            what = f"the files do not hold the same statistics: {input} is of another width"
            raise StatisticsError(what, where=where, mend="collect both with the same options")


def same_layers(one: StatisticsHeader, two: StatisticsHeader) -> bool:
    """Whether both have the same layers, but for some of several experts: no token may have been sent to them.

    Gradients of outputs may be missing in either: they may be of the first examples alone.
    """
    ours, theirs = (
        {layer.without_rows.model_copy(update={"output": None}) for layer in header.layers} for header in (one, two)
    )
    both = {_sort_of(layer) for layer in ours & theirs}
    return all(_sort_of(layer) in both for layer in ours ^ theirs)


def _sort_of(layer: LayerStatistics) -> str:
    return re.sub(r"\d+", "#", str(layer.input or layer.module))


def _shapes(statistics: Statistics) -> dict[str, tuple[int, ...]]:
    """Of the tensors that belong to no input."""
    return {name: statistics.tensors[name].shape for name in statistics.others}


def _sum_of_those_with(parts: Sequence[Statistics], name: str) -> dict[str, Tensor]:
    """One tensor of the parts that have it."""
    key = name.partition(".")[2]
    having = [part for part in parts if name in part.tensors or key in part.inputs]
    return _sum(having, [weights_of(part.header).get(name, 0) for part in having], name)


def _sum(parts: Sequence[Statistics], weights: Sequence[int], name: str) -> dict[str, Tensor]:
    """One tensor of all parts: the mean in float32, or the sum of what has no weights."""
    whole = sum(weights)
    tensors = (_uncompressed(part, name) for part in parts)
    if not whole:
        return {name: sum(tensors, torch.zeros((), dtype=torch.int64))}
    shares = (t.to(torch.float64).mul_(weight / whole) for t, weight in zip(tensors, weights, strict=True))
    total = next(shares)
    for share in shares:
        total += share
    return {name: total.to(torch.float32)}


def _uncompressed(statistics: Statistics, name: str) -> Tensor:
    kind, _, key = name.partition(".")
    if kind == "gram" and statistics.inputs[key] != "gram":
        return pack_upper(statistics.gram(key))
    return statistics.packed(name)


def _scaled(number: int, factor: float) -> int:
    return max(1, round(number * factor)) if number else 0


def _scaled_tensor(statistics: Statistics, name: str, factor: float) -> dict[str, Tensor]:
    """Token counts times the factor; what is an average stays as it is."""
    values = statistics.packed(name)
    if name.startswith("count."):
        scaled = (values.to(torch.float64) * factor).round().to(torch.int64)
        values = torch.where(values > 0, scaled.clamp_min(1), 0)
    return {name: values}
