"""Collecting statistics: run a model over a data owner's batches and keep sums only, never text or labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.layers import layers_of, map_parameters
from merganser.collection.fisher import FisherCollector
from merganser.collection.gram import Workers
from merganser.collection.inputs import discover
from merganser.collection.kfac import KfacChoice, KfacCollector, output_key
from merganser.collection.masks import Batch, batch_masks, check_signals, describe_masking, take_rows
from merganser.collection.observer import Observer
from merganser.collection.placement import empty_twin, inputs_device, is_offloaded
from merganser.collection.sampling import Sampling
from merganser.collection.scores import annotated_examples, describe_left_out
from merganser.collection.stacks import Experts, eager_experts, stacked
from merganser.errors import DataError, StatisticsError
from merganser.statistics import FisherKind, StatisticsHeader
from merganser.tasks.base import Problem

Advance = Callable[[int], object]


def collect_statistics(
    model: nn.Module,
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    *,
    fisher_examples: int | None = None,
    **options: Any,
) -> tuple[StatisticsHeader, dict[str, Tensor]]:
    """The statistics of a model in memory on batches of one's own.

    Args:
        model, checkpoint, options: as of :class:`Collector`.
        batches: dictionaries of tensors, ready for ``model(**batch)``, batch first; read once.
        fisher_examples: Fisher information and K-FAC from so many first examples; None: from all.

    Returns:
        header and tensors for :func:`merganser.statistics.write_statistics`.

    Raises:
        DataError, StatisticsError: as of :meth:`Collector.collect`.
    """
    with Collector(model, checkpoint, **options) as collector:
        return collector.collect(batches, fisher_examples=fisher_examples)


class Collector:
    """Collects what merging needs to know about the data of one model, one shard after the other. A context manager.

    Each shard's statistics are those of a collection of its own. The model runs in eval mode without dropout, and is
    left as it was. Padding never enters: see :mod:`merganser.collection.masks`. Nor do examples that have labels of
    which none is annotated, because no loss knew them. The same model and batches give the same bytes on any number of
    threads.

    Args:
        model: loaded from ``checkpoint``; its architecture is transformers' own.
        checkpoint: the folder that the statistics will be bound to, by hash.
        grams: collect Gram matrices and means of all linear layers' inputs, and embeddings' token counts.
        fisher: collect per-example diagonal Fisher information of this kind.
        kfac: collect covariances of the gradients of linear layers' outputs, beside the Gram matrices of their inputs;
            see :mod:`merganser.collection.kfac`.
        problem: how labels are distributed given logits, for these two; None: from configuration and shapes.
        sampling: of the tokens of wide inputs; None: all of them count.
        experts: ``shared``: the experts of a layer share the Gram matrix of their inputs; ``exact``: each has its own;
            ``none``: experts have no statistics.
        label: free text for the header.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        grams: bool = True,
        fisher: FisherKind | None = None,
        kfac: KfacChoice | None = None,
        problem: Problem | None = None,
        sampling: Sampling | None = None,
        experts: Experts = "shared",
        label: str = "",
    ) -> None:
        self._model, self._checkpoint, self._label = model, checkpoint, label
        self._grams, self._fisher, self._problem, self._sampling = grams, fisher, problem, sampling
        if kfac is not None and not grams:
            raise ValueError("K-FAC stands beside Gram matrices: collect them, too")
        self._experts, self._kfac = experts, kfac
        self._device = inputs_device(model)
        self._stack = ExitStack()
        self._observer: Observer | None = None
        self._left_out = 0  # examples of the shard

    def __enter__(self) -> Collector:
        self._stack.enter_context(_evaluating(self._model))
        self._stack.enter_context(eager_experts(self._model))
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
        advance: Advance = lambda _: None,
    ) -> tuple[StatisticsHeader, dict[str, Tensor]]:
        """Statistics of one shard.

        Args:
            batches: of its examples.
            shard: its number, which seeds what is drawn.
            fisher_examples: Fisher information and K-FAC from so many first examples; None: from all; 0: none.
            advance: told of each batch how many examples it had.

        Raises:
            DataError: no batches, batches that cannot be used, or labels of which none is annotated.
            StatisticsError: the model's layers cannot be observed, or its activations or gradients are not finite.
        """
        self._left_out = 0
        stream = self._annotated(batches, advance)
        first = next(stream, None)
        if first is None:
            if self._left_out:
                mend = "annotate a label, or leave the labels out of the batches"
                raise DataError(f"none of the {self._left_out} examples has an annotated label", mend=mend)
            raise DataError("there are no examples", mend="give data with at least one example")
        wanted = self._fisher if fisher_examples != 0 else None
        examples = tokens = 0
        with torch.no_grad():
            names = self._names
            masking, notes = describe_masking(first, self._model)
            observer = self._observe(first)
            if observer is not None:
                observer.start(shard)
                notes += observer.notes
            information = FisherCollector(self._model, names, wanted, self._workers, self._problem) if wanted else None
            factors = None
            if observer is not None and self._kfac is not None and fisher_examples != 0:
                factors = KfacCollector(
                    self._model, observer.wiring, self._kfac, self._workers, self._device, self._problem
                )
            for batch in chain([first], stream):
                if observer is not None:
                    for piece in observer.pieces(batch):
                        observer.add(piece)
                if information is not None:
                    left = None if fisher_examples is None else fisher_examples - information.examples
                    if left is None or left > 0:
                        information.add(batch, left)
                    elif observer is None:
                        break
                if factors is not None:
                    left = None if fisher_examples is None else fisher_examples - factors.examples
                    if left is None or left > 0:
                        factors.add(batch, left)
                masks = batch_masks(batch, self._model)
                examples += masks.examples
                tokens += masks.real
                advance(masks.examples)
            if self._left_out:
                notes.append(describe_left_out(self._left_out))
            layers, tensors = observer.result() if observer is not None else ((), {})
            if observer is not None and not layers:
                what = (
                    f"no layer of {type(self._model).__name__} has statistics: {'; '.join(notes) or 'none is on disk'}"
                )
                raise StatisticsError(what, mend="check that the task runs the model whose weights these are")
            if factors is not None:
                rows, found = factors.result()
                outputs = {name: output_key(name) for name in rows}
                layers = tuple(
                    layer.model_copy(update={"output": outputs[layer.module], "output_rows": rows[layer.module]})
                    if layer.module in outputs and layer.kind != "embedding"
                    else layer
                    for layer in layers
                )
                known = {layer.output for layer in layers}
                tensors |= {name: value for name, value in found.items() if name.partition(".")[2] in known}
                notes += factors.notes
            if information is not None:
                tensors |= {f"fisher.{name}": value for name, value in information.result().items()}
                notes += information.notes
                absent = [name for name, _ in self._model.named_parameters() if name not in names]
                notes += [f"{name}: not in the checkpoint; no Fisher information" for name in absent]
        header = StatisticsHeader(
            layers=layers,
            hash_kind="blake3",
            manifest_hash=self._checkpoint.manifest_hash("blake3"),
            tensor_hashes={name: self._checkpoint.hash(name, "blake3") for name in sorted(self._checkpoint.tensors)},
            examples=examples,
            tokens=tokens,
            masking=masking,
            fisher=wanted,
            fisher_examples=information.examples if information else 0,
            kfac=factors.kind if factors else None,
            kfac_examples=factors.examples if factors else 0,
            versions=library_versions(),
            label=self._label,
            notes=tuple(notes),
        )
        return header.model_copy(update={"protocol": header.protocol_with(3)}), tensors

    def _annotated(self, batches: Iterable[Batch], advance: Advance) -> Iterator[Batch]:
        """Batches on the model's device, without the examples that have labels of which none is annotated."""
        for given in batches:
            batch = {
                key: value.to(self._device) if isinstance(value, Tensor) else value for key, value in given.items()
            }
            check_signals(batch)
            kept = annotated_examples(batch, self._model, self._problem)
            if kept is not None and not bool(kept.all()):
                absent = int((~kept).sum())
                self._left_out += absent
                advance(absent)
                if absent == len(kept):
                    continue
                batch = take_rows(batch, len(kept), kept)
            yield batch

    @cached_property
    def _names(self) -> dict[str, str]:
        """The on-disk names of the model's parameters."""
        return map_parameters(self._whole, self._checkpoint)

    @cached_property
    def _whole(self) -> nn.Module:
        """The model, or a twin without weights where some stay on the disk: tied ones are not one parameter then."""
        return empty_twin(self._model) if is_offloaded(self._model) else self._model

    def _observe(self, first: Batch) -> Observer | None:
        """What gathers the layers' inputs, made with the first batch of all."""
        if self._grams and self._observer is None:
            layers = [
                layer
                for layer in layers_of(self._whole, self._checkpoint)
                if layer.experts is None
                and (layer.kind == "convolution" or len(self._checkpoint.tensors[layer.weight].shape) == 2)
                and layer.kind != "unknown"
                and hasattr(self._whole.get_submodule(layer.module), "weight")
            ]
            stacks = [] if self._experts == "none" else stacked(self._whole, self._checkpoint)
            self._observer = Observer(
                self._model,
                discover(self._model, layers, first, stacks, self._experts),
                self._workers,
                self._device,
                self._sampling,
                one_at_a_time=is_offloaded(self._model),
            )
        return self._observer


def library_versions() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    found = {}
    for package in ("merganser", "torch", "transformers", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


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
