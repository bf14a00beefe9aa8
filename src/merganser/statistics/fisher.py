"""Per-example diagonal Fisher information, exact for each parameter: squared per example, then averaged.

Two engines give the same numbers. :func:`one_by_one` runs an example at a time through autograd and works
for any model. :class:`Separable` runs a batch at once and takes each layer's per-example gradients from its
input and its output's gradient, without any of them for two layers at a time; it needs every parameter to
belong to one plain layer that is called once for each example, as in most encoders. Whether it applies is
tried out on the first examples, against the other engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from merganser.errors import StatisticsError
from merganser.statistics.format import FisherKind
from merganser.statistics.gram import Workers
from merganser.statistics.inputs import probe
from merganser.statistics.masks import batch_masks, model_inputs
from merganser.statistics.pieces import Batch, by_length, take_rows, trimmed
from merganser.statistics.scores import SAMPLES, Problem, cotangents, scored
from merganser.statistics.separable import NotSeparable, Separable

MOST_TOKENS = 1024  # padded, whose activations one thread holds at once
AGREEMENT = 2e-3  # of a tensor's largest value, between the engines
ROUNDING = 1e-5  # of the largest gradient of all: what is smaller may be rounding
MOST_LANES, LANE_BYTES = 4, 2**30  # sums that are kept apart, and their memory in all

Squares = dict[str, Tensor]


class FisherCollector:
    """Accumulates Fisher information over batches.

    Pieces of batches are dealt out to a few lanes, whose number depends on the size of the model alone. A lane
    is one task on one thread and has sums of its own, so that these have one order whatever the number of
    threads. A model too large for two lanes, or on another device, uses the threads inside torch instead.

    Args:
        model: in eval mode.
        names: parameter names → on-disk names; parameters that are absent are left out.
        kind: ``expected``, ``empirical`` or ``predicted``.
        workers: run the lanes.
        problem: see :mod:`merganser.statistics.scores`; None: from configuration and shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        kind: FisherKind,
        workers: Workers,
        problem: Problem | None = None,
    ) -> None:
        self._model, self._kind, self._problem, self._workers = model, kind, problem, workers
        self._parameters = {
            names[name]: parameter
            for name, parameter in model.named_parameters()
            if name in names and parameter.is_floating_point()
        }
        size = 4 * sum(parameter.numel() for parameter in self._parameters.values())
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters.values())
        lanes = max(1, min(MOST_LANES, LANE_BYTES // max(size, 1))) if on_cpu else 1
        self._lanes = [_zeros(self._parameters) for _ in range(lanes)]
        self._waiting: list[Batch] = []
        self._dealt = 0
        self._separable: Separable | None = None
        self._tried = self._sampled = False
        self.examples = 0
        self.notes: list[str] = []

    def add(self, batch: Batch, limit: int | None = None) -> int:
        """Add each example of a batch, at most the first ``limit``; how many there were is returned.

        Raises:
            DataError: labels are missing or outside the model's label space.
            StatisticsError: the model has no logits, or the kind has no meaning for the problem.
        """
        if not self._tried:
            self._try(batch)
        size = batch_masks(batch, self._model).examples
        stop = size if limit is None else min(size, limit)
        if self._separable:
            self._waiting += by_length(take_rows(batch, size, slice(stop)), self._model, MOST_TOKENS)
        else:
            rows = (take_rows(batch, size, slice(row, row + 1)) for row in range(stop))
            self._waiting += [trimmed(row, self._model) for row in rows]
        self.examples += stop
        if len(self._waiting) >= 4 * len(self._lanes):
            self._run()
        return stop

    def result(self) -> Squares:
        """The mean over examples, float32, by on-disk name. The collector is used up.

        Raises:
            StatisticsError: a gradient was infinite or NaN, naming the parameter.
        """
        self._run()
        total, *others = self._lanes
        for name, values in total.items():
            for lane in others:
                values += lane.pop(name)
            values /= max(self.examples, 1)
            if not bool(torch.isfinite(values).all()):
                raise StatisticsError(
                    f"the gradient of {name} is infinite or NaN",
                    mend="check the model on these examples; weights in half precision may overflow",
                )
        if self._sampled:
            self.notes.append(
                f"Fisher information over sequences: {SAMPLES} sampled label sequences an example"
            )
        return {name: values.cpu() for name, values in total.items()}

    def _run(self) -> None:
        """Add what waits, each piece in the lane whose turn it is."""
        waiting, self._waiting = self._waiting, []
        lanes = len(self._lanes)
        hands: list[list[Batch]] = [[] for _ in range(lanes)]
        for rows in waiting:
            hands[self._dealt % lanes].append(rows)
            self._dealt += 1

        def task(hand: list[Batch], lane: Squares) -> None:
            for rows in hand:
                self._squares_of(rows, self._separable, lane)

        tasks = [partial(task, hand, lane) for hand, lane in zip(hands, self._lanes, strict=True)]
        with self._ready(self._separable):
            if lanes > 1:
                self._workers.run(tasks)
            else:
                tasks[0]()

    def _try(self, batch: Batch) -> None:
        """Compare the engines on a few examples, and take the faster one only if it gives the same."""
        self._tried = True
        few = probe(batch, self._model)
        ours, theirs = _zeros(self._parameters), _zeros(self._parameters)
        try:
            candidate = Separable(self._model, self._parameters)
            with self._ready(candidate):
                self._squares_of(few, candidate, ours)
        except (NotSeparable, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.notes.append(f"Fisher information one example at a time: {reason}")
            return
        size = batch_masks(few, self._model).examples
        with self._ready(None):
            for row in range(size):
                self._squares_of(take_rows(few, size, slice(row, row + 1)), None, theirs)
        # gradients that are zero but for rounding (biases of keys in attention) agree only beside others
        rounding = ROUNDING**2 * max(float(exact.max()) for exact in theirs.values())
        for name, exact in theirs.items():
            if not float((ours[name] - exact).abs().max()) <= AGREEMENT * float(exact.max()) + rounding:
                self.notes.append(
                    f"Fisher information one example at a time: batched gradients of {name} differ"
                )
                return
        self._separable = candidate

    @contextmanager
    def _ready(self, engine: Separable | None) -> Iterator[None]:
        """The model prepared for an engine, on any number of threads."""
        wanted = set() if engine else set(map(id, self._parameters.values()))
        with gradients_of(self._model, wanted), engine.attached() if engine else nullcontext():
            yield

    def _squares_of(self, rows: Batch, engine: Separable | None, squares: Squares) -> None:
        def vectors(logits: Tensor) -> Iterator[Tensor]:
            outputs = scored(logits, rows, self._model, self._kind, self._problem)
            self._sampled |= self._kind == "expected" and outputs.where is not None
            return cotangents(outputs, self._kind)

        if engine is not None:
            engine.add(rows, forward, vectors, squares)
        else:
            one_by_one(self._model, rows, self._parameters, vectors, squares)


def one_by_one(
    model: nn.Module,
    example: Batch,
    parameters: Mapping[str, nn.Parameter],
    vectors: Callable[[Tensor], Iterator[Tensor]],
    squares: Squares,
) -> None:
    """Add the squared gradients of a batch of one example, one backward pass for each vector."""
    wanted = list(parameters.values())
    with torch.enable_grad():
        logits = forward(model, example)
    for vector in vectors(logits):
        found = torch.autograd.grad(logits, wanted, vector, retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradient = gradient.to(torch.float32)
                squares[name].addcmul_(gradient, gradient)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits.

    Raises:
        StatisticsError: the model has no logits.
    """
    logits = getattr(model(**model_inputs(batch, model)), "logits", None)
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


def _zeros(parameters: Mapping[str, nn.Parameter]) -> Squares:
    return {
        name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()
    }
