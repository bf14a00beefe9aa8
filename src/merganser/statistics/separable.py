"""Per-example gradients of a whole batch from one backward pass, for models made of plain layers.

The gradient of example i with respect to a linear layer's weight is g_iᵀ a_i, with a_i (tokens, in) the
layer's input and g_i (tokens, out) the gradient of its output: examples do not mix, so that one backward
pass to the outputs serves the batch (Goodfellow 2015, "Efficient Per-Example Gradient Computations"). Only
one such gradient exists at a time.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import kind_of
from merganser.statistics.per_example import Squares, Vectors, forward, gradients_of
from merganser.statistics.pieces import Batch, by_length

MOST_TOKENS = 1024  # padded, whose activations one thread of the CPU holds at once
#: The same on a GPU, where a pass should have thousands of rows to do; in a 24-layer encoder of width 1024 a token has
#: about 1.7 MB of activations, so that these are 14 GB, and 5 GB in a 12-layer one of width 768.
DEVICE_TOKENS = 8192
PRODUCT_BYTES = 2**30  # of the gradients of a weight for several examples, off the CPU


class NotSeparable(Exception):
    """This model's gradients cannot be taken apart by example from one backward pass."""


@dataclass(frozen=True)
class _Call:
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
        return by_length(batch, self._model, MOST_TOKENS if on_cpu else DEVICE_TOKENS)

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
        calls: list[_Call] = []
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
        self._now.calls.append(_Call(layer, x.detach(), output))
        return output

    def _square(self, call: _Call, gradient: Tensor, squares: Squares) -> None:
        module, names = self._layers[call.layer], self._names[call.layer]
        kind = kind_of(module)
        if isinstance(module, nn.Embedding):
            _embedding(squares[names["weight"]], call.input, gradient, module.padding_idx)
        elif kind is not None:
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
