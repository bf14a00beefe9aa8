"""Carrying out a plan: steps are read, worked on and handed to a target one by one, on a bounded pool of threads.

Each step is computed on one thread, tall ones slice by slice, so the bytes do not depend on how many threads there
are nor on the memory that they may take. Inputs are read in the order of the files, the few largest steps first, and
hashed on the way. What is done for a step (merging, adding to sums, solving sums) and where it goes (a checkpoint, an
adapter, a ledger) are two objects; everything else is here, once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merganser.errors import RecipeError
from merganser.merging.memory import Budget, Schedule
from merganser.merging.plan import Step
from merganser.methods import Merged
from merganser.methods.base import elements
from merganser.progress import bar
from merganser.tensors import is_finite, one_thread

#: A step is large if the whole merge takes only this many times as long, on all threads.
_PATIENCE = 20
#: A slice of a step: the first row of each tensor in it, and the tensors.
Slice = tuple[Mapping[str, int], Merged]


class Work(Protocol):
    """What is done for each step.

    Attributes:
        mend: what to do about steps that cannot be computed.
    """

    mend: str

    def slices(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """The results of a step, ``rows`` of its stack at a time, in order; None: all at once."""

    def prefetch(self, step: Step) -> None:
        """Have the system read ahead what a step needs."""


class Target(Protocol):
    """Where results go. Steps come from several threads, the slices of one step in order.

    Attributes:
        total: bytes of the work, for the bar.
    """

    total: int

    def take(self, step: Step, firsts: Mapping[str, int], merged: Merged) -> int:
        """One slice of a step; returns how many bytes of the work are done with it."""

    def finish(self, step: Step, note: str | None) -> None:
        """The step is whole; what was noteworthy about it."""


def execute(schedule: Schedule, work: Work, target: Target, description: str = "merging") -> None:
    """Do the steps of a schedule.

    Raises:
        UserError: non-finite numbers in or out, a step that cannot be computed; the first of the plan's order.
    """
    failed, budget = threading.Event(), Budget(schedule.budget)
    fitted = {id(s): (r, n) for s, r, n in zip(schedule.steps, schedule.rows, schedule.sizes, strict=True)}
    steps, futures = longest_first(schedule.steps, schedule.threads), list[Future[None]]()

    def run(step: Step, rows: int | None, nbytes: int) -> None:
        with budget.returning(nbytes):
            try:
                notes: dict[str, None] = {}
                for firsts, merged in work.slices(step, rows):
                    notes |= {merged.note: None} if merged.note else {}
                    progress.update(target.take(step, firsts, merged))
                target.finish(step, "; ".join(notes) or None)
            except ValueError as error:
                failed.set()
                raise RecipeError(f"{', '.join(step.unit.names)}: {error}", mend=work.mend) from None
            except BaseException:
                failed.set()
                raise

    with (
        one_thread(),
        bar(target.total, description, "B", scale=True) as progress,
        ThreadPoolExecutor(schedule.threads) as pool,
    ):
        try:
            for number, step in enumerate(steps):
                for later in steps[number + 1 : number + 1 + schedule.threads]:
                    work.prefetch(later)
                rows, nbytes = fitted[id(step)]
                budget.draw(nbytes)
                if failed.is_set():
                    break
                futures.append(pool.submit(run, step, rows, nbytes))
            for future in futures:  # in the order of the plan: the same mistake is reported every time
                future.result()
        finally:
            for future in futures:
                future.cancel()


def longest_first(steps: Sequence[Step], threads: int) -> list[Step]:
    """The steps in the order of the plan, but first those so large that others would wait for one at the end."""
    sizes = [elements(step.unit) for step in steps]
    large = sum(sizes) / (_PATIENCE * threads)
    return sorted(steps, key=lambda step: elements(step.unit) <= large)


@dataclass(frozen=True)
class TensorRecord:
    """What became of one tensor: its hash, the method really used, why it is not the one asked for, and a note."""

    blake3: str
    method: str
    reason: str | None
    note: str | None


def storable(tensor: Tensor, dtype: torch.dtype, name: str, method: str) -> Tensor:
    """A result as it is stored, on the CPU.

    Raises:
        RecipeError: it is not finite.
    """
    stored = tensor.to("cpu", dtype).contiguous()
    if dtype.is_floating_point and not is_finite(stored):
        raise RecipeError(
            f"{method} produced NaN or Inf in {name!r} (stored as {str(dtype).removeprefix('torch.')})",
            mend="use a wider --dtype, a larger ridge, or exclude this tensor (--exclude)",
        )
    return stored
