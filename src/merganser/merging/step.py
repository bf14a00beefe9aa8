"""One piece of a merge's work, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from merganser.merging.rows import Rows
from merganser.methods import Unit


@dataclass(frozen=True)
class Step:
    """One piece of work.

    Attributes:
        unit: the tensors, by the first contributor's names.
        method: the method really used: that of the plan, ``average``, or ``copy`` for what is no floating point.
        reason: why it is not the plan's method.
        rows: which rows of which contributor answer to which of the result, where they differ.
        slice_rows: how many rows of the unit's stack are merged at once; None: all.
        nbytes: estimate of the memory that it takes at its worst moment.
    """

    unit: Unit
    method: str
    reason: str | None = None
    rows: Rows | None = None
    slice_rows: int | None = None
    nbytes: int = 0
