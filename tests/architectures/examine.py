"""What is asked of every architecture: merges that open as the oracle's, and statistics without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import merganser
from architectures.grams import Key, Observed, observe
from architectures.oracle import TOLERANCE, Comparison, Family, compare, error, flat
from architectures.tiny import Tiny
from merganser.checkpoints import open_checkpoint
from merganser.collection.collector import collect_statistics
from merganser.errors import UserError
from merganser.statistics import LayerStatistics, Statistics, write_statistics

COEFFICIENTS = (1.0, 3.0)
STATISTICS = "merge_statistics.safetensors"
#: Models whose own layers let padding change the other tokens: they have no mask, or convolve over padding.
PADDING_MATTERS = {
    "ConvBertForMaskedLM", "FNetForMaskedLM", "MobileBertForMaskedLM", "NystromformerForMaskedLM", "YosoForMaskedLM",
}  # fmt: skip
#: Of Gram matrices, relative to their largest number: models run in float32.
ACCURACY = 1e-4


@dataclass
class Row:
    """What was found of one architecture; an empty text stands for right.

    Attributes:
        name: of the model's class.
        faults: by what was asked: ``simple``, ``task_arithmetic``, ``ties``, ``actmat``, ``collect``, ``regmean``.
        actmat, regmean: coverage, as the result says where it says so; None where there was no merge.
        own: coverage of ACTMat as the oracle counts it.
        refused: why no statistics are collected; None where they are.
    """

    name: str
    faults: dict[str, str] = field(default_factory=dict)
    actmat: float | None = None
    own: float | None = None
    regmean: float | None = None
    refused: str | None = None


def examine(tiny: Tiny, folder: Path) -> Row:
    """Everything that is asked of an architecture."""
    row = Row(tiny.model_class)
    family = Family(tiny, folder)
    for method, check in _CHECKS.items():
        try:
            row.faults[method] = check(family, row, folder / method)
        except Exception as problem:  # a row of the table, whatever happens
            row.faults[method] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    return row


def merge(family: Family, output: Path, method: str, **more: Any) -> tuple[torch.Tensor, merganser.merging.MergeResult]:
    """The parameters of what opens, and what was said of the merge.

    Raises:
        AssertionError: it opens with missing, unexpected or mismatched keys, or other buffers than all of them have.
    """
    result = merganser.merge(family.contributors, output, method=method, coefficients=COEFFICIENTS, threads=1, **more)
    opened = family.model_class.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    model, said = opened
    keys = {name: said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if said[name]}
    assert not keys, keys
    for name, buffer in family.model.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=f"buffer {name} differs")
    return flat(model), result


def _check_simple(family: Family, row: Row, output: Path) -> str:
    merged, _ = merge(family, output, "simple")
    return _difference(error(merged, family.average(COEFFICIENTS)))


def _check_task_arithmetic(family: Family, row: Row, output: Path) -> str:
    merged, _ = merge(family, output, "task_arithmetic", base=family.base)
    return _difference(error(merged, family.task_arithmetic(COEFFICIENTS)))


def _check_ties(family: Family, row: Row, output: Path) -> str:
    merged, _ = merge(family, output, "ties", base=family.base)
    return _wrong(compare(merged, family.ties(COEFFICIENTS)))


def _check_actmat(family: Family, row: Row, output: Path) -> str:
    merged, result = merge(family, output, "actmat", base=family.base)
    found = compare(merged, family.actmat(COEFFICIENTS))
    row.own = found.coverage
    row.actmat = getattr(result.coverage, "share", found.coverage)
    return _wrong(found)


def _difference(found: float) -> str:
    return "" if found <= TOLERANCE else f"off by {found:.0e}"


def _wrong(found: Comparison) -> str:
    said = [f"{name} off by {distance:.0e}" for name, distance in found.wrong.items()]
    return "" if not said else f"{len(said)} tensors: {', '.join(said[:3])}"


def _check_statistics(family: Family, row: Row, output: Path) -> str:
    """Collect for each contributor; published Gram matrices and counts against those of examples run alone."""
    for number, path in enumerate(family.contributors):
        batch = family.tiny.batch(seed=number)
        try:
            header, tensors = collect_statistics(family.open(path), open_checkpoint(path), [batch], experts="exact")
        except UserError as problem:
            row.refused = str(problem).splitlines()[0]
            return ""
        statistics = Statistics.in_memory(header, tensors)
        wrong = compare_statistics(statistics, observe(family.open(path), batch), family)
        if wrong and row.name in PADDING_MATTERS:
            wrong = compare_statistics(statistics, observe(family.open(path), batch, together=True), family)
        if wrong:
            return f"{len(wrong)} inputs: {', '.join(wrong[:3])}"
        write_statistics(path / STATISTICS, header, tensors)
    return ""


def compare_statistics(statistics: Statistics, observed: Observed, family: Family) -> list[str]:
    """What is published otherwise than it was observed."""
    wrong = []
    counts: dict[str, torch.Tensor] = {}
    for layer in statistics.header.layers:
        if layer.weight not in family.stored:
            wrong.append(f"{layer.weight} is not stored")
            continue
        places = family.stored[layer.weight]
        if layer.expert is not None:
            places = places[family.stacks(places)[layer.expert]]
        name, first = family.parameter_at(int(places.min()))
        if layer.kind == "embedding":  # one table may serve several modules
            counts[name] = counts.get(name, 0) + statistics.count(layer.module)
        elif layer.input is not None:
            wrong += _compare_gram(statistics, layer, observed, observed.find(name, first))
    said = " ".join(statistics.header.notes)  # a look-up that is left out is named there
    differing = [name for name, count in counts.items() if not torch.equal(count, observed.counts[name])]
    return [*wrong, *(f"counts of {name}" for name in differing if name.rpartition(".")[0] not in said)]


def _compare_gram(statistics: Statistics, layer: LayerStatistics, observed: Observed, key: Key | None) -> Iterator[str]:
    which = layer.module if layer.expert is None else f"{layer.weight} of expert {layer.expert}"
    if key is None:
        yield from [] if layer.rows == 0 else [f"{which} was not called"]
        return
    rows = observed.rows[key]
    gram, mean = statistics.gram(layer.input or ""), statistics.mean(layer.input or "")
    if layer.rows < rows:  # rows of zeros, with which a model fills its windows, add nothing to the sums
        gram, mean = gram * (layer.rows / rows), mean * (layer.rows / rows)
    truth, total = observed.grams[key] / rows, observed.sums[key] / rows
    size = truth.diagonal().max().sqrt().clamp_min(1e-30)  # a mean may be zero
    off = float((mean - total).abs().max() / size) if mean.shape == total.shape else float("inf")
    distance = max(_relative(gram, truth), off)
    if distance > ACCURACY:
        yield f"{which} off by {distance:.0e} ({layer.rows} rows, not {rows})"


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _check_regmean(family: Family, row: Row, output: Path) -> str:
    """Coverage alone: the arithmetic is that of ACTMat, the Gram matrices were compared."""
    if not all((path / STATISTICS).exists() for path in family.contributors):
        return ""
    merged, result = merge(family, output, "regmean")
    average = family.average(COEFFICIENTS)
    reached = total = 0
    for _, kind, places in family.cut():
        if kind in ("linear", "experts"):
            total += len(places)
            reached += len(places) * (error(merged[places], average[places]) > TOLERANCE)
    row.regmean = getattr(result.coverage, "share", reached / max(total, 1))
    return ""


_CHECKS: dict[str, Callable[[Family, Row, Path], str]] = {
    "simple": _check_simple,
    "task_arithmetic": _check_task_arithmetic,
    "ties": _check_ties,
    "actmat": _check_actmat,
    "collect": _check_statistics,
    "regmean": _check_regmean,
}
