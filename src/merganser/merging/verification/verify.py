"""Checking a merged folder against its provenance, and repeating the merge.

    merganser verify FOLDER
    merganser verify FOLDER --deep          # merge a sample of tensors again; --deep all: every one
    merganser reproduce FOLDER

Each check needs more than the one before. The folder alone shows whether its files are those that were recorded, and
whether the record agrees with its own hash and its own plan. With the parents, the plan and all small files are made
anew, and whatever follows from them is compared with the record. Last, tensors are merged again. Who changes a record,
its hash and the files alike is found out by the parents; who changes what no parent knows, such as the versions, only
by a signature.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from merganser.checkpoints import sha256_file
from merganser.errors import CheckpointError, ErrorCollector, RecipeError, raise_all
from merganser.files import scratch_folder
from merganser.merging.execution import Work
from merganser.merging.inputs import Inputs
from merganser.merging.judging import judge_statistics
from merganser.merging.memory import RunSettings, fit
from merganser.merging.merge import carry_out, prepare
from merganser.merging.plan import Plan
from merganser.merging.provenance import CARD, FILE_NAME, plan_of_record, read_provenance, recipe_of
from merganser.merging.recipe import Recipe
from merganser.merging.verification.folder_checks import check_files, differing_files
from merganser.merging.verification.mixtures import is_mixture, mixture_again, mixture_anew, mixture_work
from merganser.merging.verification.recomputing import recompute, sample
from merganser.merging.verification.record_checks import (
    check_itself,
    check_parents,
    compare,
    form_of,
    plan_anew,
    told_anew,
    told_by_itself,
    told_by_repetition,
)
from merganser.paths import expanded
from merganser.results import html_table

_OTHERWISE = "compare the versions in provenance.json with those installed here; another processor may round otherwise"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        files: how many files were checked.
        parents: how many parents were checked.
        absent: parents, or their statistics, that cannot be had here, with the reason.
        notes: what else was not checked, or is worth knowing.
        tensors: how many tensors were merged again and found to be the same.
        seed: of the sample of these; None where there was none.
    """

    files: int
    parents: int
    absent: tuple[str, ...]
    notes: tuple[str, ...] = ()
    tensors: int = 0
    seed: int | None = None

    def _repr_html_(self) -> str:
        row = [self.files, self.parents, self.tensors]
        return html_table("as recorded", ["files", "parents", "tensors merged again"], [row], self.absent + self.notes)


def verify(
    folder: str | Path,
    *,
    deep: int | Literal["all"] | None = None,
    seed: int | None = None,
    allow_rounding: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    max_memory: str | int | None = None,
) -> Verification:
    """Check a merged folder against its provenance, and its parents where they can be had.

    Args:
        folder: the merged folder.
        deep: merge so many steps of the plan again, drawn at random, or ``"all"``, and compare their tensors; an
            adapter is always made again as a whole.
        seed: draws the same sample again; by default another one each time, so that nobody knows it before.
        allow_rounding: let differences be that another kind of processor makes.
        allow_pickle: parents may be ``pytorch_model.bin``.
        threads, max_memory: as for :func:`merganser.merging.merge`, of what is merged again.

    Raises:
        UserError: everything that differs, at once; or tensors cannot be merged again.
    """
    if deep is not None and deep != "all" and deep < 1:
        raise RecipeError(f"{deep} steps are none", where="deep", mend="give a positive number, or all")
    folder, settings = expanded(folder), RunSettings.make(threads, max_memory, allow_pickle=allow_pickle)
    found, problems = read_provenance(folder), ErrorCollector()
    problems.add(*check_itself(found, folder), *check_files(folder, found, allow_pickle=allow_pickle))
    record = _check_record(found, folder, problems, allow_pickle=allow_pickle)
    problems.raise_all()
    total = len(found["parents"]) + bool(found.get("base"))
    notes = (*_of_card(found, folder), *record.notes)
    shallow = Verification(len(found["files"]), total - record.missing, record.absent, notes)
    if deep is None:
        return shallow
    work: Work | None = None
    if is_mixture(found) and not record.absent:
        plan, inputs, work = mixture_work(found, folder, settings)
    elif record.anew is not None:
        plan, inputs = record.anew
        verdict = judge_statistics(plan, inputs, settings.threads, fit(plan.steps, settings).budget)
        judged = {"influence": None, "judged": None} | verdict.record()
        raise_all([*verdict.problems, *compare(found, judged, folder)[0]])
    else:
        raise CheckpointError(f"cannot be merged again: {record.reason}", where=folder, mend="leave --deep out")
    if plan.rank is not None:
        if differing := _repeated(found, folder, None, settings, plan.notes):
            raise CheckpointError(f"made again, it differs in {', '.join(differing)}", where=folder, mend=_OTHERWISE)
        return replace(shallow, tensors=len(found["tensors"]))
    drawn = None if deep == "all" else secrets.randbits(32) if seed is None else seed
    steps = list(plan.steps) if deep == "all" or drawn is None else sample(plan.steps, deep, drawn)
    wrong, more = recompute(plan, inputs, steps, found, folder, settings, allow_rounding=allow_rounding, work=work)
    raise_all(wrong)
    tensors = sum(len(step.unit.names) for step in steps)
    return replace(shallow, notes=(*notes, *more), tensors=tensors, seed=drawn)


def reproduce(folder: str | Path, output: str | Path | None = None, *, allow_pickle: bool = False) -> list[str]:
    """Repeat a merge from its provenance and compare byte for byte with the files that are there.

    Args:
        folder: the merged folder.
        output: where to keep the repetition; by default it is thrown away.
        allow_pickle: parents may be ``pytorch_model.bin``.

    Returns:
        The files that differ, that are missing or that nobody can have made by this merge; empty when all are the same.

    Raises:
        UserError: a record that is not of these parents, parents that cannot be had or are other weights, or anything
            that :func:`merganser.merging.merge` raises.
    """
    folder = expanded(folder)
    found, problems = read_provenance(folder), ErrorCollector()
    if found.get("ledger") is not None:
        raise CheckpointError(
            "this was solved from the sums of a ledger, not merged from its contributors",
            where=folder,
            mend="repeat it from the ledger: merganser ledger solve LEDGER -o FOLDER",
        )
    problems.add(*check_itself(found, folder))
    record = _check_record(found, folder, problems, allow_pickle=allow_pickle)
    mend = "put it where it was"
    problems.add(*(CheckpointError(f"cannot be had: {one}", where=folder, mend=mend) for one in record.absent))
    problems.raise_all()
    notes = record.anew[0].notes if record.anew else ()
    return _repeated(found, folder, output, RunSettings.make(allow_pickle=allow_pickle), notes)


@dataclass(frozen=True)
class _Record:
    """What was found about a record.

    Attributes:
        missing: how many parents cannot be had.
        absent: these and statistics, with the reason.
        notes: what was not checked, and words that differ.
        reason: why there is no plan.
        anew: the plan made anew and its open files, where it is the recorded one.
    """

    missing: int
    absent: tuple[str, ...]
    notes: tuple[str, ...]
    reason: str = ""
    anew: tuple[Plan, Inputs] | None = None


def _check_record(
    provenance: Mapping[str, Any], folder: Path, problems: ErrorCollector, *, allow_pickle: bool
) -> _Record:
    """Hold a record against its parents, or, as far as it goes without them, against itself."""
    parents = check_parents(provenance, folder, allow_pickle=allow_pickle)
    problems.add(*parents.problems)
    reason, anew, told = "", None, None
    if is_mixture(provenance):
        reason = "it was not planned anew, since not all models can be had" if parents.absent else ""
        whole = not (parents.absent or parents.problems)
        told = problems.catch(mixture_anew, provenance, folder, allow_pickle=allow_pickle) if whole else {}
    elif provenance.get("ledger") is not None:
        reason = "it was solved from the sums of a ledger: what does not follow from the hashes is not checked"
    elif parents.absent:
        reason = "plan, configuration and tokenizer were not made anew, since not all parents can be had"
    elif not parents.problems:
        anew = problems.catch(plan_anew, provenance, folder, parents.hashes, allow_pickle=allow_pickle)
        told = None if anew is None else problems.catch(told_anew, *anew, provenance, folder)
    if told is None and not is_mixture(provenance):
        told = problems.catch(told_by_itself, provenance, folder)
    wrong, notes = ([], []) if told is None else compare(provenance, told, folder)
    problems.add(*wrong)
    absent = tuple(parents.absent)
    return _Record(parents.missing, absent, (*([reason] if reason else []), *notes), reason, anew)


def _of_card(provenance: Mapping[str, Any], folder: Path) -> list[str]:
    """What there is to say about the card, which is its owner's to edit."""
    card, recorded = folder / CARD, provenance.get("card")
    if recorded is None:
        return []
    if not card.is_file():
        return [f"{CARD} was removed after the merge"]
    return [] if sha256_file(card) == recorded else [f"{CARD} was edited after the merge"]


def _repeated(
    provenance: Mapping[str, Any],
    folder: Path,
    output: str | Path | None,
    settings: RunSettings,
    notes: tuple[str, ...],
) -> list[str]:
    """The files that differ between a merged folder and the same merge done again; ``notes`` are the plan's own."""
    if is_mixture(provenance):
        with scratch_folder() as scratch:
            place = Path(output) if output is not None else scratch / "again"
            mixture_again(provenance, folder, place, settings)
            return differing_files(folder, place)
    plan = plan_of_record(provenance, folder)
    if plan is not None and plan.rank is not None:  # while an adapter is made, notes are added to the plan's
        plan = replace(plan, notes=notes)
    again = plan or recipe_of(provenance, folder)
    with scratch_folder() as scratch:
        place = Path(output) if output is not None else scratch / "again"
        prepared = prepare(again, place, settings, adapter=form_of(provenance, folder), reads=[folder])
        if isinstance(again, Recipe):  # the record has its plan only since format 3
            chosen = replace(prepared.plan, choice=provenance.get("method_chosen_because"))
            prepared = replace(prepared, plan=chosen)
        carry_out(prepared, place)
        differing = differing_files(folder, place)
        wrong, _ = compare(provenance, told_by_repetition(read_provenance(place), provenance, folder), folder)
        return sorted([*differing, *([FILE_NAME] if wrong else [])])
