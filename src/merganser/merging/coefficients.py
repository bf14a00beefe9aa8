"""What coefficients that sum to zero leave without a meaning, found before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merganser.errors import RecipeError
from merganser.merging.plan import AVERAGE, BUFFER, Step
from merganser.methods.base import sums_to_zero
from merganser.text import listed

_FEW = 3  # tensors that are named


def check_averages(steps: Sequence[Step], titles: Sequence[str]) -> None:
    """Where coefficients sum to zero, nothing may be averaged by them: whole tensors, and rows that only some have.

    Args:
        steps: of the plan.
        titles: of the contributors.

    Raises:
        RecipeError: naming the tensors.
    """
    if all(coefficient > 0 for step in steps for coefficient in step.coefficients):
        return
    averaged = [name for step in steps if _is_undefined(step) for name in step.unit.names]
    if averaged:
        named = listed([repr(name) for name in averaged], _FEW)
        what = f"coefficients that sum to zero have no average, and {named} would be averaged"
        mend = f"--keep-separate {averaged[0]!r}, so that each contributor keeps its own, or give another sum"
        raise RecipeError(what, where="coefficients", mend=mend)
    for step in steps:
        for owners in _undefined_owners(step):
            named = ", ".join(titles[number] for number in owners)
            raise RecipeError(
                f"rows of {step.unit.names[0]!r} belong to {named} alone, whose coefficients sum to zero",
                mend="give at least one of them another coefficient",
            )


def _is_undefined(step: Step) -> bool:
    """Whether whole tensors are divided by coefficients that sum to zero; buffers are copied where they agree."""
    method = step.treatment
    divided = step.method == AVERAGE if method is None else method.needs.normalised
    if not divided or step.reason == BUFFER or step.rows is not None:
        return False
    return sums_to_zero([step.coefficients[number] for number in step.takers])


def _undefined_owners(step: Step) -> Iterator[Sequence[int]]:
    """Of rows that are divided by the sum of their owners' coefficients, the owners where that is zero."""
    if step.rows is None:
        return
    method = step.treatment
    for _, owners, based in step.rows.groups():
        adds = method is not None and not method.needs.normalised and (based or not method.needs.base)
        if owners and not adds and sums_to_zero([step.coefficients[number] for number in owners]):
            yield owners
