"""From sums to a model: the folder that ``merganser merge`` of the same contributors would give, to rounding.

Only the base model and the ledger are read. Configuration, tokenizer and names are the base's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from merganser.checkpoints import hash_tensor
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec, check_output
from merganser.errors import RecipeError, UserError, raise_all
from merganser.files import new_folder, space_error
from merganser.merging import provenance
from merganser.merging.layout import make_layout, write_small_files
from merganser.merging.ledger.contributors import open_same_base
from merganser.merging.ledger.record import BaseRecord, Entry, LedgerError, Part, Record
from merganser.merging.ledger.store import Sums, locked
from merganser.merging.ledger.terms import shapes
from merganser.merging.ledger.terms import solve as solve_part
from merganser.merging.parents import Parent
from merganser.merging.plan import Plan, make_plan
from merganser.merging.recipe import make_recipe, method_options
from merganser.merging.shares import ParentShare
from merganser.methods.least_squares import LeastSquares
from merganser.progress import bar
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating, one_thread

_SPARE = 64_000_000  # bytes for everything that is not weights
_BASES_OWN = "no part of the ledger: the base's own"


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
    allow_pickle: bool = False,
) -> Path:
    """Write the merge of a ledger's contributors.

    Args:
        folder: the ledger; it stays as it is.
        output: the model folder to write; written whole or not at all.
        base: where the base model is, if not where it was.
        options: ``ridge`` alone, which does not go into the sums.
        dtype: storage dtype; by default the widest of the base and the contributors.
        max_shard_size: largest weight file.
        overwrite: replace an existing model folder.
        threads: how many parts are worked on at once; the bytes do not depend on it.
        allow_pickle: accept a base model in ``pytorch_model.bin``.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    place, target = Path(folder), Path(output)
    with locked(place, write=False) as record:
        if record.total == 0:
            what = "its coefficients sum to zero" if record.contributors else "it has no contributors"
            raise LedgerError(f"there is nothing to solve for: {what}", where=place, mend="merganser ledger add")
        method = _method(record, options or {})
        sums = Sums.open(place, record)
        reference = open_same_base(record, place, None if base is None else str(base), allow_pickle=allow_pickle)
        plan = _plan_of_base(record, reference, dtype, max_shard_size, allow_pickle)
        raise_all(_output_problems(target, place, plan, reference, overwrite))
        layout = make_layout(plan)
        with new_folder(target, overwrite=overwrite) as work:
            write_small_files(plan, layout, work)
            with SafetensorsWriter(work, layout.files) as writer:

                def write(spec: TensorSpec, tensor: torch.Tensor) -> str:
                    stored = tensor.to(DTYPES[spec.dtype]).contiguous()
                    if is_floating(spec.dtype) and not bool(torch.isfinite(stored.to(torch.float32)).all()):
                        raise RecipeError(
                            f"the merge of {spec.name!r} holds NaN or Inf (stored as {spec.dtype})",
                            mend="use a wider --dtype or a larger --ridge",
                        )
                    file, name = layout.places[spec.name]
                    writer.write(file, name, stored)
                    return hash_tensor(stored, spec.dtype, "blake3")

                outcomes = _Solving(record, method, sums, reference, plan, write).run(threads)
            (work / "README.md").write_text(_card(record, method, outcomes), encoding="utf-8")
            provenance.write_provenance(_provenance(record, method, plan, outcomes, work), work)
    return target


class _Solving:
    """The tensors of the result, part by part, written as they are solved."""

    def __init__(self, record: Record, method: LeastSquares, sums: Sums, base: Parent, plan: Plan, write: Any) -> None:
        self.record, self.method, self.sums, self.base, self.write = record, method, sums, base, write
        self.specs = {spec.name: spec for spec in plan.outputs}
        self.share = ParentShare(base, base)
        self.outcomes: dict[str, dict[str, Any]] = {}

    def run(self, threads: int | None) -> dict[str, dict[str, Any]]:
        """What became of each tensor, by name."""
        solved = {name for part in self.record.parts for name in part.names}
        rest = [name for name in self.specs if name not in solved]
        with (
            one_thread(),
            bar(len(self.record.parts), "solving") as progress,
            ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
        ):
            futures = [pool.submit(self._part, number, part) for number, part in enumerate(self.record.parts)]
            try:
                for future in futures:
                    future.result()
                    progress.update()
            finally:
                for future in futures:
                    future.cancel()
        for name in rest:
            self._copy(name, _BASES_OWN)
        return dict(sorted(self.outcomes.items()))

    def _part(self, number: int, part: Part) -> None:
        if part.treatment == "copy":
            return self._copy(part.names[0], part.reason)
        terms = self.sums.rounded(number, list(shapes(self.method, part)))
        try:
            merged = solve_part(self.method, part, part.unit(), terms, self.record.total, self.share)
        except ValueError as error:
            raise RecipeError(
                f"{', '.join(part.names)}: {error}",
                mend="remove the contributor whose statistics are wrong, or add a --ridge",
            ) from None
        used = "average" if part.reason else self.method.name
        for name, tensor in merged.tensors.items():
            digest = self.write(self.specs[name], tensor)
            self.outcomes[name] = _outcome(digest, used, part.reason, merged.note)

    def _copy(self, name: str, reason: str | None) -> None:
        digest = self.write(self.specs[name], self.base.checkpoint.read(name))
        self.outcomes[name] = _outcome(digest, "copy", reason, None)


def _outcome(blake3: str, method: str, reason: str | None, note: str | None) -> dict[str, Any]:
    return {"blake3": blake3, "method": method, "reason": reason, "note": note}


def _method(record: Record, options: Mapping[str, Any]) -> LeastSquares:
    for name in options:
        if name != "ridge":
            raise RecipeError(
                f"{name!r} went into the sums and cannot be changed",
                mend="make another ledger; only ridge can be chosen when solving",
            )
    recipe = make_recipe({"contributors": ["ledger"], "options": {**record.options, **options}})
    method_options(recipe, record.method, "ledger")
    return record.make_method(**options)


def _plan_of_base(record: Record, base: Parent, dtype: str | None, max_shard_size: str, allow_pickle: bool) -> Plan:
    """The plan of a merge of the base alone, its tensors as wide as the contributors': names, files, side files."""
    recipe = {
        "contributors": [base.contributor.model],
        "method": "simple",
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "allow_pickle": allow_pickle,
    }
    plan = replace(make_plan(make_recipe(recipe)), parents=(base,))  # the one whose hashes are known
    return plan if dtype else replace(plan, outputs=tuple(_widest(spec, record) for spec in plan.outputs))


def _widest(spec: TensorSpec, record: Record) -> TensorSpec:
    if not is_floating(spec.dtype):
        return spec
    widest = DTYPES[spec.dtype]
    for entry in record.contributors:
        widest = torch.promote_types(widest, DTYPES[entry.dtypes.get(spec.name, spec.dtype)])
    return replace(spec, dtype=DTYPE_NAMES[widest])


def _output_problems(target: Path, ledger: Path, plan: Plan, base: Parent, overwrite: bool) -> list[UserError]:
    problems: list[UserError] = []
    if problem := check_output(target, overwrite, [base.checkpoint.path, ledger]):
        problems.append(problem)
    if problem := space_error(target, plan.bytes_written + _SPARE):
        problems.append(problem)
    return problems


def _provenance(
    record: Record, method: LeastSquares, plan: Plan, outcomes: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """As a merge's, so that it is verified alike; the recipe is that of the merge that this equals to rounding."""
    found = provenance.make_provenance(plan, {}, folder)
    people = [
        {"model": e.model, "coefficient": e.coefficient, "name": e.name, **_statistics_file(e)}
        for e in record.contributors
    ]
    recipe = {
        **found["recipe"],
        "contributors": people,
        "method": record.method,
        "options": method.options.model_dump(mode="json"),
        "base": record.base.model,
        "exclude": list(record.exclude),
        "keep_separate": list(record.keep_separate),
    }
    base = _parent("base", record.base)
    ledger = {"generation": record.generation, "base_manifest_sha256": record.base.manifest_sha256}
    parents = [_parent(entry.name, entry) for entry in record.contributors]
    changes = {"recipe": recipe, "parents": parents, "base": base, "tensors": dict(outcomes), "ledger": ledger}
    return {**found, **changes}


def _parent(name: str, one: Entry | BaseRecord) -> dict[str, Any]:
    statistics = one.statistics if isinstance(one, Entry) else None
    return {
        "model": one.model,
        "name": name,
        "revision": one.revision,
        "coefficient": one.coefficient if isinstance(one, Entry) else 1.0,
        "manifest_sha256": one.manifest_sha256,
        "statistics": statistics and statistics.model_dump(mode="json", exclude={"file"}),
    }


def _statistics_file(entry: Entry) -> dict[str, str]:
    return {"statistics": entry.statistics.file} if entry.statistics and entry.statistics.file else {}


def _card(record: Record, method: LeastSquares, outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md of the result, with the metadata that the Hub reads."""
    names = [e.model.rsplit("@", 1)[0] if e.revision else e.name for e in record.contributors]
    front = {
        "base_model": list(dict.fromkeys(names)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "merganser"],
    }
    options = ", ".join(f"{key} {value}" for key, value in method.options.model_dump().items()) or "no options"
    rows = "\n".join(
        f"| {name} | {e.coefficient:g} | {e.statistics.examples if e.statistics else '–'} | {e.manifest_sha256[:16]} |"
        for name, e in zip(names, record.contributors, strict=True)
    )
    kinds: dict[tuple[str, str], int] = {}
    for outcome in outcomes.values():
        key = (outcome["method"], outcome["reason"] or "")
        kinds[key] = kinds.get(key, 0) + 1
    treatment = "\n".join(f"| {used} | {count} | {why} |" for (used, why), count in sorted(kinds.items()))
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Merge of {len(names)} models by {method.name}

Made with merganser from a ledger, the sums over contributors that each added without the others: {method.summary}
({options}). `provenance.json` holds the hash of every contributor and of every tensor, and the method that was really
used for each; `merganser verify` checks it.

| contributor | coefficient | examples in its statistics | sha256 of its weights |
|---|---|---|---|
{rows}

| treatment | tensors | why not the method |
|---|---|---|
{treatment}

The licences of the contributors apply to the result.
"""
