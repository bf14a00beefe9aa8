"""Fitting the work into memory: tall units are cut into slices, and fewer are worked on at once.

A slice that costs nothing (elementwise work) is cut wherever a unit is large. One that has a price, such as reading
Gram matrices a second time, is cut only where memory asks for it. What can be cut at all is the method's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from merganser.errors import RecipeError, UserError, raise_all
from merganser.merging.step import Step
from merganser.methods import Method
from merganser.methods.base import elements

#: Numbers of a slice where slices cost nothing: few enough for the processor's caches, enough to keep it busy.
SLICE = 1 << 19
SMALL = 64 * 2**20  # bytes of a unit that it is no use to cut
#: What the process takes beside tensors once it works: thread stacks, the libraries' own buffers.
OWN_BYTES = 24 * 2**20
#: Slices of the slicing, as read and as written, beside what the method holds.
_PIECES = 3


def fit(
    steps: Sequence[Step], method: Method, contributors: int, threads: int, resident: int, max_memory: int | None
) -> tuple[list[Step], int]:
    """The steps with slices and memory spelled out, and the bytes that may be taken by those worked on at once.

    Raises:
        RecipeError: a unit that cannot be cut small enough; several come as ``Problems``.
    """
    room = None if max_memory is None else max_memory - resident
    if room is not None and room <= 0:
        raise RecipeError(
            f"the process itself takes {resident / 1e9:.2f} GB, without a single tensor",
            where=f"max_memory: {(max_memory or 0) / 1e9:.2f} GB",
            mend="allow more memory",
        )
    fitted, problems = [], list[UserError]()
    for step in steps:
        step = _cut(step, method, contributors, room)
        fitted.append(step)
        if room is not None and step.nbytes > room:
            problems.append(
                RecipeError(
                    f"{step.unit.names[0]!r} needs {(step.nbytes + resident) / 1e9:.2f} GB at once"
                    + ("" if min_slice_rows(step, method) else " and cannot be cut into rows"),
                    where=f"max_memory: {(max_memory or 0) / 1e9:.2f} GB",
                    mend="allow more memory, or exclude this tensor (--exclude), which averages it",
                )
            )
    raise_all(problems)
    return fitted, busiest(fitted, threads) if room is None else room


def busiest(steps: Sequence[Step], threads: int) -> int:
    """The memory of the costliest steps that could be worked on together."""
    return sum(sorted((step.nbytes for step in steps), reverse=True)[:threads])


def _cut(step: Step, method: Method, contributors: int, room: int | None) -> Step:
    whole = replace(step, nbytes=step_bytes(step, method, contributors))
    least = min_slice_rows(step, method)
    if least is None:
        return whole
    height = step.unit.height()
    rows = height
    if least == 1:
        rows = max(1, SLICE // max(1, elements(step.unit) // max(height, 1)))
    if rows >= height and (room is None or whole.nbytes <= room):
        return whole
    cut = replace(step, slice_rows=rows)
    cut = replace(cut, nbytes=step_bytes(cut, method, contributors))
    while room is not None and cut.nbytes > room and rows > least:
        rows = max(least, rows // 2 // least * least)
        cut = replace(step, slice_rows=rows)
        cut = replace(cut, nbytes=step_bytes(cut, method, contributors))
    return cut


def min_slice_rows(step: Step, method: Method) -> int | None:
    """The fewest rows that can be merged apart; None where only the whole can."""
    if step.rows is not None or step.method == "copy" or not step.unit.height():
        return None
    return 1 if step.method == "average" else method.min_slice_rows(step.unit)


def step_bytes(step: Step, method: Method, contributors: int) -> int:
    """Estimate of the memory that a step takes at its worst moment."""
    unit = step.unit
    if step.slice_rows is not None:
        unit, _ = unit.cut(0, step.slice_rows)
    largest = max((prod(fact.shape) for fact in unit.facts), default=0)
    if step.method in ("average", "copy"):
        return elements(unit) * 4 * 4 + largest * 4 * _PIECES
    return method.memory(unit, contributors) + largest * 4 * _PIECES
