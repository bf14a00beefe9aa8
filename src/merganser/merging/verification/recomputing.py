"""Tensors of a merge computed again and held against those that are there: all of them, or a sample."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.header import TensorInfo, read_infos
from merganser.errors import CheckpointError, UserError
from merganser.merging.activations import recorded_activations
from merganser.merging.execution import Merging, Work, execute
from merganser.merging.inputs import Inputs
from merganser.merging.memory import RunSettings, fit
from merganser.merging.plan import Plan, Step
from merganser.merging.targets.checkpoint import RecordingTarget, make_layout
from merganser.tensors import DTYPES

#: How far off a tensor may be where rounding is let be, relative to its largest number; of narrow dtypes, a digit.
ROUNDING = 1e-5
_FEW = 5  # tensors that a message names


@dataclass
class Deviation:
    """How far a tensor in the files is from the same computed again.

    Attributes:
        largest: absolute difference of two numbers; infinite where there can be none.
        scale: the largest absolute number, in either.
    """

    largest: float = 0.0
    scale: float = 0.0

    def is_rounding(self, dtype: torch.dtype) -> bool:
        """Whether another processor's arithmetic may have made it."""
        digit = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        return self.largest <= max(ROUNDING, digit) * self.scale


def sample(steps: Sequence[Step], count: int, seed: int) -> list[Step]:
    """Steps drawn at random, at least one of each kind of treatment as far as ``count`` allows; in the plan's order."""
    draw = random.Random(seed)
    mixed = draw.sample(steps, len(steps))
    firsts: dict[tuple[str, str, str | None], Step] = {}
    for step in mixed:
        firsts.setdefault((step.method, step.unit.kind, step.reason), step)
    of_each = {id(step) for step in firsts.values()}
    chosen = {id(step) for step in [*firsts.values(), *(step for step in mixed if id(step) not in of_each)][:count]}
    return [step for step in steps if id(step) in chosen]


class _Comparing(RecordingTarget):
    """Holds each slice against the same rows of the files.

    Args:
        plan: what is carried out.
        steps: those that are computed.
        folder: the merged folder.
    """

    def __init__(self, plan: Plan, steps: Sequence[Step], folder: Path) -> None:
        names = {name for step in steps for name in step.unit.names}
        super().__init__(plan, names)
        self.deviations = {name: Deviation() for name in names}
        self._folder, layout, infos = folder, make_layout(plan), dict[tuple[str, str], TensorInfo]()
        for file in {layout.places[name][0] for name in names}:
            infos |= {(file, info.name): info for info in read_infos(folder / file, file)}
        self._infos = {name: infos[layout.places[name]] for name in names}

    def _put(self, name: str, stored: Tensor, first: int) -> None:
        info, size = self._infos[name], stored.element_size() * stored.numel()
        rows = stored.shape[0] if stored.dim() else 1
        with (self._folder / info.file).open("rb") as stream:
            data = os.pread(stream.fileno(), size, info.offset + first * (size // max(rows, 1)))
        there, deviation = torch.frombuffer(bytearray(data), dtype=stored.dtype), self.deviations[name]
        if torch.equal(there.view(torch.uint8), stored.view(-1).view(torch.uint8)):
            return
        here = stored.view(-1).to(torch.float64)
        off = (there.to(torch.float64) - here).abs().nan_to_num(nan=torch.inf)
        deviation.largest = max(deviation.largest, float(off.max()))
        deviation.scale = max(deviation.scale, float(here.abs().max()), float(there.abs().max()))


def recompute(
    plan: Plan,
    inputs: Inputs,
    steps: Sequence[Step],
    provenance: Mapping[str, Any],
    folder: Path,
    settings: RunSettings,
    *,
    allow_rounding: bool = False,
    work: Work | None = None,
) -> tuple[list[UserError], list[str]]:
    """Merge the tensors of some steps again and compare them with the files and with what is recorded of them.

    Args:
        plan: made anew, and found to be the recorded one.
        inputs: its open files.
        steps: of the plan.
        provenance: the record.
        folder: the merged folder, whose files are the recorded ones.
        settings: how it is run.
        allow_rounding: differences that another processor's arithmetic may have made are said, and are no errors.
        work: what is done for each step; by default what its method says.

    Returns:
        What differs, and what is worth knowing.
    """
    target = _Comparing(plan, steps, folder)
    part = replace(plan, steps=tuple(steps))
    with recorded_activations(part.steps, inputs, settings) as seen:
        doing = Merging(inputs, settings, seen=seen) if work is None else work
        execute(fit(part.steps, settings), doing, target, "recomputing")
    entries, problems, notes = provenance["tensors"], list[UserError](), list[str]()
    off = {name: d for name, d in target.deviations.items() if d.largest}
    let_be = [name for name, d in off.items() if allow_rounding and d.is_rounding(_dtype(plan, name))]
    wrong = {name: d for name, d in off.items() if name not in let_be}
    if wrong:
        few = ", ".join(f"{name} (by {d.largest:.1e}, its numbers up to {d.scale:.1e})" for name, d in _worst(wrong))
        what = f"{len(wrong)} of {len(target.records)} recomputed tensors are not what the plan gives: {few}"
        mend = "merge again"
        if all(d.is_rounding(_dtype(plan, name)) for name, d in wrong.items()):
            mend = "another kind of processor rounds otherwise: repeat it on the first, or add --allow-rounding"
        problems.append(CheckpointError(what, where=folder, mend=mend))
    if let_be:
        notes.append(f"{len(let_be)} recomputed tensors differ by rounding alone")
    said = [
        f"{name} (recorded {entries[name]['note']!r}, found {record.note!r})"
        for name, record in target.records.items()
        if entries[name]["note"] != record.note
    ]
    if said:
        what = f"notes on {len(said)} recomputed tensors are not what was found again: {', '.join(said[:_FEW])}"
        if allow_rounding:  # a note may hold a number
            notes.append(what)
        else:
            problems.append(CheckpointError(what, where=folder, mend="merge again, or restore provenance.json"))
    return problems, notes


def _worst(deviations: Mapping[str, Deviation]) -> list[tuple[str, Deviation]]:
    """The largest deviations, relative to their tensors."""
    worst = sorted(deviations.items(), key=lambda item: -item[1].largest / (item[1].scale or 1.0))
    return worst[:_FEW]


def _dtype(plan: Plan, name: str) -> torch.dtype:
    return DTYPES[plan.specs[name].dtype]
