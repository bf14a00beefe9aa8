"""Collecting statistics: run a model over a data owner's batches and keep sums only, never text or labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.layers import Layer, layers_of, map_parameters
from merganser.errors import DataError, StatisticsError
from merganser.progress import bar
from merganser.statistics.fisher import FisherCollector
from merganser.statistics.format import FisherKind, LayerStatistics, StatisticsHeader
from merganser.statistics.gram import Workers
from merganser.statistics.inputs import Wiring, discover
from merganser.statistics.masks import batch_masks, describe_masking
from merganser.statistics.observer import Observer
from merganser.statistics.pieces import by_length
from merganser.statistics.scores import Problem
from merganser.tensors import pack_upper

Batch = dict[str, Any]


def collect_statistics(
    model: nn.Module,
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    *,
    grams: bool = True,
    fisher: FisherKind | None = None,
    fisher_examples: int | None = None,
    problem: Problem | None = None,
    label: str = "",
    total: int | None = None,
) -> tuple[StatisticsHeader, dict[str, Tensor]]:
    """Collect what merging needs to know about the data, on which ``model`` was trained.

    The model runs in eval mode without dropout, and is left as it was. Padding never enters: see
    :mod:`merganser.statistics.masks`. The same model and batches give the same bytes on any number of
    threads.

    Args:
        model: loaded from ``checkpoint``; its architecture is transformers' own.
        checkpoint: the folder that the statistics will be bound to, by hash.
        batches: dictionaries of tensors, ready for ``model(**batch)``, batch first; read once.
        grams: collect Gram matrices and means of all linear layers' inputs, and embeddings' token counts.
        fisher: collect per-example diagonal Fisher information of this kind.
        fisher_examples: from so many first examples; None: from all.
        problem: how labels are distributed given logits, for ``fisher``; None: from configuration and shapes.
        label: free text for the header.
        total: number of examples, if known; shows the remaining time.

    Returns:
        header and tensors for :func:`merganser.statistics.write_statistics`.

    Raises:
        DataError: no batches, or batches that cannot be used.
        StatisticsError: the model's layers cannot be observed, or its activations or gradients are not
            finite.
    """
    device = next(model.parameters()).device
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError("there are no examples", mend="give data with at least one example")
    first = _moved(first, device)
    names = map_parameters(model, checkpoint)
    layers = layers_of(model, checkpoint) if grams else []
    examples = tokens = 0
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        workers = stack.enter_context(Workers(torch.get_num_threads()))
        masking, notes = describe_masking(first, model)
        observer = wiring = None
        if grams:
            wiring = discover(model, layers, first)
            observer = Observer(model, layers, wiring, workers, device)
            notes += wiring.notes
        information = FisherCollector(model, names, fisher, workers, problem) if fisher else None
        progress: tqdm[Any] = stack.enter_context(bar(total or 0, "collecting", "ex"))
        progress.total = total
        for batch in chain([first], (_moved(batch, device) for batch in stream)):
            masks = batch_masks(batch, model)
            if observer is not None:
                for piece in by_length(batch, model, observer.most_tokens):
                    observer.add(piece)
            if information is not None:
                left = None if fisher_examples is None else fisher_examples - information.examples
                if left is None or left > 0:
                    information.add(batch, left)
                elif observer is None:
                    break
            examples += masks.examples
            tokens += masks.real
            progress.update(masks.examples)
        tensors: dict[str, Tensor] = {}
        entries: list[LayerStatistics] = []
        if observer is not None and wiring is not None:
            observer.finish()
            entries = _layer_entries(layers, observer, wiring)
            tensors.update(_gram_tensors(observer))
            tensors.update(
                {f"count.{e.module}": observer.counts[e.module].cpu() for e in entries if not e.input}
            )
        if information is not None:
            tensors.update({f"fisher.{name}": value for name, value in information.result().items()})
            notes += information.notes
            notes += _left_out(model, names)
    header = StatisticsHeader(
        layers=tuple(entries),
        manifest_sha256=checkpoint.manifest_sha256(),
        tensor_sha256={name: checkpoint.sha256(name) for name in sorted(checkpoint.tensors)},
        examples=examples,
        tokens=tokens,
        masking=masking,
        fisher=fisher,
        fisher_examples=information.examples if information else 0,
        versions=library_versions(),
        label=label,
        notes=tuple(notes),
    )
    return header, tensors


def library_versions() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    found = {}
    for package in ("merganser", "torch", "transformers", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _layer_entries(layers: list[Layer], observer: Observer, wiring: Wiring) -> list[LayerStatistics]:
    entries = []
    for layer in layers:
        if layer.module not in wiring.calls:
            continue
        leader = wiring.leaders.get(layer.module)
        rows = int(observer.counts[layer.module].sum()) if leader is None else observer.grams[leader].rows
        if rows:
            entries.append(
                LayerStatistics(
                    module=layer.module,
                    kind=layer.kind,
                    weight=layer.weight,
                    bias=layer.bias,
                    input=leader,
                    rows=rows,
                    tied=layer.tied,
                )
            )
    return entries


def _gram_tensors(observer: Observer) -> dict[str, Tensor]:
    tensors = {}
    for name, gram in observer.grams.items():
        if not gram.rows:
            continue
        mean = gram.mean()
        packed = pack_upper(gram.mean_product())
        if not bool(torch.isfinite(packed).all()):
            raise StatisticsError(
                f"the inputs of layer {name} are not finite, or too large for float32 sums",
                mend="check the model on these examples",
            )
        tensors[f"gram.{name}"], tensors[f"mean.{name}"] = packed, mean
    return tensors


def _left_out(model: nn.Module, names: dict[str, str]) -> Iterator[str]:
    for name, _ in model.named_parameters():
        if name not in names:
            yield f"{name}: not in the checkpoint; no Fisher information"


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, each restored to its own mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
