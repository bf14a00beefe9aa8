"""Squared gradients of each example of a batch: three engines that give the same numbers.

An engine cuts batches into pieces (``pieces``), prepares the model for as long as it is used (``attached``), and adds
to sums, for each example and each vector v, the squares of Jᵀv with J the Jacobian of the logits (``add``).

:class:`OneByOne` runs an example at a time through autograd, and works for any model.

:class:`SideBySide` runs a few at once, each with its own view of the parameters, so that autograd keeps their gradients
apart whatever the model does with its parameters: layers called more than once, tied weights, weights that are used
without their layer, computations that are the same for all examples. ``torch.func`` must be able to vectorise the model
(it can for DeBERTa, MPNet, T5, tied heads).

:class:`Separable` runs a batch at once through models made of plain layers that are called once for each example, as
most encoders are. The gradient of example i with respect to a linear layer's weight is g_iᵀ a_i, with a_i (tokens, in)
the layer's input and g_i (tokens, out) the gradient of its output: examples do not mix, so that one backward pass to
the outputs serves the batch (Goodfellow 2015, "Efficient Per-Example Gradient Computations"). Only one such gradient
exists at a time.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from merganser.checkpoints.layers import kind_of
from merganser.collection.masks import (
    MASK,
    Batch,
    batch_masks,
    has_rows,
    model_inputs,
    split_by_count,
    split_by_length,
    split_by_mask,
    take_rows,
    trimmed,
)
from merganser.errors import StatisticsError

#: Bytes of the gradients of examples side by side. As much again is taken by their copies of weights.
COPIES_BYTES = 2**33
MOST_TOKENS = 1024  # padded, whose activations one thread of the CPU holds at once
#: The same on a GPU, where a pass should have thousands of rows to do; in a 24-layer encoder of width 1024 a token has
#: about 1.7 MB of activations, so that these are 14 GB, and 5 GB in a 12-layer one of width 768.
DEVICE_TOKENS = 8192
PRODUCT_BYTES = 2**30  # of the gradients of a weight for several examples, off the CPU

Squares = dict[str, Tensor]
Vectors = Callable[[Tensor], Iterator[Tensor]]


class GradientEngine(Protocol):
    """What :class:`~merganser.collection.fisher.FisherCollector` asks of an engine."""

    def pieces(self, batch: Batch) -> list[Batch]:
        """A batch in the pieces that :meth:`add` takes, without padding that they do not need."""

    def attached(self) -> AbstractContextManager[None]:
        """The model prepared, for any number of threads."""

    def add(self, rows: Batch, vectors: Vectors, squares: Squares) -> None:
        """Add the squared gradients of each example of a piece, by on-disk name."""


class OneByOne:
    """An example at a time through autograd, one backward pass for each vector.

    Args:
        model: in eval mode.
        parameters: on-disk names → parameters.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters

    def pieces(self, batch: Batch) -> list[Batch]:
        """Its examples."""
        return [trimmed(row, self._model) for row in split_by_count(batch, self._model, 1)]

    def attached(self) -> AbstractContextManager[None]:
        """The parameters require gradients."""
        return gradients_of(self._model, set(map(id, self._parameters.values())))

    def add(self, rows: Batch, vectors: Vectors, squares: Squares) -> None:
        """Add the squared gradients of a batch of one example."""
        wanted = list(self._parameters.values())
        with torch.enable_grad():
            logits = forward(self._model, rows)
        for vector in vectors(logits):
            found = torch.autograd.grad(logits, wanted, vector, retain_graph=True, allow_unused=True)
            for name, gradient in zip(self._parameters, found, strict=True):
                if gradient is not None:
                    gradient = gradient.to(torch.float32)
                    squares[name].addcmul_(gradient, gradient)


class SideBySide:
    """A few examples at once under ``torch.func.vmap``, where memory holds a gradient of all parameters for each.

    The model's code runs as for one example, so it must not ask for values: whether a mask has padding is the one
    thing that transformers' models do ask. Therefore the examples of a piece have the same masks, which they share.
    Arguments as of :class:`OneByOne`.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        on_disk = {id(parameter): name for name, parameter in parameters.items()}
        of_model = model.named_parameters()
        self._parameters = {own: (on_disk[id(p)], p) for own, p in of_model if id(p) in on_disk}
        size = 4 * sum(parameter.numel() for parameter in parameters.values())
        self._most = max(1, COPIES_BYTES // max(size, 1))

    def pieces(self, batch: Batch) -> list[Batch]:
        """Examples with the same masks."""
        groups = split_by_mask(batch, self._model)
        return [trimmed(piece, self._model) for one in groups for piece in split_by_count(one, self._model, self._most)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model's own parameters require no gradients; the copies do."""
        with ExitStack() as hooks:
            hooks.enter_context(gradients_of(self._model, set()))
            for module in self._model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    hooks.callback(module.register_forward_hook(_keep_padding).remove)
            yield

    def add(self, rows: Batch, vectors: Vectors, squares: Squares) -> None:
        """Add the squared gradients of each example of a piece, one backward pass for each vector."""
        size = batch_masks(rows, self._model).examples
        copies = {
            name: parameter.detach().expand(size, *parameter.shape).requires_grad_()
            for name, (_, parameter) in self._parameters.items()
        }
        own = {
            key: value.unsqueeze(1) for key, value in rows.items() if has_rows(value, size) and not key.endswith(MASK)
        }
        shared = {key: value for key, value in take_rows(rows, size, slice(1)).items() if key not in own}

        def logits_of(values: dict[str, Tensor], example: Batch) -> Tensor:
            return forward(self._model, {**example, **shared}, values)[0]

        # attention in plain operations: the fused ones do not see, under vmap, that a gradient will be asked for
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = torch.func.vmap(logits_of)(copies, own)
        for vector in vectors(logits):
            found = torch.autograd.grad(logits, list(copies.values()), vector, retain_graph=True, allow_unused=True)
            for (name, _), gradient in zip(self._parameters.values(), found, strict=True):
                if gradient is not None:
                    squares[name] += gradient.to(torch.float32).square().sum(0)


def _keep_padding(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """No gradient for the row of an embedding's padding, which autograd gives none either; vmap forgets that."""
    return torch.where((args[0] == module.padding_idx).unsqueeze(-1), output.detach(), output)


def forward(model: nn.Module, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's logits, with other values of its parameters where they are given.

    Raises:
        StatisticsError: the model has no logits.
    """
    inputs = model_inputs(batch, model)
    output = model(**inputs) if parameters is None else torch.func.functional_call(model, dict(parameters), (), inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        what = f"Fisher information and K-FAC need a model with a head: {type(model).__name__} has no logits"
        raise StatisticsError(what, mend="name the task (--task), or collect without --fisher and --kfac")
    return logits


@contextmanager
def gradients_of(model: nn.Module, wanted: set[int]) -> Iterator[None]:
    """Let only the parameters with these ids require gradients, while the context lasts."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


class NotSeparable(Exception):
    """This model's gradients cannot be taken apart by example from one backward pass."""


@dataclass(frozen=True)
class _LayerCall:
    """One layer's input and output in one forward pass, both with the batch first."""

    layer: str
    input: Tensor
    output: Tensor


class Separable:
    """Squared per-example gradients of a batch.

    Args:
        model: in eval mode.
        parameters: on-disk names → parameters.

    Raises:
        NotSeparable: a parameter is used by several layers, or by none that can be treated alone.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._now = threading.local()  # of each thread: size of its batch, and the calls so far
        self._layers: dict[str, nn.Module] = {}
        self._names: dict[str, dict[str, str]] = {}  # layer → attribute → on-disk name
        owners: dict[int, str] = {}
        for layer, module in model.named_modules():
            own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in names}
            if not own:
                continue
            if next(module.children(), None) is not None:
                raise NotSeparable(f"{layer} has parameters of its own beside its layers")
            for parameter in own.values():
                if id(parameter) in owners:
                    raise NotSeparable(f"{layer} and {owners[id(parameter)]} share a parameter")
                owners[id(parameter)] = layer
            self._layers[layer] = module
            self._names[layer] = {key: names[id(p)] for key, p in own.items()}

    def pieces(self, batch: Batch) -> list[Batch]:
        """Examples of similar length, not too many for memory."""
        on_cpu = next(self._model.parameters()).device.type == "cpu"
        return split_by_length(batch, self._model, MOST_TOKENS if on_cpu else DEVICE_TOKENS)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, for any number of threads; the model's parameters require no gradients."""
        with ExitStack() as hooks:
            hooks.enter_context(gradients_of(self._model, set()))
            for layer, module in self._layers.items():
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_pre_hook(self._before).remove)
                hooks.callback(module.register_forward_hook(partial(self._after, layer)).remove)
            yield

    def add(self, rows: Batch, vectors: Vectors, squares: Squares) -> None:
        """Add the squared gradients of each example of a piece, one backward pass for each vector.

        Raises:
            NotSeparable: a layer is called more than once, or on inputs that are not one for each example.
        """
        self._now.size = next(v.shape[0] for v in rows.values() if isinstance(v, Tensor) and v.ndim)
        calls: list[_LayerCall] = []
        self._now.calls = calls
        with torch.enable_grad():
            logits = forward(self._model, rows)
        outputs = [call.output for call in calls]
        for vector in vectors(logits):
            found = torch.autograd.grad(logits, outputs, vector, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                for call, gradient in zip(calls, found, strict=True):
                    if gradient is not None:
                        self._square(call, gradient, squares)

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, size = args[0], self._now.size
        if ids.ndim == 2 and ids.shape[0] == 1 and size > 1:  # positions, the same for each example
            return (ids.expand(size, -1), *args[1:])
        return args

    def _after(self, layer: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x, size = args[0] if args else None, self._now.size
        if any(call.layer == layer for call in self._now.calls):
            raise NotSeparable(f"{layer} is called more than once")
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise NotSeparable(f"{layer} is no function of one tensor")
        if not x.ndim or x.shape[0] != size or output.shape[0] != size:
            raise NotSeparable(f"{layer} sees {list(x.shape)}, not {size} examples")
        if not output.requires_grad:  # gradients flow from the first layers' outputs
            output = output.detach().requires_grad_()
        self._now.calls.append(_LayerCall(layer, x.detach(), output))
        return output

    def _square(self, call: _LayerCall, gradient: Tensor, squares: Squares) -> None:
        module, names = self._layers[call.layer], self._names[call.layer]
        kind = kind_of(module)
        if isinstance(module, nn.Embedding):
            _embedding(squares[names["weight"]], call.input, gradient, module.padding_idx)
        elif kind in ("linear", "conv1d"):
            x, g = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (call.input, gradient))
            if "weight" in names:
                left, right = (x, g) if kind == "conv1d" else (g, x)
                _products(squares[names["weight"]], left, right)
            if "bias" in names:
                squares[names["bias"]] += g.sum(1).to(torch.float32).square().sum(0)
        else:
            _generic(module, names, call.input, gradient, squares)


def _products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add Σ_i (left_iᵀ right_i)² for left (B, T, m) and right (B, T, n) to ``total`` (m, n)."""
    left, right = left.to(torch.float32), right.to(torch.float32)
    if total.device.type != "cpu":  # many examples in one launch
        most = max(1, PRODUCT_BYTES // (4 * total.numel()))
        for x, y in zip(left.split(most), right.split(most), strict=True):
            total += torch.bmm(x.mT, y).square_().sum(0)
        return
    product = torch.empty_like(total)
    for x, y in zip(left, right, strict=True):
        torch.mm(x.T, y, out=product)
        total.addcmul_(product, product)


def _embedding(total: Tensor, ids: Tensor, gradient: Tensor, padding: int | None) -> None:
    """Add each example's squared gradient of an embedding's rows; an id's occurrences are summed first."""
    vocabulary, width = total.shape
    example = torch.arange(ids.shape[0], device=ids.device).reshape(-1, *[1] * (ids.ndim - 1))
    keys, places = (example * vocabulary + ids).reshape(-1).unique(return_inverse=True)
    sums = gradient.new_zeros(len(keys), width, dtype=torch.float32)
    sums.index_add_(0, places, gradient.reshape(-1, width).to(torch.float32))
    rows = keys % vocabulary
    if padding is not None:  # autograd gives that row no gradient either
        sums[rows == padding] = 0
    total.index_add_(0, rows, sums.square_())


def _generic(module: nn.Module, names: dict[str, str], x: Tensor, gradient: Tensor, squares: Squares) -> None:
    """Any other layer that treats examples alone (norms): its own gradient, example by example."""
    parameters = {key: p.detach() for key, p in module.named_parameters() if key in names}
    module = _copy(module)

    def product(values: dict[str, Tensor], xi: Tensor, gi: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, values, (xi.unsqueeze(0),))
        return (output * gi.unsqueeze(0)).sum()

    per_example = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))
    for key, values in per_example(parameters, x, gradient).items():
        squares[names[key]] += values.to(torch.float32).square().sum(0)


def _copy(module: nn.Module) -> nn.Module:
    """The same layer without hooks, whose parameters can be exchanged while other threads use the original."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin
