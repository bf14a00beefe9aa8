"""Squared gradients of each example of a batch, for any model: the engines that know nothing of its layers.

An engine cuts batches into pieces (``pieces``), prepares the model for as long as it is used (``attached``), and adds
to sums, for each example and each vector v, the squares of Jᵀv with J the Jacobian of the logits (``add``).
:class:`OneByOne` runs an example at a time. :class:`SideBySide` runs a few at once, each with its own view of the
parameters, so that autograd keeps their gradients apart whatever the model does with its parameters: layers called more
than once, tied weights, weights that are used without their layer, computations that are the same for all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from merganser.errors import StatisticsError
from merganser.statistics.masks import batch_masks, model_inputs
from merganser.statistics.pieces import MASK, Batch, has_rows, in_runs, take_rows, trimmed, with_one_mask

COPIES_BYTES = (
    2**33
)  # of the gradients of examples side by side; as much again is taken by their copies of weights

Squares = dict[str, Tensor]
Vectors = Callable[[Tensor], Iterator[Tensor]]


class Engine(Protocol):
    """What :class:`~merganser.statistics.fisher.FisherCollector` asks of an engine."""

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
        return [trimmed(row, self._model) for row in in_runs(batch, self._model, 1)]

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
        self._parameters = {
            own: (on_disk[id(parameter)], parameter)
            for own, parameter in model.named_parameters()
            if id(parameter) in on_disk
        }
        size = 4 * sum(parameter.numel() for parameter in parameters.values())
        self._most = max(1, COPIES_BYTES // max(size, 1))

    def pieces(self, batch: Batch) -> list[Batch]:
        """Examples with the same masks."""
        groups = with_one_mask(batch, self._model)
        return [
            trimmed(piece, self._model) for one in groups for piece in in_runs(one, self._model, self._most)
        ]

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
            key: value.unsqueeze(1)
            for key, value in rows.items()
            if has_rows(value, size) and not key.endswith(MASK)
        }
        shared = {key: value for key, value in take_rows(rows, size, slice(1)).items() if key not in own}

        def logits_of(values: dict[str, Tensor], example: Batch) -> Tensor:
            return forward(self._model, {**example, **shared}, values)[0]

        # attention in plain operations: the fused ones do not see, under vmap, that a gradient will be asked for
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = torch.func.vmap(logits_of)(copies, own)
        for vector in vectors(logits):
            found = torch.autograd.grad(
                logits, list(copies.values()), vector, retain_graph=True, allow_unused=True
            )
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
    output = (
        model(**inputs)
        if parameters is None
        else torch.func.functional_call(model, dict(parameters), (), inputs)
    )
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise StatisticsError(
            f"Fisher information needs a model with a head: {type(model).__name__} has no logits",
            mend="name the task (--task), or collect without --fisher",
        )
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
