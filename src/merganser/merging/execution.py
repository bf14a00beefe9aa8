"""Carrying out a plan: units are read, merged and written one by one, on a bounded pool of threads.

Each unit is computed on one thread, so the bytes do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints import sha256_tensor
from merganser.checkpoints.writer import SafetensorsWriter
from merganser.errors import CheckpointError, RecipeError
from merganser.merging.layout import Layout
from merganser.merging.parents import Parent
from merganser.merging.plan import Plan, Step
from merganser.methods import GramSums, Merged, average
from merganser.progress import bar
from merganser.tensors import DTYPES, one_thread


@dataclass(frozen=True)
class Outcome:
    """What became of one merged tensor: its hash, the method really used, and why it was not the plan's."""

    sha256: str
    method: str
    reason: str | None
    note: str | None


class ParentShare:
    """A contributor's :class:`~merganser.methods.Share` of one unit, read from its files when asked for.

    Args:
        parent: the contributor.
        base: the base model, where there is one.
        rows: the rows of its own tensors that are meant, all by default.
    """

    def __init__(self, parent: Parent, base: Parent | None, rows: Sequence[int] | None = None) -> None:
        self.parent, self.rows = parent, rows
        self._base = base
        self._rows = None if rows is None else torch.tensor(rows)
        self._tensors: dict[str, Tensor] = {}

    @property
    def coefficient(self) -> float:
        """The contributor's weight in the merge."""
        return self.parent.contributor.coefficient

    def tensor(self, name: str) -> Tensor:
        """Its tensor in float32 or wider; checked to be finite; kept for the life of the unit."""
        if name not in self._tensors:
            self._tensors[name] = self._picked(read_finite(self.parent, name))
        return self._tensors[name]

    def release(self) -> None:
        """Keep nothing that was read."""
        self._tensors.clear()

    def base(self, name: str) -> Tensor:
        """The base model's tensor."""
        if self._base is None:
            raise RuntimeError("the plan promised a base model")
        return read_finite(self._base, name)

    def gram(self, weight: str) -> Tensor:
        """The Gram matrix of the inputs of the layer with this weight."""
        return self._statistics.gram(self._input(weight))

    def mean(self, weight: str) -> Tensor:
        """The mean input of that layer."""
        return self._statistics.mean(self._input(weight))

    def count(self, weight: str) -> Tensor:
        """The share of all tokens that each id has."""
        counts = self._statistics.count(self._layer(weight).module).to(torch.float64)
        return self._picked(counts / counts.sum().clamp_min(1))

    def fisher(self, name: str) -> Tensor:
        """Its diagonal Fisher information of a parameter."""
        return self._picked(self._statistics.fisher(self.parent.names[name]))

    @property
    def _statistics(self):  # type: ignore[no-untyped-def]
        if self.parent.statistics is None:
            raise RuntimeError("the plan promised statistics")
        return self.parent.statistics

    def _layer(self, weight: str):  # type: ignore[no-untyped-def]
        return self._statistics.layer(self.parent.names[weight])

    def _input(self, weight: str) -> str:
        return str(self._layer(weight).input)

    def _picked(self, tensor: Tensor) -> Tensor:
        return tensor if self._rows is None else tensor[self._rows]


def read_finite(parent: Parent, name: str) -> Tensor:
    """A contributor's tensor by the first contributor's name, in float32 or wider, hashed on the way.

    Raises:
        CheckpointError: NaN or Inf in it.
    """
    own = parent.names[name]
    stored = parent.checkpoint.read(own)
    parent.checkpoint.sha256(own, stored)
    tensor = stored if stored.dtype == torch.float64 else stored.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"tensor {own!r} holds NaN or Inf",
            where=parent.checkpoint.name,
            mend="this checkpoint is damaged or its training diverged; use another",
        )
    return tensor


def run_step(plan: Plan, step: Step) -> Merged:
    """Merge one unit; float tensors come back in float32 or wider."""
    if step.method == "copy":
        return _copy(plan, step)
    if step.rows is None:
        return _merge(plan, step, [ParentShare(parent, plan.base) for parent in plan.parents])
    pieces: dict[str, Tensor] = {}
    notes = []
    for rows, owners in step.rows.groups():
        shares = [
            ParentShare(plan.parents[i], plan.base, [step.rows.own[i][row] for row in rows]) for i in owners
        ]
        if not sum(share.coefficient for share in shares):
            owned = ", ".join(plan.parents[i].title for i in owners)
            raise RecipeError(
                f"rows of {step.unit.names[0]!r} belong to {owned} alone, whose coefficients sum to zero",
                mend="give at least one of them another coefficient",
            )
        merged = _merge(plan, step, shares, rows)
        notes.append(merged.note)
        for name, tensor in merged.tensors.items():
            whole = pieces.setdefault(name, tensor.new_empty(step.rows.size, *tensor.shape[1:]))
            whole[torch.tensor(rows)] = tensor
    return Merged(pieces, "; ".join(dict.fromkeys(note for note in notes if note)) or None)


def _merge(
    plan: Plan, step: Step, shares: Sequence[ParentShare], rows: Sequence[int] | None = None
) -> Merged:
    if step.method == "average":
        return Merged(average(step.unit.names, shares))
    if not plan.method.additive(step.unit):
        return plan.method.merge(step.unit, shares)
    sums, done = GramSums(), 0
    if plan.kept is not None:
        parents, own = [share.parent for share in shares], [share.rows for share in shares]
        keys = plan.kept.keys(plan.method, step.unit, parents, own)
        sums, done = plan.kept.load(step.unit, rows, keys)
    for share in shares[done:]:
        plan.method.add(step.unit, share, sums)
        share.release()
    if plan.kept is not None and done < len(shares):
        plan.kept.save(step.unit, rows, keys, sums)
    return plan.method.solve(step.unit, sums)


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
    """The weights of a merge being written into ``folder``."""

    plan: Plan
    layout: Layout
    folder: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self) -> dict[str, Outcome]:
        """Do every step and write every tensor; returns what became of each.

        Raises:
            CheckpointError, RecipeError: non-finite weights, in or out; the folder is then to be thrown away.
        """
        total = self.plan.bytes_written
        with (
            one_thread(),
            SafetensorsWriter(self.folder, self.layout.files) as writer,
            bar(total, "merging", "B", scale=True) as progress,
            ThreadPoolExecutor(self.plan.threads) as pool,
        ):

            def work(step: Step) -> int:
                return self._write(step, writer)

            futures = [pool.submit(work, step) for step in self.plan.steps]
            futures += [
                pool.submit(self._keep, parent, names, folder, writer)
                for parent, names, folder in zip(
                    self.plan.parents, self.plan.separate, self.layout.head_folders, strict=True
                )
                if names
            ]
            for future in futures:
                future.add_done_callback(
                    lambda done: done.cancelled() or done.exception() or progress.update(done.result())
                )
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                for future in futures:
                    future.cancel()
            for (
                future
            ) in futures:  # in the order of the plan, so that the same mistake is reported every time
                if not future.cancelled():
                    future.result()
        return {name: self.outcomes[name] for name in sorted(self.outcomes)}

    def _write(self, step: Step, writer: SafetensorsWriter) -> int:
        try:
            merged = run_step(self.plan, step)
        except ValueError as error:
            raise RecipeError(
                f"{', '.join(step.unit.names)}: {error}",
                mend="collect the statistics again, or exclude this tensor (--exclude)",
            ) from None
        written = 0
        for spec in (spec for spec in self.plan.outputs if spec.name in merged.tensors):
            tensor = merged.tensors[spec.name].to(DTYPES[spec.dtype]).contiguous()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(torch.float32)).all()):
                raise RecipeError(
                    f"{step.method} produced NaN or Inf in {spec.name!r} (stored as {spec.dtype})",
                    mend="use a wider --dtype, a larger ridge, or exclude this tensor (--exclude)",
                )
            file, stored = self.layout.places[spec.name]
            writer.write(file, stored, tensor)
            self.outcomes[spec.name] = Outcome(
                sha256_tensor(tensor, spec.dtype), step.method, step.reason, merged.note
            )
            written += spec.nbytes
        return written

    def _keep(self, parent: Parent, names: Sequence[str], folder: str, writer: SafetensorsWriter) -> int:
        """Copy a contributor's own tensors, as they are, to its head."""
        written = 0
        for name in names:
            tensor = parent.checkpoint.read(name)
            info = parent.checkpoint.tensors[name]
            digest = parent.checkpoint.sha256(name, tensor)
            writer.write(f"{folder}/head.safetensors", name, tensor)
            self.outcomes[f"{folder}/{name}"] = Outcome(digest, "kept separate", parent.title, None)
            written += info.nbytes
        return written
