"""Running a model over batches while hooks gather its layers' inputs into accumulators."""

from __future__ import annotations

import contextvars
import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import Layer
from merganser.collection.gram import Gram, Workers, buffer_rows, fill
from merganser.collection.inputs import Wiring
from merganser.collection.masks import (
    Batch,
    BatchMasks,
    batch_masks,
    model_inputs,
    split_by_count,
    split_by_length,
    widened,
    without_padding,
)
from merganser.collection.rows import Call, token_ids, token_rows
from merganser.collection.sampling import SPARE, Sampling, describe_sampling, shares
from merganser.collection.stacks import experts_of, stack_hooks
from merganser.collection.study import Identity, identity_of
from merganser.collection.taps import input_hooks, weight_of
from merganser.errors import StatisticsError
from merganser.statistics import LayerStatistics
from merganser.tensors import pack_upper

PIECES = 8  # forward passes that fill the buffers once, at least: enough for as many threads


class _Enough(Exception):
    """Everything needed of this forward pass has been seen."""


@dataclass
class _ForwardPass:
    """One forward pass: its batch, the places reserved for its rows, and what has been seen of it.

    Attributes:
        places: by leader and number of the call (of those that count).
        kept: numbers of the rows that were drawn, where an input is sampled, by leader and call.
        loose: rows without a place, by leader, in the order of the calls.
    """

    batch: Batch
    masks: BatchMasks
    places: dict[tuple[str, int], Tensor | None]
    kept: dict[tuple[str, int], Tensor]
    loose: list[tuple[str, Tensor]] = field(default_factory=list)
    inputs: dict[tuple[str, int], Identity] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    seen: int = 0


class Observer:
    """Accumulates the inputs of a model's layers.

    Places in the buffers are reserved in the order in which batches come, so that it does not matter which
    thread fills them when. Models too wide for buffers, and models on another device than the CPU, are run one
    batch after the other, with the threads inside torch.

    Attributes:
        grams: by leader, of the layers that see the same input.
        counts: of each embedding's rows.
        notes: what was left out, assumed or sampled.

    Args:
        model: in eval mode.
        wiring: what :func:`~merganser.collection.inputs.discover` found.
        workers: run forward passes and products.
        device: of the model's inputs.
        sampling: of the tokens of wide inputs; None: all are counted.
        one_at_a_time: a forward pass changes the model, as it does where weights come from the disk: run one
            after the other, with the threads inside torch.
    """

    def __init__(
        self,
        model: nn.Module,
        wiring: Wiring,
        workers: Workers,
        device: torch.device,
        sampling: Sampling | None = None,
        *,
        one_at_a_time: bool = False,
    ) -> None:
        self._model, self._wiring, self._workers = model, wiring, workers
        self._sampling, self._one_at_a_time = sampling, one_at_a_time
        self._expected = sum(len(calls) for name, calls in wiring.calls.items() if name not in wiring.free)
        self._shares = shares(wiring.widths, sampling)
        room = {name: min(1.0, SPARE * share) for name, share in self._shares.items()}
        widths = [math.ceil(room[name] * width) for name, width in wiring.widths.items()]
        self._capacity = buffer_rows(widths) if device.type == "cpu" else 0
        self.grams = {
            name: Gram(width, math.ceil(room[name] * self._capacity), device) for name, width in wiring.widths.items()
        }
        self.counts = {
            layer.module: torch.zeros(weight_of(model, layer).shape[0], dtype=torch.int64, device=device)
            for layer in wiring.layers
            if layer.kind == "embedding"
        }
        self.notes = list(wiring.notes)
        if sampling is not None:
            drawn = wiring.widths.keys() - wiring.free
            none = "no sample was taken, since how many rows an example has is not known beforehand"
            self.notes.append(describe_sampling(wiring.widths, sampling) if drawn else none)
        self._shard = self._passes = 0
        self._drawn = dict.fromkeys(self.grams, 0)
        self._waiting: list[_ForwardPass] = []
        self._now = threading.local()
        self._lock = threading.Lock()

    @property
    def wiring(self) -> Wiring:
        """Which layers see which inputs, and whose rows these hold."""
        return self._wiring

    def pieces(self, batch: Batch) -> list[Batch]:
        """A batch in the pieces that had better be added, without padding; whole where a pass costs more than that."""
        most = self._capacity // PIECES if self._capacity else None
        if self._wiring.padding_free:
            pieces = without_padding(batch, self._model)
            if most is not None and not self._one_at_a_time:
                pieces = [part for piece in pieces for part in self._small(piece, most)]
        elif self._one_at_a_time:
            pieces = [batch]
        else:
            pieces = split_by_length(batch, self._model, most)
        return [widened(piece, self._model, self._wiring.multiple) for piece in pieces]

    def _small(self, piece: Batch, most: int) -> list[Batch]:
        """Examples of one length in pieces of at most so many rows."""
        masks = batch_masks(piece, self._model)
        rows = masks.tokens.mask.numel() * self._wiring.rows_per_token
        return split_by_count(piece, self._model, max(1, most * masks.examples // rows))

    def start(self, shard: int) -> None:
        """Begin anew, for the shard of this number; what was drawn depends on it."""
        self._shard, self._passes, self._waiting = shard, 0, []
        for gram in self.grams.values():
            gram.clear()
        self._drawn = dict.fromkeys(self.grams, 0)
        for counts in self.counts.values():
            counts.zero_()

    def add(self, batch: Batch) -> None:
        """Count a batch, now or when there is enough to do for all threads.

        Raises:
            StatisticsError: the layers are not called as they were in the probe.
        """
        masks = batch_masks(batch, self._model)
        counts = {
            (name, number): call.rows(masks)
            for name in self.grams
            for number, call in enumerate(c for c in self._wiring.calls[name] if c is not None)
        }
        kept = self._draw(counts)
        counts |= {call: len(drawn) for call, drawn in kept.items()}
        rows: Counter[str] = Counter()
        for (name, _), count in counts.items():
            rows[name] += count
        waiting = sum(waits.masks.real for waits in self._waiting) if self._wiring.free else 0
        full = waiting * self._wiring.rows_per_token > self._capacity
        if full or not all(self.grams[name].fits(count) for name, count in rows.items()):
            self.finish()
        places = {
            (name, number): self.grams[name].reserve(count) if rows[name] <= self.grams[name].capacity else None
            for (name, number), count in counts.items()
        }
        self._waiting.append(_ForwardPass(batch, masks, places, kept))
        self._passes += 1
        if not self._capacity:
            self.finish()

    def finish(self) -> None:
        """Run what waits, and multiply what the buffers hold; the largest first, so that threads end together."""
        waiting, self._waiting = self._waiting, []
        with (
            input_hooks(self._model, self._wiring.layers, self._see, self._wiring.owners),
            stack_hooks(self._model, self._wiring.stacks, self._see),
        ):
            if self._capacity and not self._one_at_a_time:
                ordered = sorted(waiting, key=lambda waits: -waits.masks.tokens.mask.numel())
                self._workers.run([partial(self._run, current) for current in ordered])
            else:
                for current in waiting:
                    self._run(current)
        grams = sorted(self.grams.values(), key=lambda gram: -gram.width)
        self._workers.run([task for gram in grams for task in gram.flush()])
        for current in waiting:
            for name, block in current.loose:
                self._workers.run(self.grams[name].add(block))

    def result(self) -> tuple[tuple[LayerStatistics, ...], dict[str, Tensor]]:
        """The layers that were seen, and their Gram matrices, means and token counts. Used up until :meth:`start`.

        Raises:
            StatisticsError: a layer's inputs are not finite.
        """
        self.finish()
        tensors: dict[str, Tensor] = {}
        for name, gram in self.grams.items():
            if not gram.rows:
                continue
            mean, packed = gram.mean(), pack_upper(gram.mean_product())
            if not bool(torch.isfinite(packed).all()):
                what = f"the inputs of layer {name} are not finite, or too large for float32 sums"
                raise StatisticsError(what, mend="check the model on these examples")
            tensors[f"gram.{name}"], tensors[f"mean.{name}"] = packed, mean
        layers = []
        for layer in self._wiring.layers:
            if layer.module in self._wiring.groups:
                continue  # its first layer stands for it
            leader = self._wiring.leaders.get(layer.module)
            seen = int(self.counts[layer.module].sum()) if leader is None else self.grams[leader].seen
            if seen:
                layers.append(_published(layer, leader, seen, tied=self._is_tied(layer)))
                if leader is None:
                    tensors[f"count.{layer.module}"] = self.counts[layer.module].cpu().clone()
        rows = {name: gram.seen for name, gram in self.grams.items()}
        for stack in self._wiring.stacks:
            layers += stack.layers(rows, experts_of(self._model, stack))
        return tuple(layers), tensors

    def _is_tied(self, layer: Layer) -> bool:
        """Whether a layer of another sort has the weight too; linear layers' inputs are counted together."""
        kinds = {other.kind == "embedding" for other in self._wiring.layers if other.weight == layer.weight}
        return layer.tied and len(kinds) > 1

    def _draw(self, counts: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], Tensor]:
        """The rows that sampled inputs keep of one pass, by leader and call."""
        kept: dict[tuple[str, int], Tensor] = {}
        if self._sampling is None:
            return kept
        for (name, number), count in counts.items():
            if self._shares[name] < 1 and count:
                place = (self._shard, self._passes, number)
                first = self._drawn[name] == 0
                kept[name, number] = self._sampling.draw(name, place, count, some=first)
                self._drawn[name] += len(kept[name, number])
        return kept

    def _run(self, current: _ForwardPass) -> None:
        self._now.forward_pass = current
        try:
            # context variables of its own: a pass that is cut short leaves nothing behind in them
            contextvars.copy_context().run(self._forward, current.batch)
        except _Enough:
            pass
        finally:
            self._now.forward_pass = None
        if current.seen != self._expected:
            calls = [entry for entry in self._wiring.calls.items() if entry[0] not in self._wiring.free]
            raise _changed(next(n for n, c in calls if current.calls.get(n, 0) != len(c)), "it is called less often")

    def _forward(self, batch: Batch) -> None:
        with torch.no_grad():  # each thread has its own
            self._model(**model_inputs(batch, self._model))

    def _see(self, layer: str, x: Tensor) -> None:
        current: _ForwardPass = self._now.forward_pass
        name = self._wiring.groups.get(layer, layer)
        expected, number = self._wiring.calls[name], current.calls.get(name, 0)
        current.calls[name] = number + 1
        if name in self._wiring.free:
            self._count(name, number, expected[0] if expected and expected[0] else Call("all"), x, current)
            return
        if number >= len(expected):
            raise _changed(name, "it is called more often")
        current.seen += 1
        call = expected[number]
        if call is not None:
            try:
                self._count(name, number, call, x, current)
            except ValueError as error:
                raise _changed(name, f"its input of {error}") from None
        if current.seen == self._expected and not self._wiring.free:
            raise _Enough

    def _count(self, name: str, number: int, call: Call, x: Tensor, current: _ForwardPass) -> None:
        if name in self.counts:
            total = self.counts[name]
            found = torch.bincount(token_ids(x, call, current.masks), minlength=total.numel())
            with self._lock:
                total += found
            return
        leader = self._wiring.leaders[name]
        if name not in self._wiring.free:
            number = sum(c is not None for c in self._wiring.calls[name][:number])  # of those that count
        if leader != name:
            if current.inputs.get((leader, number)) != identity_of(x):
                raise _changed(name, f"it no longer sees the same input as {leader}")
            return
        current.inputs[name, number] = identity_of(x)
        rows, index = token_rows(x, call, current.masks)
        count = rows.shape[0] if index is None else index.shape[0]
        with self._lock:
            self.grams[name].seen += count
        kept = current.kept.get((name, number))
        if kept is not None:
            if call.rows(current.masks) != count:
                raise ValueError(f"{tuple(x.shape)} has {count} rows that count, not {call.rows(current.masks)}")
            kept = kept.to(x.device)
            index, count = kept if index is None else index[kept], len(kept)
            if not count:
                return
        place = current.places.get((name, number))
        if place is None:
            # a copy: later layers may change their input in place
            block = rows.clone() if index is None else rows.index_select(0, index)
            if self._capacity:
                current.loose.append((name, block))
            else:  # this is not a worker, and they are idle
                self._workers.run(self.grams[name].add(block))
        elif len(place) != count:
            raise ValueError(f"{tuple(x.shape)} has {count} rows that count, not {len(place)}")
        else:
            fill(place, rows, index)


def _published(layer: Layer, input: str | None, rows: int, *, tied: bool) -> LayerStatistics:
    known = {key: value for key, value in asdict(layer).items() if key != "experts"}
    return LayerStatistics(**known | {"tied": tied}, input=input, rows=rows)


def _changed(name: str, how: str) -> StatisticsError:
    return StatisticsError(
        f"layer {name} does not behave as in the first batch: {how}",
        mend="models whose structure depends on the data cannot be observed; merge them with a method "
        "that needs no Gram matrices",
    )
