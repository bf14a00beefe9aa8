"""Carrying out a plan: steps are read, worked on and handed to a target one by one, on a bounded pool of threads.

Each step is computed on one thread, tall ones slice by slice, so the bytes do not depend on how many threads there
are nor on the memory that they may take. Inputs are read in the order of the files, the few largest steps first, and
hashed on the way. What is done for a step (merging, adding to sums, solving sums) and where it goes (a checkpoint, an
adapter, a ledger) are two objects; everything else is here, once.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from merganser.checkpoints.sources import read_source
from merganser.errors import CheckpointError, RecipeError
from merganser.merging.activations import Activations
from merganser.merging.adapters import brings_product
from merganser.merging.inputs import Inputs
from merganser.merging.matching import RowMap
from merganser.merging.memory import Budget, RunSettings, Schedule, kept_bytes
from merganser.merging.plan import BUFFER, COPY, KEPT, TAKEN, Step
from merganser.merging.running_sums import RunningSums
from merganser.merging.shares import Kept, ParentShare, Ranges, read_finite
from merganser.methods import Merged, Method, Unit, average_unit
from merganser.methods.base import Share, elements
from merganser.methods.products import Product
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
    failed, stopped, budget = threading.Event(), threading.Event(), Budget(schedule.budget)
    fitted = {id(s): (r, n) for s, r, n in zip(schedule.steps, schedule.rows, schedule.sizes, strict=True)}
    steps, futures = longest_first(schedule.steps, schedule.threads), list[Future[None]]()

    def run(step: Step, rows: int | None, nbytes: int) -> None:
        if stopped.is_set():
            return
        with budget.returning(nbytes):
            try:
                notes: dict[str, None] = {}
                for firsts, merged in work.slices(step, rows):
                    if stopped.is_set():  # nobody waits for the rest, however often it was interrupted
                        return
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
        except KeyboardInterrupt:
            stopped.set()
            raise
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


@dataclass
class Merging:
    """Steps as their methods have it.

    Args:
        inputs: the open files.
        settings: device, and the folder of running sums.
        seen: what the contributors' units do on texts at hand.
        products: the target takes changes of low rank as products, where contributors bring them and the method can.
    """

    inputs: Inputs
    settings: RunSettings = field(default_factory=RunSettings)
    products: bool = False
    mend: str = "collect the statistics again, or exclude this tensor (--exclude)"
    seen: Activations | None = None

    def prefetch(self, step: Step) -> None:
        """Of every contributor and the base."""
        for parent, sources in zip(self.inputs.parents, step.sources, strict=True):
            for source in sources.values():
                for stored in source.tensors():
                    parent.checkpoint.prefetch(stored)
        if self.inputs.base is not None:
            for source in step.base.values():
                for stored in source.tensors():
                    self.inputs.base.checkpoint.prefetch(stored)

    def slices(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """Float tensors come in float32 or wider, others as they are stored; of a stack, one after the other."""
        for number in range(step.stack or 0):
            for firsts, merged in self.slices(step.one_of(number), rows):
                yield {name: first + number * step.height_of(name) for name, first in firsts.items()}, merged
        if step.stack is not None:
            return
        unit, method = step.unit, step.treatment
        sums = None if self.settings.sums is None or method is None else RunningSums(self.settings.sums)
        keeps = sums is not None and method is not None and method.additive(unit)
        if step.reason == BUFFER and self._is_one(step):
            yield from self._copies(step, None)
        elif step.method in (COPY, KEPT) or (step.method == TAKEN and step.rows is None):
            yield from self._copies(step, rows)
        elif self.products and method is not None and takes_products(step, self.inputs):
            (name,), shares = unit.names, self.shares(step)
            product = method.merge_products(
                unit, [share.product(name) or _no_product(name) for share in shares], shares
            )
            yield {name: 0}, Merged({}, products={name: product})
        elif step.rows is not None:
            yield from self._by_rows(step, step.rows, method, sums if keeps else None, rows)
        elif sums is not None and method is not None and keeps:
            merged = _with_sums(step, method, unit, self.shares(step), sums, None)
            yield dict.fromkeys(merged.tensors, 0), merged
        elif rows is None:
            merged = average_unit(unit, self.shares(step)) if method is None else method.merge(unit, self.shares(step))
            yield dict.fromkeys(merged.tensors, 0), merged
        else:
            kept = Kept(kept_bytes(step)) if self.settings.max_memory is None else None
            merge = average_unit if method is None else method.prepare(unit, self.shares(step, kept=kept))
            for start in range(0, unit.height(), rows):
                part, ranges = unit.cut(start, start + rows)
                yield {name: first for name, (first, _) in ranges.items()}, merge(part, self.shares(step, ranges, kept))

    def shares(self, step: Step, ranges: Ranges | None = None, kept: Kept | None = None) -> list[ParentShare]:
        """Of every contributor that takes part, of these rows of each tensor; of all by default."""
        one = partial(ParentShare, ranges=ranges, device=self.settings.torch_device, seen=self.seen, kept=kept)
        return [one(self.inputs, step, number) for number in step.takers]

    def _by_rows(
        self, step: Step, table: RowMap, method: Method | None, sums: RunningSums | None, height: int | None
    ) -> Iterator[Slice]:
        """Row by row, by those contributors that have the row; as the base has it where none does."""
        groups = []
        for rows, owners, based in table.groups():
            merge = self._merge_of_rows(step, table, method, sums, rows, owners, based, sliced=height is not None)
            groups.append((rows, owners, based, merge))
        height = height or table.size
        for start in range(0, table.size, height):
            size = min(height, table.size - start)
            pieces: dict[str, Tensor] = {}
            notes: dict[str, None] = {}
            for rows, owners, based, merge in groups:
                here = rows[bisect_left(rows, start) : bisect_left(rows, start + size)]
                if not here:
                    continue
                merged = merge(step.unit.only(here), self._shares_of_rows(step, table, here, owners, based))
                notes |= {merged.note: None} if merged.note else {}
                for name, tensor in merged.tensors.items():
                    whole = pieces.get(name, tensor.new_empty(size, *tensor.shape[1:]))
                    pieces[name] = whole = whole.to(torch.promote_types(whole.dtype, tensor.dtype))
                    whole[torch.tensor(here) - start] = tensor.to(whole.dtype)
            pieces = {name: piece.mT if table.columns else piece for name, piece in pieces.items()}
            yield dict.fromkeys(pieces, start), Merged(pieces, "; ".join(notes) or None)

    def _merge_of_rows(
        self,
        step: Step,
        table: RowMap,
        method: Method | None,
        sums: RunningSums | None,
        rows: Sequence[int],
        owners: Sequence[int],
        based: bool,
        *,
        sliced: bool,
    ) -> Callable[[Unit, Sequence[Share]], Merged]:
        """What merges some of these rows, which the same contributors own, after whatever has to be known of all."""
        shares = self._shares_of_rows(step, table, rows, owners, based)
        if not owners:
            return lambda part, restricted: Merged({name: restricted[0].base(name) for name in part.names})
        if method is None or (method.needs.base and not based):
            return average_unit
        if sums is not None:
            return lambda part, restricted: _with_sums(step, method, part, shares, sums, rows)
        return method.prepare(step.unit.only(rows), shares) if sliced else method.merge

    def _shares_of_rows(
        self, step: Step, table: RowMap, rows: Sequence[int], owners: Sequence[int], based: bool
    ) -> list[ParentShare]:
        """Of the contributors that own these rows of the result; of any one where none does, for the base's sake."""
        theirs = [table.own_base[row] for row in rows] if based else None
        return [
            ParentShare(
                self.inputs,
                step,
                number,
                rows=[table.own[number][row] for row in rows],
                base_rows=theirs,
                targets=rows,
                device=self.settings.torch_device,
            )
            for number in owners or step.takers[:1]
        ]

    def _is_one(self, step: Step) -> bool:
        """Whether every contributor has the same numbers, which may be infinite in a buffer."""
        (name,) = step.unit.names
        stored = [read_source(self.inputs.parents[n].checkpoint, step.sources[n][name]) for n in step.takers]
        return all(torch.equal(stored[0], one) for one in stored[1:])

    def _copies(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """A tensor as the first contributor has it, or the base; the others that have it are to agree."""
        (name,), others = step.unit.names, step.takers[1:]
        if step.takers:
            parent, source = self.inputs.parents[step.takers[0]], step.sources[step.takers[0]][name]
        elif self.inputs.base is not None:
            parent, source = self.inputs.base, step.base[name]
        else:
            raise RuntimeError("the plan promised a base model")
        whole = read_source(parent.checkpoint, source) if others else torch.empty(0)
        for number in others:
            other, theirs = self.inputs.parents[number], step.sources[number][name]
            if not torch.equal(read_source(other.checkpoint, theirs), whole):
                raise CheckpointError(
                    f"tensor {theirs.leaf.tensor!r} is not floating point and differs from that of {parent.title}",
                    where=other.checkpoint.name,
                    mend=f"--keep-separate '{name}' so that each contributor keeps its own",
                )
        height = step.unit.height()
        for start in range(0, max(height, 1), rows or max(height, 1)):
            stop = rows and start + rows
            read = read_finite(parent, source, start, stop, infinite=step.reason == BUFFER)
            yield {name: start}, Merged({name: read})


def takes_products(step: Step, inputs: Inputs) -> bool:
    """Whether a step's change can be merged as a product: every contributor brings one, and the method takes them."""
    method, unit = step.treatment, step.unit
    if method is None or not method.takes_products or step.rows is not None or step.stack is not None:
        return False
    if len(unit.names) > 1 or len(unit.facts[0].shape) != 2:
        return False
    (name,) = unit.names
    return all(brings_product(inputs.parents[n], inputs.base, step.sources[n][name]) for n in step.takers)


def _no_product(name: str) -> Product:
    raise RuntimeError(f"the plan promised a product of {name}")


def _with_sums(
    step: Step, method: Method, unit: Unit, shares: Sequence[ParentShare], kept: RunningSums, rows: Sequence[int] | None
) -> Merged:
    """Merge a unit, or the part of it in these rows, going on from the sums of earlier merges."""
    keys = kept.keys(method, step.unit, [share.identity(step.unit) for share in shares])
    found, done = kept.load(step.unit, rows, keys)
    sums = method.new_sums() if found is None else found
    for share in shares[done:]:
        method.add(unit, share, sums)
    if done < len(shares):
        kept.save(step.unit, rows, keys, sums)
    return method.solve(unit, sums)
