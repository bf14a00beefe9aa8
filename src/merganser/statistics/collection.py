"""Collecting statistics: run a model over a data owner's batches and keep sums only, never text or labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

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
from merganser.statistics.pieces import Batch, by_length, take_rows
from merganser.statistics.sampling import Sampling, describe_sampling
from merganser.statistics.scores import Problem, annotated_examples, describe_left_out
from merganser.tensors import pack_upper


def collect_statistics(
    model: nn.Module,
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    *,
    grams: bool = True,
    fisher: FisherKind | None = None,
    fisher_examples: int | None = None,
    problem: Problem | None = None,
    sampling: Sampling | None = None,
    label: str = "",
    total: int | None = None,
) -> tuple[StatisticsHeader, dict[str, Tensor]]:
    """Collect what merging needs to know about the data, on which ``model`` was trained.

    The model runs in eval mode without dropout, and is left as it was. Padding never enters: see
    :mod:`merganser.statistics.masks`. Nor do examples that have labels of which none is annotated: no loss knew
    them. The same model and batches give the same bytes on any number of threads.

    Args:
        model: loaded from ``checkpoint``; its architecture is transformers' own.
        checkpoint: the folder that the statistics will be bound to, by hash.
        batches: dictionaries of tensors, ready for ``model(**batch)``, batch first; read once.
        grams: collect Gram matrices and means of all linear layers' inputs, and embeddings' token counts.
        fisher: collect per-example diagonal Fisher information of this kind.
        fisher_examples: from so many first examples; None: from all.
        problem: how labels are distributed given logits, for ``fisher``; None: from configuration and shapes.
        sampling: of the tokens of wide inputs; None: all of them count.
        label: free text for the header.
        total: number of examples, if known; shows the remaining time.

    Returns:
        header and tensors for :func:`merganser.statistics.write_statistics`.

    Raises:
        DataError: no batches, batches that cannot be used, or labels of which none is annotated.
        StatisticsError: the model's layers cannot be observed, or its activations or gradients are not
            finite.
    """
    with (
        Collector(
            model, checkpoint, grams=grams, fisher=fisher, problem=problem, sampling=sampling, label=label
        ) as collector,
        bar(total or 0, "collecting", "ex") as progress,
    ):
        progress.total = total
        return collector.collect(batches, fisher_examples=fisher_examples, advance=progress.update)


class Collector:
    """Collects the statistics of one model, one shard of the data after the other. A context manager.

    Each shard's statistics are those of a collection of its own. Arguments as of :func:`collect_statistics`.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        grams: bool = True,
        fisher: FisherKind | None = None,
        problem: Problem | None = None,
        sampling: Sampling | None = None,
        label: str = "",
    ) -> None:
        self._model, self._checkpoint, self._label = model, checkpoint, label
        self._grams, self._fisher, self._problem, self._sampling = grams, fisher, problem, sampling
        self._device = inputs_device(model)
        self._stack = ExitStack()
        self._names: dict[str, str] | None = None
        self._layers: list[Layer] = []
        self._wiring: Wiring | None = None
        self._observer: Observer | None = None

    def __enter__(self) -> Collector:
        self._stack.enter_context(_evaluating(self._model))
        self._workers = self._stack.enter_context(Workers(torch.get_num_threads()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def collect(
        self,
        batches: Iterable[Batch],
        *,
        shard: int = 0,
        fisher_examples: int | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> tuple[StatisticsHeader, dict[str, Tensor]]:
        """Statistics of one shard.

        Args:
            batches: of its examples.
            shard: its number, which seeds what is drawn.
            fisher_examples: Fisher information from so many first examples; None: from all; 0: none.
            advance: told of each batch how many examples it had.
        """
        annotated = _Annotated(batches, self._model, self._device, self._problem, advance)
        stream = iter(annotated)
        first = next(stream, None)
        if first is None and annotated.left_out:
            raise DataError(
                f"none of the {annotated.left_out} examples has an annotated label",
                mend="annotate a label, or leave the labels out of the batches",
            )
        if first is None:
            raise DataError("there are no examples", mend="give data with at least one example")
        wanted = self._fisher if fisher_examples != 0 else None
        examples = tokens = 0
        with torch.no_grad():
            names = self._map()
            masking, notes = describe_masking(first, self._model)
            observer = self._observe(first)
            if observer is not None:
                observer.start(shard)
                notes += self._observing_notes()
            information = (
                FisherCollector(self._model, names, wanted, self._workers, self._problem) if wanted else None
            )
            for batch in chain([first], stream):
                masks = batch_masks(batch, self._model)
                if observer is not None:
                    pieces = (
                        by_length(batch, self._model, observer.most_tokens) if observer.splits else [batch]
                    )
                    for piece in pieces:
                        observer.add(piece)
                if information is not None:
                    left = None if fisher_examples is None else fisher_examples - information.examples
                    if left is None or left > 0:
                        information.add(batch, left)
                    elif observer is None:
                        break
                examples += masks.examples
                tokens += masks.real
                advance(masks.examples)
            if annotated.left_out:
                notes.append(describe_left_out(annotated.left_out))
            tensors: dict[str, Tensor] = {}
            entries: list[LayerStatistics] = []
            if observer is not None and self._wiring is not None:
                observer.finish()
                entries = _layer_entries(self._layers, observer, self._wiring)
                tensors.update(_gram_tensors(observer))
                tensors.update(
                    {
                        f"count.{e.module}": observer.counts[e.module].cpu().clone()
                        for e in entries
                        if not e.input
                    }
                )
            if information is not None:
                tensors.update({f"fisher.{name}": value for name, value in information.result().items()})
                notes += information.notes
                notes += _left_out(self._model, names)
        header = StatisticsHeader(
            layers=tuple(entries),
            manifest_sha256=self._checkpoint.manifest_sha256(),
            tensor_sha256={name: self._checkpoint.sha256(name) for name in sorted(self._checkpoint.tensors)},
            examples=examples,
            tokens=tokens,
            masking=masking,
            fisher=wanted,
            fisher_examples=information.examples if information else 0,
            versions=library_versions(),
            label=self._label,
            notes=tuple(notes),
        )
        return header, tensors

    def _map(self) -> dict[str, str]:
        """The on-disk names of the model's parameters, found once."""
        if self._names is None:
            # a twin without weights, where some stay on the disk: tied ones are no longer one parameter then
            model = empty_twin(self._model) if is_offloaded(self._model) else self._model
            self._names = map_parameters(model, self._checkpoint)
            self._layers = layers_of(model, self._checkpoint) if self._grams else []
        return self._names

    def _observe(self, first: Batch) -> Observer | None:
        """What gathers the layers' inputs, made with the first batch of all."""
        if self._grams and self._observer is None:
            self._wiring = discover(self._model, self._layers, first)
            self._observer = Observer(
                self._model,
                self._layers,
                self._wiring,
                self._workers,
                self._device,
                self._sampling,
                one_at_a_time=is_offloaded(self._model),
            )
        return self._observer

    def _observing_notes(self) -> list[str]:
        if self._wiring is None:
            return []
        sampled = [describe_sampling(self._wiring.widths, self._sampling)] if self._sampling else []
        return [*self._wiring.notes, *sampled]


class _Annotated:
    """Batches on the model's device, without the examples that have labels of which none is annotated.

    Attributes:
        left_out: how many examples were left out so far.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        model: nn.Module,
        device: torch.device,
        problem: Problem | None,
        advance: Callable[[int], object],
    ) -> None:
        self._batches, self._model, self._device = batches, model, device
        self._problem, self._advance = problem, advance
        self.left_out = 0

    def __iter__(self) -> Iterator[Batch]:
        for given in self._batches:
            batch = _moved(given, self._device)
            kept = annotated_examples(batch, self._model, self._problem)
            if kept is None or bool(kept.all()):
                yield batch
                continue
            absent = int((~kept).sum())
            self.left_out += absent
            self._advance(absent)
            if bool(kept.any()):
                yield take_rows(batch, len(kept), kept)


def inputs_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs; on the CPU where accelerate brings weights from the disk."""
    return torch.device("cpu") if is_offloaded(model) else next(model.parameters()).device


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are on the disk and come into memory, by accelerate, for a moment only."""
    return any(parameter.is_meta for parameter in model.parameters())


def empty_twin(model: nn.Module) -> nn.Module:
    """A model of the same structure on the meta device."""
    make: Any = type(model)
    with torch.device("meta"):
        twin: nn.Module = make(model.config)
    return twin


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
        rows = int(observer.counts[layer.module].sum()) if leader is None else observer.grams[leader].seen
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
