"""Covariances of the gradients of layers' outputs: the second Kronecker factor of Fisher information (K-FAC).

With x a linear layer's input at a token and g the gradient of log p(y|x) with respect to its output there, the Fisher
information of its weight is about A ⊗ B (Martens & Grosse 2015, arXiv 1503.05671): A = E[x xᵀ] is the Gram matrix that
is collected anyway, B = E[g gᵀ] is collected here. Both are means over real tokens, so that a token of a long text
counts as much as one of a short text, and padding counts nowhere.

Labels y come from the model's own distribution. Where there are few outputs the expectation over them is exact: for
vectors v with Σ v vᵀ = E[s sᵀ], s the score (see :mod:`merganser.collection.scores`), Σ (Jᵀv)(Jᵀv)ᵀ over the vectors is
E[g gᵀ], one backward pass for each. Otherwise one label is drawn for each example, or one for each of its tokens in a
sequence, seeded by its own tokens. Examples do not mix, so that one backward pass serves a batch.

Passes of small batches and products are tasks of one thread each, in rounds of a fixed number of batches, so that sums
have one order whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from merganser.checkpoints.layers import Layer, kind_of
from merganser.collection.gram import Gram, Workers
from merganser.collection.inputs import Wiring
from merganser.collection.masks import (
    Batch,
    BatchMasks,
    batch_masks,
    split_by_count,
    split_by_length,
    take_rows,
    widened,
    without_padding,
)
from merganser.collection.per_example import DEVICE_TOKENS, MOST_TOKENS, forward, gradients_of
from merganser.collection.rows import Call, token_rows
from merganser.collection.scores import SEQUENCES, cotangents, scored
from merganser.collection.taps import weight_of
from merganser.errors import StatisticsError
from merganser.statistics import KfacKind
from merganser.tasks.base import Problem
from merganser.tensors import pack_upper
from merganser.text import listed

#: What may be asked for; ``auto`` is ``expected`` where that is a few backward passes, and ``sampled`` otherwise.
KfacChoice = Literal["auto", "expected", "sampled", "empirical"]
FEW_OUTPUTS = 8  # of a head, up to which the expectation over labels is taken by default
WIDEST_OUTPUT = 2**14  # outputs; the (out, out) matrix of more takes over 1 GiB, as that of a vocabulary does
PIECES = 4  # batches of a round, whose graphs and gradients are in memory together
ROUND_BYTES = 2**30  # that these may take; a token's graph is about three times as large as its layers' outputs
FEWEST_TOKENS = 64
_EXPECTED = "the expectation over the labels of a sequence is no sum of a few backward passes"


def output_key(module: str) -> str:
    """The key of the Gram matrix of a layer's output gradients; no module's name has a colon."""
    return f"{module}:output"


def refuse_sequences(kind: KfacChoice | None, problem: Problem | None) -> None:
    """The expectation is exact for one label an example alone.

    Raises:
        StatisticsError: it was asked for where there is a label a token.
    """
    if kind == "expected" and problem in SEQUENCES:
        raise StatisticsError(_EXPECTED, where="--kfac", mend="use --kfac sampled, which draws one label a token")


@dataclass
class _Pass:
    """One batch's forward pass: what its gradients are taken of, and with respect to what.

    Attributes:
        logits: with their graph.
        vectors: whose products with the Jacobian are the gradients.
        calls: the layers' outputs, each with whose rows it holds.
        counts: real rows of each layer.
    """

    masks: BatchMasks
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    vectors: list[Tensor] = field(default_factory=list)
    calls: list[tuple[str, Call, GradientEdge]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)

    def gradients(self, number: int) -> dict[str, list[Tensor]]:
        """Real rows (n, out) of the gradients of one vector's likelihood, by layer; nothing beyond the last vector."""
        found: dict[str, list[Tensor]] = {}
        if number >= len(self.vectors) or not self.calls:
            return found
        edges = [edge for _, _, edge in self.calls]
        gradients = torch.autograd.grad(self.logits, edges, self.vectors[number], retain_graph=True, allow_unused=True)
        for (name, call, _), gradient in zip(self.calls, gradients, strict=True):
            if gradient is None:
                continue
            rows, index = token_rows(gradient, call, self.masks)
            found.setdefault(name, []).append((rows if index is None else rows.index_select(0, index)).float())
        return found


class KfacCollector:
    """Accumulates the covariances of output gradients over batches.

    Attributes:
        kind: whose labels; told by the first batch where it was left open.
        examples: how many were counted.
        notes: what was left out or drawn.

    Args:
        model: in eval mode.
        wiring: whose rows the layers' inputs, and so their outputs, hold.
        choice: see :data:`KfacChoice`.
        workers: run passes and products.
        device: of the model.
        problem: how labels are distributed given logits; None: from configuration and shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        wiring: Wiring,
        choice: KfacChoice,
        workers: Workers,
        device: torch.device,
        problem: Problem | None = None,
    ) -> None:
        self._model, self._wiring, self._workers, self._problem = model, wiring, workers, problem
        self._choice, self._device = choice, device
        self.kind: KfacKind | None = None
        self.examples = 0
        self.notes: list[str] = []
        self._modules: dict[str, str] = {}  # modules → the layer whose weight it is
        widths: dict[str, int] = {}
        reasons: dict[str, list[str]] = {}
        for layer in wiring.layers:
            if layer.kind == "embedding":
                continue
            if reason := _reason_against(model, layer, wiring):
                reasons.setdefault(reason, []).append(layer.module)
                continue
            leader = wiring.groups.get(layer.module, layer.module)
            self._modules[layer.module] = leader
            widths[leader] = _outputs(model, layer)
        if wiring.stacks:
            reasons["experts"] = [stack.module for stack in wiring.stacks]
        self.notes += [f"K-FAC leaves out {listed(names, 3)}: {reason}" for reason, names in reasons.items()]
        self._grams = {name: Gram(width, 0, device) for name, width in widths.items()}
        self._counts: Counter[str] = Counter()
        self._waiting: list[Batch] = []
        self._now = threading.local()
        if device.type != "cpu":
            self._round, self._most = 1, DEVICE_TOKENS
        else:
            most = ROUND_BYTES // (16 * max(1, sum(widths.values())) * PIECES)
            self._round, self._most = PIECES, min(MOST_TOKENS, max(FEWEST_TOKENS, most))

    def add(self, batch: Batch, limit: int | None = None) -> None:
        """Count each example of a batch, at most the first ``limit``.

        Raises:
            DataError: labels are missing or outside the model's label space.
            StatisticsError: the model has no logits, or the expectation is asked for over sequences.
        """
        size = batch_masks(batch, self._model).examples
        stop = size if limit is None else min(size, limit)
        pieces = self._pieces(take_rows(batch, size, slice(stop)))
        if self.kind is None:
            self.kind = self._choose(pieces[0])
            self.notes.append(_described(self.kind))
        self._waiting += pieces
        self.examples += stop
        while len(self._waiting) >= self._round:
            self._run(self._waiting[: self._round])
            del self._waiting[: self._round]

    def result(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Rows of each layer that has any, and the tensors for the file. The collector is used up.

        Raises:
            StatisticsError: no layer has any, or a gradient was infinite or NaN, naming the layer.
        """
        self._run(self._waiting)
        tensors: dict[str, Tensor] = {}
        for name, count in self._counts.items():
            gram = self._grams.pop(name)
            gram.rows = count  # of which each has a gradient for every vector
            packed = pack_upper(gram.mean_product())
            if not bool(torch.isfinite(packed).all()):
                mend = "check the model on these examples; weights in half precision may overflow"
                raise StatisticsError(f"the gradients of {name}'s outputs are infinite or NaN", mend=mend)
            key = output_key(name)
            tensors[f"gram.{key}"], tensors[f"mean.{key}"] = packed, torch.zeros(gram.width)
        if not tensors:
            what = f"K-FAC: no layer's outputs have gradients: {'; '.join(self.notes) or 'none was called'}"
            raise StatisticsError(what, mend="collect without --kfac")
        return dict(self._counts), tensors

    def _pieces(self, batch: Batch) -> list[Batch]:
        """A batch in pieces that memory holds the graph of."""
        if self._wiring.padding_free:
            found = without_padding(batch, self._model)
            rows = [batch_masks(piece, self._model).tokens.mask.shape[1] for piece in found]
            pieces = [
                part
                for piece, length in zip(found, rows, strict=True)
                for part in split_by_count(piece, self._model, max(1, self._most // length))
            ]
        else:
            pieces = split_by_length(batch, self._model, self._most)
        return [widened(piece, self._model, self._wiring.multiple) for piece in pieces]

    def _choose(self, piece: Batch) -> KfacKind:
        """Whose labels, where the choice is open."""
        with torch.no_grad():
            logits = forward(self._model, piece)
        wanted: KfacKind = "expected" if self._choice == "auto" else self._choice
        problem = scored(logits, piece, self._model, wanted, self._problem).problem
        if self._choice == "auto":
            exact = problem not in SEQUENCES and logits.shape[-1] <= FEW_OUTPUTS
            return "expected" if exact else "sampled"
        refuse_sequences(self._choice, problem)
        return wanted

    def _run(self, pieces: list[Batch]) -> None:
        """A round: forward passes at once, then for each vector the gradients at once, then their products."""
        if not pieces:
            return
        passes = [_Pass(batch_masks(piece, self._model)) for piece in pieces]
        work = [partial(self._forward, *one) for one in zip(passes, pieces, strict=True)]
        with self._attached():
            if self._round > 1:
                self._workers.run(work)
            else:
                for task in work:
                    task()
        for one in passes:
            self._counts.update(one.counts)
        found: list[dict[str, list[Tensor]]] = [{} for _ in passes]

        def differentiate(place: int, number: int) -> None:
            found[place] = passes[place].gradients(number)

        for number in range(max(len(one.vectors) for one in passes)):
            tasks = [partial(differentiate, place, number) for place in range(len(passes))]
            if self._round > 1:
                self._workers.run(tasks)
            else:
                tasks[0]()
            products = []
            for name in sorted(self._grams, key=lambda name: -self._grams[name].width):
                blocks = [block for one in found for block in one.pop(name, [])]
                if blocks:
                    products += self._grams[name].add(blocks[0] if len(blocks) == 1 else torch.cat(blocks))
            self._workers.run(products)

    def _forward(self, current: _Pass, piece: Batch) -> None:
        if self.kind is None:
            raise RuntimeError("the first batch tells the kind")
        self._now.forward_pass = current
        try:
            with torch.enable_grad():
                current.logits = forward(self._model, piece)
        finally:
            self._now.forward_pass = None
        outputs = scored(current.logits, piece, self._model, self.kind, self._problem)
        current.vectors = list(cotangents(outputs, self.kind))

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The hooks, for any number of threads; the model's parameters require no gradients."""
        with ExitStack() as hooks:
            hooks.enter_context(gradients_of(self._model, set()))
            for module in self._modules:
                hook = partial(self._after, module)
                hooks.callback(self._model.get_submodule(module).register_forward_hook(hook).remove)
            yield

    def _after(self, module: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Note where the gradient of an output will be known: later changes in place do not matter to an edge."""
        current: _Pass = self._now.forward_pass
        name = self._modules[module]
        number = current.numbers[name]
        current.numbers[name] += 1
        if name in self._wiring.free:
            call: Call | None = Call("all")
        else:
            calls = self._wiring.calls[name]
            if number >= len(calls):
                raise StatisticsError(f"layer {name} is called more often than in the first batch")
            call = calls[number]
        if call is None:  # no tokens
            return None
        try:
            rows, index = token_rows(output.detach(), call, current.masks)
        except ValueError as error:
            raise StatisticsError(
                f"layer {name} does not behave as in the first batch: its output of {error}"
            ) from None
        current.counts[name] += rows.shape[0] if index is None else index.shape[0]
        replaced = None
        if not output.requires_grad:  # gradients flow from the first layers' outputs
            output = output.detach().requires_grad_()
            replaced = output.clone()
        current.calls.append((name, call, get_gradient_edge(output)))
        return replaced


def _reason_against(model: nn.Module, layer: Layer, wiring: Wiring) -> str | None:
    """Why a layer has no output gradients; None: it has."""
    name = wiring.groups.get(layer.module, layer.module)
    if layer.module in wiring.owners or kind_of(model.get_submodule(layer.module)) not in ("linear", "conv1d"):
        return "they are no linear layers that the model calls as such"
    if any(call is not None and call.kind == "each" for call in wiring.calls[name]):
        return "their outputs are the same for all examples"
    if _outputs(model, layer) > WIDEST_OUTPUT:
        return f"they have more than {WIDEST_OUTPUT} outputs, whose covariance takes over 1 GiB"
    return None


def _outputs(model: nn.Module, layer: Layer) -> int:
    """The number of outputs of a linear module."""
    return weight_of(model, layer).shape[kind_of(model.get_submodule(layer.module)) == "conv1d"]


def _described(kind: KfacKind) -> str:
    how = {
        "expected": "in expectation over the model's own labels",
        "sampled": "of labels drawn from the model's own distribution, one an example (in sequences, one a token)",
        "empirical": "of the labels of the data",
    }
    return f"K-FAC: gradients of the log-likelihood {how[kind]}"
