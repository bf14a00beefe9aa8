"""The verbs: merge, verify, reproduce."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from merganser.checkpoints import home_of
from merganser.checkpoints.writer import check_output
from merganser.engines import Engine
from merganser.errors import CheckpointError, RecipeError, UserError, raise_all
from merganser.files import is_url, new_folder, parse_size, space_error
from merganser.merging import provenance
from merganser.merging.adapter_output import carry_out_adapter
from merganser.merging.card import model_card
from merganser.merging.distributed import run_on
from merganser.merging.execution import Execution
from merganser.merging.layout import make_layout, write_small_files
from merganser.merging.memory import available_bytes
from merganser.merging.places import Place, RemotePlace, new_remote
from merganser.merging.plan import Plan, make_plan
from merganser.merging.recipe import Contributor, Recipe, make_recipe
from merganser.merging.running_sums import RunningSums, check_sums
from merganser.progress import track

#: A folder, or a folder or fsspec URL as text.
Output = TypeVar("Output", str, Path)
_SPARE = 64_000_000  # bytes for everything that is not weights


def merge(
    models: Recipe | Sequence[str | Path | Contributor],
    output: Output,
    *,
    method: str = "auto",
    base: str | Path | None = None,
    coefficients: Sequence[float] | None = None,
    statistics: Sequence[str | Path] | None = None,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    sums: str | Path | None = None,
    max_memory: str | int | None = None,
    device: str = "cpu",
    engine: Engine | None = None,
    as_adapter: int | None = None,
    **settings: Any,
) -> Output:
    """Merge checkpoints of one pre-trained model into a folder that ``from_pretrained`` opens.

    Args:
        models: the checkpoints (folders or ``org/name@revision``), or a whole :class:`Recipe`, which then stands
            alone: give no other setting with it.
        output: the folder or fsspec URL to write; written whole or not at all.
        method: ``auto``, or one of ``merganser.methods.METHODS``.
        base: the pre-trained model, for the methods that need it.
        coefficients: one weight a model, relative; equal by default.
        statistics: one statistics file a model; by default the one in each model's folder.
        options: the method's options, such as ``{"alpha": 0.9}``.
        overwrite: replace an existing model folder.
        threads: how many units are worked on at once; the bytes do not depend on it.
        sums: a folder that keeps the running sums of Gram matrices: a merge whose first contributors were merged
            last with this folder reads their sums instead of their Gram matrices. The bytes do not depend on it.
        max_memory: what the process may take, in bytes or as ``"2GB"``; by default what the machine has. The bytes
            do not depend on it.
        device: ``cpu``, ``cuda`` or ``auto``.
        engine: where the work is done (see :mod:`merganser.engines`); by default in this process.
        as_adapter: write the nearest LoRA adapter of this rank instead of a full checkpoint.
        settings: the other keys of :class:`Recipe`: ``exclude``, ``keep_separate``, ``labels``, ``vocabulary``,
            ``dtype``, ``max_shard_size``, ``allow_pickle``.

    Returns:
        The output, as it was given.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    if isinstance(models, Recipe):
        recipe = models
    else:
        contributors = contributors_of(models, coefficients, statistics)
        values = {"contributors": contributors, "method": method, "options": dict(options or {}), **settings}
        recipe = make_recipe(values if base is None else {**values, "base": str(base)}, "merge()")
    plan = prepare(
        recipe, output, overwrite=overwrite, threads=threads, sums=sums, max_memory=max_memory, device=device
    )
    if as_adapter is not None:
        carry_out_adapter(plan, Path(output), as_adapter, overwrite=overwrite)
        return output
    return carry_out(plan, output, overwrite=overwrite, engine=engine)


def contributors_of(
    models: Sequence[str | Path | Contributor],
    coefficients: Sequence[float] | None = None,
    statistics: Sequence[str | Path] | None = None,
) -> list[dict[str, Any]]:
    """Contributors of a recipe from parallel lists.

    Raises:
        RecipeError: lists of different length.
    """
    for name, values in (("coefficients", coefficients), ("statistics", statistics)):
        if values is not None and len(values) != len(models):
            raise RecipeError(
                f"{len(values)} {name} for {len(models)} models", where=name, mend="give one for each model, in order"
            )
    found = []
    for number, model in enumerate(models):
        entry: dict[str, Any] = model.model_dump() if isinstance(model, Contributor) else {"model": str(model)}
        if coefficients is not None:
            entry["coefficient"] = coefficients[number]
        if statistics is not None:
            entry["statistics"] = str(statistics[number])
        found.append(entry)
    return found


def prepare(
    recipe: Recipe,
    output: str | Path | None,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    sums: str | Path | None = None,
    max_memory: str | int | None = None,
    device: str = "cpu",
) -> Plan:
    """The plan of a merge, everything checked: headers, statistics against weights, place and space for the result.

    Args:
        recipe: what to merge.
        output: where to; None checks no place (for a dry run).
        overwrite: whether an existing model folder may be replaced.
        threads: how many units are worked on at once; all cores by default.
        sums: the folder for running sums; made where there is none.
        max_memory: what the process may take, in bytes or as ``"2GB"``.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        UserError: what cannot be merged, all mistakes at once.
    """
    kept = None if sums is None else RunningSums(Path(sums))
    plan = make_plan(
        recipe,
        threads=threads or os.cpu_count() or 1,
        max_memory=parse_size(max_memory) if isinstance(max_memory, str) else max_memory,
        device=choose_device(device),
    )
    plan = replace(plan, kept=kept)
    problems: list[UserError] = []
    if (missing := plan.peak_bytes - plan.resident - available_bytes()) > 0:
        problems.append(
            RecipeError(
                f"too little memory: {plan.peak_bytes / 1e9:.2f} GB are needed, {missing / 1e9:.2f} GB more than "
                "are free",
                where="memory",
                mend="free some memory, or work in less: --max-memory SIZE, --threads 1",
            )
        )
    if output is not None and is_url(output):
        if not overwrite and RemotePlace(str(output)).exists():
            problems.append(CheckpointError("the output exists", where=output, mend="give another URL, or --overwrite"))
    elif output is not None:
        output = Path(output)
        opened = [parent.checkpoint for parent in plan.parents]
        sources = [place.path for one in opened for place in (one, home_of(one))]
        if problem := check_output(output, overwrite, sources):
            problems.append(problem)
        if plan.kept is not None:
            units = (step.unit for step in plan.steps if step.method == plan.method.name)
            models = (parent.checkpoint.path for parent in plan.parents)
            if problem := check_sums(plan.kept.folder, plan.method, units, models, output):
                problems.append(problem)
        if problem := space_error(output, plan.bytes_written + _SPARE):
            problems.append(problem)
    raise_all(problems)
    for parent in [*plan.parents, *([plan.base] if plan.base else [])]:
        parent.checkpoint.fetch()
    if plan.method.needs.statistics:
        _hash(plan)
        for parent in plan.parents:
            if parent.statistics is not None:
                problems += parent.statistics.check_binding(parent.checkpoint)
    raise_all(problems)
    return plan


def choose_device(name: str) -> str:
    """The device to compute on: ``auto`` is a CUDA device where there is one.

    Raises:
        RecipeError: an unknown one, or CUDA where there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise RecipeError(f"unknown device {name!r}", where="device", mend="give cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("there is no CUDA device", where="device", mend="use cpu or auto")
    return name


def _hash(plan: Plan) -> None:
    """Hash all weights and statistics, several tensors and files at once."""
    work: list[Callable[[], str]] = [p.statistics.sha256 for p in plan.parents if p.statistics is not None]
    work += [partial(p.checkpoint.sha256, name) for p in plan.parents for name in p.checkpoint.tensors]
    with ThreadPoolExecutor(plan.threads) as pool:
        for _ in track(pool.map(lambda one: one(), work), "hashing", "tensors", len(work)):
            pass


def carry_out(plan: Plan, output: Output, *, overwrite: bool = False, engine: Engine | None = None) -> Output:
    """Do what a plan says.

    Args:
        plan: what :func:`prepare` returned.
        output: a folder, or an fsspec URL.
        overwrite: replace what is there.
        engine: where the work is done, one job a weight file; by default in this process.

    Returns:
        The output, as it was given.

    Raises:
        UserError: non-finite numbers in or out, a full disk; nothing is left behind.
    """
    layout = make_layout(plan)
    with _new_output(output, overwrite) as (place, folder):
        write_small_files(plan, layout, folder)
        if engine is not None:
            outcomes = run_on(engine, plan, layout, place)
        else:
            outcomes = Execution(plan, layout, folder).run()
        (folder / "README.md").write_text(model_card(plan, layout, outcomes), encoding="utf-8")
        provenance.write_provenance(provenance.make_provenance(plan, outcomes, folder, layout), folder)
    return output


@contextmanager
def _new_output(output: str | Path, overwrite: bool) -> Iterator[tuple[Place, Path]]:
    """The place of the weight files, and a local folder for everything else."""
    if is_url(output):
        with new_remote(str(output), overwrite=overwrite) as (place, folder):
            yield place, folder
    else:
        with new_folder(Path(output), overwrite=overwrite) as folder:
            yield Place(folder), folder


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        files: how many files were checked.
        parents: how many parents were checked.
        absent: parents that cannot be had here, with the reason.
    """

    files: int
    parents: int
    absent: tuple[str, ...]


def verify(folder: str | Path) -> Verification:
    """Check a merged folder against its provenance, and its parents where they can be had.

    Raises:
        UserError: everything that differs, at once.
    """
    found = provenance.read_provenance(Path(folder))
    parents, absent = provenance.check_parents(found, Path(folder))
    raise_all(provenance.check_files(Path(folder), found) + parents)
    total = len(found["parents"]) + bool(found.get("base"))
    return Verification(len(found["files"]), total - len(absent), tuple(absent))


def reproduce(folder: str | Path, output: str | Path | None = None) -> list[str]:
    """Repeat a merge from its provenance and compare byte for byte.

    Args:
        folder: the merged folder.
        output: where to keep the repetition; by default it is thrown away.

    Returns:
        The files that differ from those recorded; empty when all are the same.

    Raises:
        UserError: parents that cannot be had or are other weights, or anything that :func:`merge` raises.
    """
    folder = Path(folder)
    found = provenance.read_provenance(folder)
    if "ledger" in found:
        raise CheckpointError(
            "this was solved from the sums of a ledger, not merged from its contributors",
            where=folder,
            mend="repeat it from the ledger: merganser ledger solve LEDGER -o FOLDER",
        )
    problems, absent = provenance.check_parents(found, folder)
    problems += [
        CheckpointError(f"a parent cannot be had: {reason}", where=folder, mend="put it where it was")
        for reason in absent
    ]
    raise_all(problems)
    recipe = provenance.recipe_of(found, folder)
    with tempfile.TemporaryDirectory(prefix="merganser-") as scratch:
        place = Path(output) if output is not None else Path(scratch) / "again"
        plan = replace(prepare(recipe, place), choice=found.get("method_chosen_because"))
        rank = found.get("as_adapter")
        carry_out(plan, place) if rank is None else carry_out_adapter(plan, place, rank)
        return provenance.differing_files(found["files"], place)
