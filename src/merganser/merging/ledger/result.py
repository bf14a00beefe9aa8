"""From sums to a model: the folder that ``merganser merge`` of the same contributors would give, to rounding.

Only the base model and the ledger are read. Configuration, tokenizer and names are the base's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints.places import places_read
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import RecipeError, raise_all
from merganser.merging.execution import Slice, execute
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.ledger.contributors import open_same_base, share_of
from merganser.merging.ledger.record import BaseRecord, LedgerError, LedgerMember, LedgerRecord
from merganser.merging.ledger.store import Sums, locked, schedule_of, specs
from merganser.merging.ledger.terms import shapes
from merganser.merging.ledger.terms import solve as solve_part
from merganser.merging.memory import RunSettings, fit
from merganser.merging.merge import MergeResult
from merganser.merging.plan import COPY, Plan, Step
from merganser.merging.planning import nested_folders
from merganser.merging.recipe import make_recipe, method_options
from merganser.merging.targets.checkpoint import (
    CheckpointTarget,
    complete,
    make_layout,
    new_output,
    output_problems,
    write_small_files,
)
from merganser.methods import Facts, Merged, Unit
from merganser.methods.base import sums_to_zero
from merganser.methods.least_squares import LeastSquares
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating

_BASES_OWN = "no part of the ledger: the base's own"
_MADE = """Made with merganser from a ledger, the sums over contributors that each added without the others: {}.
`provenance.json` holds the hash of every contributor and of every tensor, and the method that was really used for each;
`merganser verify` checks it."""


def solve(
    folder: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    threads: int | None = None,
    max_memory: str | int | None = None,
    allow_pickle: bool = False,
) -> MergeResult:
    """Write the merge of a ledger's contributors.

    Args:
        folder: the ledger; it stays as it is.
        output: the model folder or fsspec URL to write; written whole or not at all.
        base: where the base model is, if not where it was.
        options: ``ridge`` alone, which does not go into the sums.
        dtype: storage dtype; by default the widest of the base and the contributors.
        max_shard_size: largest weight file.
        overwrite: replace what an earlier merge has written; nothing else is ever replaced.
        threads: how many parts are worked on at once; the bytes do not depend on it.
        max_memory: what the process may take, in bytes or as ``"2GB"``; nor on this.
        allow_pickle: accept a base model in ``pytorch_model.bin``.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    place, started = Path(folder), time.monotonic()
    settings = RunSettings.make(threads, max_memory)
    with locked(place, write=False) as record:
        if sums_to_zero([entry.coefficient for entry in record.contributors]):
            what = "its coefficients sum to zero" if record.contributors else "it has no contributors"
            raise LedgerError(f"there is nothing to solve for: {what}", where=place, mend="merganser ledger add")
        method = _method(record, options or {})
        sums = Sums.open(place, record)
        text = None if base is None else str(base)
        reference = open_same_base(record, place, text, allow_pickle=allow_pickle)
        plan = _plan(record, method, reference, dtype, max_shard_size)
        reads = [*places_read(reference.checkpoint), place]
        raise_all(output_problems(output, overwrite, reads, plan.bytes_written))
        parts = schedule_of(record, specs(record, record.parts), settings)
        rest = fit(plan.steps[len(record.parts) :], settings, whole=True)
        schedule = replace(
            parts,
            steps=plan.steps,
            rows=(None,) * len(plan.steps),
            sizes=parts.sizes + rest.sizes,
            budget=max(parts.budget, rest.budget),
        )
        layout = make_layout(plan)
        with new_output(output, overwrite, reads) as staging:
            work = staging.folder
            write_small_files(plan, Inputs((), reference, reference), layout, work)
            with CheckpointTarget(plan, layout, work) as written:
                execute(schedule, _Solving(record, method, sums, reference), written, "solving")
            people = [_parent(entry.name, entry) for entry in record.contributors]
            ledger = {"generation": record.generation, "base_manifest_sha256": record.base.manifest_sha256}
            bases = _parent("base", record.base)
            complete(plan, reference, layout, work, written.records, people, bases, _MADE, ledger=ledger)
    return MergeResult(output, plan, time.monotonic() - started)


@dataclass
class _Solving:
    """The tensors of each part, solved from its sums."""

    record: LedgerRecord
    method: LeastSquares
    sums: Sums
    base: Parent
    mend: str = "remove the contributor whose statistics are wrong, or add a --ridge"

    def prefetch(self, step: Step) -> None:
        """The sums are read when they are solved."""

    def slices(self, step: Step, rows: int | None) -> Iterator[Slice]:
        """What is summed, solved; anything else as the base has it."""
        if step.method == COPY:
            merged = Merged({name: self.base.checkpoint.read(name) for name in step.unit.names})
        else:
            number = self.record.numbers[step.unit.names]
            part = self.record.parts[number]
            terms = self.sums.rounded(number, list(shapes(self.method, part)))
            share = share_of(part, self.base, self.base)
            merged = solve_part(self.method, part, part.unit(), terms, self.record.total, share)
        yield dict.fromkeys(merged.tensors, 0), merged


def _method(record: LedgerRecord, options: Mapping[str, Any]) -> LeastSquares:
    for name in options:
        if name != "ridge":
            raise RecipeError(
                f"{name!r} went into the sums and cannot be changed",
                mend="make another ledger; only ridge can be chosen when solving",
            )
    recipe = make_recipe({"contributors": ["ledger"], "options": {**record.options, **options}})
    method_options(recipe, record.method, "ledger")
    return record.make_method(**options)


def _plan(record: LedgerRecord, method: LeastSquares, base: Parent, dtype: str | None, max_shard_size: str) -> Plan:
    """As that of the merge that this equals to rounding, its steps the parts of the ledger."""
    people = [
        {
            "model": entry.model,
            "coefficient": entry.coefficient,
            "name": entry.name,
            "statistics": entry.statistics and entry.statistics.file,
        }
        for entry in record.contributors
    ]
    recipe = make_recipe(
        {
            "contributors": people,
            "method": record.method,
            "options": method.options.model_dump(mode="json"),
            "base": record.base.model,
            "exclude": record.exclude,
            "keep_separate": record.keep_separate,
            "dtype": dtype,
            "max_shard_size": max_shard_size,
        }
    )
    infos = base.checkpoint.tensors
    summed = {name for part in record.parts for name in part.names}
    rest = [Unit((name,), COPY, (Facts(name, info.shape),)) for name, info in infos.items() if name not in summed]
    specs = [
        TensorSpec(info.name, dtype if dtype and is_floating(info.dtype) else info.dtype, info.shape)
        for info in infos.values()
    ]
    return Plan(
        recipe=recipe,
        steps=(*record.steps(), *(Step(unit, COPY, (), (), reason=_BASES_OWN) for unit in rest)),
        outputs=tuple(specs if dtype else (_widest(spec, record) for spec in specs)),
        folders=nested_folders(base.checkpoint),
        main=base.checkpoint.main,
        base=record.base.model,
        bytes_read=sum(info.nbytes for info in infos.values()),
    )


def _widest(spec: TensorSpec, record: LedgerRecord) -> TensorSpec:
    if not is_floating(spec.dtype):
        return spec
    widest = DTYPES[spec.dtype]
    for entry in record.contributors:
        widest = torch.promote_types(widest, DTYPES[entry.dtypes.get(spec.name, spec.dtype)])
    return replace(spec, dtype=DTYPE_NAMES[widest])


def _parent(name: str, one: LedgerMember | BaseRecord) -> dict[str, Any]:
    statistics = one.statistics if isinstance(one, LedgerMember) else None
    return {
        "model": one.model,
        "name": name,
        "revision": one.revision,
        "coefficient": one.coefficient if isinstance(one, LedgerMember) else 1.0,
        "manifest_sha256": one.manifest_sha256,
        "statistics": statistics and statistics.model_dump(mode="json", exclude={"file"}),
    }
