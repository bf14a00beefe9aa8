"""Carrying out a plan: units are read, merged and written one by one, on a bounded pool of threads.

Each unit is computed on one thread, tall ones slice by slice, so the bytes do not depend on how many threads there
are nor on the memory that they may take. Inputs are read in the order of the files, the few largest units first, and
hashed on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from merganser.checkpoints.reader import TensorHash
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import CheckpointError, RecipeError
from merganser.merging.layout import Layout
from merganser.merging.memory import Budget
from merganser.merging.parents import Parent
from merganser.merging.plan import Plan
from merganser.merging.shares import ParentShare, Ranges
from merganser.merging.step import Step
from merganser.methods import Merged, Share, Unit, average_unit
from merganser.methods.base import elements
from merganser.progress import bar
from merganser.tensors import DTYPES, is_finite, is_floating, one_thread

#: A unit is large if the whole merge takes only this many times as long, on all threads.
_PATIENCE = 20
#: A slice of a unit: the first row of each tensor in it, and the merged tensors.
Slice = tuple[dict[str, int], Merged]


@dataclass(frozen=True)
class Outcome:
    """What became of one merged tensor: its hash, the method really used, and why it was not the plan's."""

    blake3: str
    method: str
    reason: str | None
    note: str | None


def run_step(plan: Plan, step: Step) -> Merged:
    """Merge one unit as a whole; float tensors come back in float32 or wider."""
    if step.method == "copy":
        return _copy(plan, step)
    if step.rows is None:
        return _merge(plan, step.unit, step, _shares(plan))
    pieces: dict[str, Tensor] = {}
    notes = []
    for rows, owners in step.rows.groups():
        shares = [
            ParentShare(
                plan.parents[i],
                plan.base,
                number=i,
                rows=[step.rows.own[i][row] for row in rows],
                device=plan.torch_device,
            )
            for i in owners
        ]
        if not sum(share.coefficient for share in shares):
            owned = ", ".join(plan.parents[i].title for i in owners)
            raise RecipeError(
                f"rows of {step.unit.names[0]!r} belong to {owned} alone, whose coefficients sum to zero",
                mend="give at least one of them another coefficient",
            )
        merged = _merge(plan, step.unit.only(rows), step, shares, rows)
        notes.append(merged.note)
        for name, tensor in merged.tensors.items():
            whole = pieces.setdefault(name, tensor.new_empty(step.rows.size, *tensor.shape[1:]))
            whole[torch.tensor(rows)] = tensor
    return Merged(pieces, "; ".join(dict.fromkeys(note for note in notes if note)) or None)


def run_slices(plan: Plan, step: Step) -> Iterator[Slice]:
    """Merge one unit, slice by slice in the order of its rows."""
    keeps = plan.kept is not None and step.method != "average" and plan.method.additive(step.unit)
    if step.slice_rows is None or keeps:
        merged = run_step(plan, step)
        yield dict.fromkeys(merged.tensors, 0), merged
        return
    unit = step.unit
    merge: Callable[[Unit, Sequence[Share]], Merged] = average_unit
    if step.method != "average":
        merge = plan.method.prepare(unit, _shares(plan))
    for start in range(0, unit.height(), step.slice_rows):
        part, ranges = unit.cut(start, start + step.slice_rows)
        yield {name: first for name, (first, _) in ranges.items()}, merge(part, _shares(plan, ranges))


def _shares(plan: Plan, ranges: Ranges | None = None) -> list[ParentShare]:
    """Every contributor's, of these rows of each tensor; of all by default."""
    return [
        ParentShare(parent, plan.base, number=number, ranges=ranges, device=plan.torch_device)
        for number, parent in enumerate(plan.parents)
    ]


def longest_first(steps: Sequence[Step], threads: int) -> list[Step]:
    """The steps in the order of the plan, but first those so large that others would wait for one at the end."""
    sizes = [elements(step.unit) for step in steps]
    large = sum(sizes) / (_PATIENCE * threads)
    return sorted(steps, key=lambda step: elements(step.unit) <= large)


def _merge(
    plan: Plan, unit: Unit, step: Step, shares: Sequence[ParentShare], rows: Sequence[int] | None = None
) -> Merged:
    """Merge a step's unit, or the part of it that is in these rows of the result."""
    if step.method == "average":
        return average_unit(unit, shares)
    if plan.kept is None or not plan.method.additive(unit):
        return plan.method.merge(unit, shares)
    parents, own = [share.parent for share in shares], [share.own for share in shares]
    keys = plan.kept.keys(plan.method, step.unit, parents, own)
    found, done = plan.kept.load(step.unit, rows, keys)
    sums = plan.method.new_sums() if found is None else found
    for share in shares[done:]:
        plan.method.add(unit, share, sums)
    if done < len(shares):
        plan.kept.save(step.unit, rows, keys, sums)
    return plan.method.solve(unit, sums)


def _copy(plan: Plan, step: Step) -> Merged:
    (name,) = step.unit.names
    first = plan.parents[0].checkpoint.read(name)
    for parent in plan.parents[1:]:
        own = parent.names.get(name)
        if own is not None and not torch.equal(parent.checkpoint.read(own), first):
            raise CheckpointError(
                f"tensor {own!r} is not floating point and differs from that of {plan.parents[0].title}",
                where=parent.checkpoint.name,
                mend=f"--keep-separate '{name}' so that each contributor keeps its own",
            )
    return Merged({name: first})


@dataclass
class Execution:
    """The weights of a merge being written into ``folder``.

    Args:
        plan: what to do.
        layout: where each tensor goes.
        folder: receives the files; thrown away by the caller when anything goes wrong.
        files: the only files to write; all by default.
    """

    plan: Plan
    layout: Layout
    folder: Path
    files: Collection[str] | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _failed: threading.Event = field(default_factory=threading.Event)

    def run(self) -> dict[str, Outcome]:
        """Do every step and write every tensor; returns what became of each.

        Raises:
            CheckpointError, RecipeError: non-finite weights, in or out.
        """
        wanted = {f: s for f, s in self.layout.files.items() if self.files is None or f in self.files}
        steps = longest_first([step for step in self.plan.steps if self._specs(step, wanted)], self.plan.threads)
        kept = zip(self.plan.parents, self.plan.separate, self.layout.head_folders, strict=True)
        total = sum(spec.nbytes for specs in wanted.values() for spec in specs)
        budget = Budget(self.plan.budget)
        futures: list[Future[None]] = []
        with (
            one_thread(),
            SafetensorsWriter(self.folder, wanted) as writer,
            bar(total, "merging", "B", scale=True) as progress,
            ThreadPoolExecutor(self.plan.threads) as pool,
        ):
            try:
                for number, step in enumerate(steps):
                    self._prefetch(steps[number + 1 : number + 1 + self.plan.threads])
                    budget.draw(step.nbytes)
                    if self._failed.is_set():
                        break
                    work = partial(self._write, step, self._specs(step, wanted), writer, progress)
                    futures.append(pool.submit(self._within, budget, step.nbytes, work))
                for parent, names, folder in kept:
                    if f"{folder}/head.safetensors" in wanted:
                        work = partial(self._keep, parent, names, folder, writer, progress)
                        budget.draw(0)
                        futures.append(pool.submit(self._within, budget, 0, work))
                for future in futures:  # in the order of the plan: the same mistake is reported every time
                    future.result()
            finally:
                self._failed.set()
                for future in futures:
                    future.cancel()
        return {name: self.outcomes[name] for name in sorted(self.outcomes)}

    def _within(self, budget: Budget, nbytes: int, work: partial[None]) -> None:
        with budget.returning(nbytes):
            try:
                work()
            except BaseException:
                self._failed.set()
                raise

    def _specs(self, step: Step, wanted: Collection[str]) -> list[TensorSpec]:
        return [self.plan.specs[name] for name in step.unit.names if self.layout.places[name][0] in wanted]

    def _prefetch(self, steps: Sequence[Step]) -> None:
        for step in steps:
            for parent in [*self.plan.parents, *([self.plan.base] if self.plan.base else [])]:
                for name in step.unit.names:
                    if name in parent.names:
                        parent.checkpoint.prefetch(parent.names[name])

    def _write(self, step: Step, specs: Sequence[TensorSpec], writer: SafetensorsWriter, progress: tqdm[None]) -> None:
        """Merge a unit and write its tensors, or those of ``specs``."""
        hashes = {spec.name: TensorHash(spec.dtype, spec.shape, "blake3") for spec in specs}
        notes: dict[str, None] = {}
        try:
            for firsts, merged in run_slices(self.plan, step):
                if merged.note:
                    notes[merged.note] = None
                for spec in specs:
                    if spec.name not in merged.tensors:
                        continue
                    tensor = self._stored(merged.tensors[spec.name], spec, step.method)
                    file, name = self.layout.places[spec.name]
                    writer.write(file, name, tensor, firsts[spec.name])
                    hashes[spec.name].update(tensor)
                    progress.update(tensor.nbytes)
        except ValueError as error:
            raise RecipeError(
                f"{', '.join(step.unit.names)}: {error}",
                mend="collect the statistics again, or exclude this tensor (--exclude)",
            ) from None
        note = "; ".join(notes) or None
        for name, running in hashes.items():
            self.outcomes[name] = Outcome(running.hexdigest(), step.method, step.reason, note)

    @staticmethod
    def _stored(tensor: Tensor, spec: TensorSpec, method: str) -> Tensor:
        """A merged tensor as it is stored; checked to be finite."""
        stored = tensor.to("cpu", DTYPES[spec.dtype]).contiguous()
        if is_floating(spec.dtype) and not is_finite(stored):
            raise RecipeError(
                f"{method} produced NaN or Inf in {spec.name!r} (stored as {spec.dtype})",
                mend="use a wider --dtype, a larger ridge, or exclude this tensor (--exclude)",
            )
        return stored

    def _keep(
        self, parent: Parent, names: Sequence[str], folder: str, writer: SafetensorsWriter, progress: tqdm[None]
    ) -> None:
        """Copy a contributor's own tensors, as they are, to its head."""
        checkpoint = parent.checkpoint
        for name in names:
            info = checkpoint.tensors[name]
            running = TensorHash(info.dtype, info.shape, "blake3")
            for start, stop in checkpoint.pieces(name):
                tensor = checkpoint.read(name, start, stop)
                checkpoint.observe(name, tensor, start)
                stored = tensor.to(DTYPES[info.dtype])  # what an adapter changes is read in float32
                writer.write(f"{folder}/head.safetensors", name, stored, start)
                running.update(stored)
                progress.update(stored.nbytes)
            self.outcomes[f"{folder}/{name}"] = Outcome(running.hexdigest(), "kept separate", parent.title, None)
