"""Per-example diagonal Fisher information, exact for each parameter: squared per example, then averaged.

The engines of :mod:`merganser.collection.per_example` give the same numbers.
:class:`~merganser.collection.per_example.Separable` comes first. Where a model is not made for it,
:class:`~merganser.collection.per_example.SideBySide` is tried on a GPU, which one example leaves idle; a CPU spends its
time on the gradients of all parameters for each example, and gains nothing. Which one applies is found out on the first
examples, against :class:`~merganser.collection.per_example.OneByOne`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from merganser.collection.gram import Workers
from merganser.collection.masks import Batch, batch_masks, take_rows
from merganser.collection.per_example import GradientEngine, NotSeparable, OneByOne, Separable, SideBySide, Squares
from merganser.collection.probes import probe
from merganser.collection.scores import cotangents, describe_scores, scored
from merganser.errors import StatisticsError
from merganser.statistics import FisherKind
from merganser.tasks.base import Problem

AGREEMENT = 2e-3  # of a tensor's largest value, between the engines
ROUNDING = 1e-5  # of the largest gradient of all: what is smaller may be rounding
MOST_LANES, LANE_BYTES = 4, 2**30  # sums that are kept apart, and their memory in all
#: Engines faster than going one by one, in the order in which they are tried.
ON_CPU = (Separable,)
ELSEWHERE = (Separable, SideBySide)


class FisherCollector:
    """Accumulates Fisher information over batches.

    Pieces of batches go to a few lanes in turn, whose number depends on the size of the model alone. A lane
    is one task on one thread and has sums of its own, so that these have one order whatever the number of
    threads. A model too large for two lanes, or on another device, uses the threads inside torch instead.

    Args:
        model: in eval mode.
        names: parameter names → on-disk names; parameters that are absent are left out.
        kind: ``expected``, ``empirical`` or ``predicted``.
        workers: run the lanes.
        problem: see :mod:`merganser.collection.scores`; None: from configuration and shapes.
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
        self._on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters.values())
        lanes = max(1, min(MOST_LANES, LANE_BYTES // max(size, 1))) if self._on_cpu else 1
        self._lanes = [_zeros(self._parameters) for _ in range(lanes)]
        self._waiting: list[Batch] = []
        self._assigned = 0
        self._engine: GradientEngine | None = None
        self._remarks: set[str] = set()
        self.examples = 0
        self.notes: list[str] = []

    def add(self, batch: Batch, limit: int | None = None) -> None:
        """Add each example of a batch, at most the first ``limit``.

        Raises:
            DataError: labels are missing or outside the model's label space.
            StatisticsError: the model has no logits, or the kind has no meaning for the problem.
        """
        if self._engine is None:
            self._engine = self._choose(batch)
        size = batch_masks(batch, self._model).examples
        stop = size if limit is None else min(size, limit)
        self._waiting += self._engine.pieces(take_rows(batch, size, slice(stop)))
        self.examples += stop
        if len(self._waiting) >= 4 * len(self._lanes):
            self._run(self._engine)

    def result(self) -> Squares:
        """The mean over examples, float32, by on-disk name. The collector is used up.

        Raises:
            StatisticsError: a gradient was infinite or NaN, naming the parameter.
        """
        if self._engine is not None:
            self._run(self._engine)
        total, *others = self._lanes
        for name, values in total.items():
            for lane in others:
                values += lane.pop(name)
            values /= max(self.examples, 1)
            if not bool(torch.isfinite(values).all()):
                mend = "check the model on these examples; weights in half precision may overflow"
                raise StatisticsError(f"the gradient of {name} is infinite or NaN", mend=mend)
        self.notes += sorted(self._remarks)
        return {name: values.cpu() for name, values in total.items()}

    def _run(self, engine: GradientEngine) -> None:
        """Add what waits, each piece in the lane whose turn it is."""
        waiting, self._waiting = self._waiting, []
        lanes = len(self._lanes)
        shares = [waiting[(lane - self._assigned) % lanes :: lanes] for lane in range(lanes)]
        self._assigned += len(waiting)

        def task(share: list[Batch], lane: Squares) -> None:
            for rows in share:
                engine.add(rows, partial(self._vectors, rows), lane)

        tasks = [partial(task, share, lane) for share, lane in zip(shares, self._lanes, strict=True)]
        with engine.attached():
            if lanes > 1:
                self._workers.run(tasks)
            else:
                tasks[0]()

    def _choose(self, batch: Batch) -> GradientEngine:
        """The first engine that gives on a few examples what going one by one gives."""
        few = probe(batch, self._model)
        slow = OneByOne(self._model, self._parameters)
        exact: Squares | None = None
        reasons = []
        for make in ON_CPU if self._on_cpu else ELSEWHERE:
            try:
                engine: GradientEngine = make(self._model, self._parameters)
                # whole for Separable: no size of a probe is the same as another, so that no layer's shape is misread
                found = self._squares(engine, [few] if make is Separable else engine.pieces(few))
            except (NotSeparable, RuntimeError, TypeError, ValueError) as error:
                reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
                continue
            exact = self._squares(slow, slow.pieces(few)) if exact is None else exact
            wrong = _difference(found, exact)
            if wrong is None:
                return engine
            reasons.append(f"batched gradients of {wrong} differ")
        self.notes.append(f"Fisher information one example at a time: {'; '.join(reasons)}")
        return slow

    def _squares(self, engine: GradientEngine, pieces: list[Batch]) -> Squares:
        squares = _zeros(self._parameters)
        with engine.attached():
            for rows in pieces:
                engine.add(rows, partial(self._vectors, rows), squares)
        return squares

    def _vectors(self, rows: Batch, logits: Tensor) -> Iterator[Tensor]:
        outputs = scored(logits, rows, self._model, self._kind, self._problem)
        self._remarks.update(describe_scores(outputs, self._kind))
        return cotangents(outputs, self._kind)


def _difference(found: Squares, exact: Squares) -> str | None:
    """The first tensor in which an engine does not agree with going one by one."""
    # gradients that are zero but for rounding (biases of keys in attention) agree only beside others
    rounding = ROUNDING**2 * max(float(values.max()) for values in exact.values())
    for name, values in exact.items():
        if not float((found[name] - values).abs().max()) <= AGREEMENT * float(values.max()) + rounding:
            return name
    return None


def _zeros(parameters: Mapping[str, nn.Parameter]) -> Squares:
    return {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}
