"""What a merge's provenance says, held against itself, its parents, and the plan made anew from these."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merganser.checkpoints import Checkpoint, open_changes, open_checkpoint, sha256_file
from merganser.checkpoints.tokenizer_files import is_tokenizer_file
from merganser.errors import CheckpointError, ErrorCollector, UserError
from merganser.files import scratch_folder
from merganser.merging.auto import choose_method
from merganser.merging.inputs import Inputs, open_inputs
from merganser.merging.plan import AdapterForm, Plan
from merganser.merging.planning import plan_of
from merganser.merging.provenance import (
    FILE_NAME,
    FORMAT,
    HASHES_ITSELF,
    SELF,
    ProvenanceRecord,
    describe_inputs,
    file_digests,
    library_versions,
    located,
    manifest_of,
    own_hash,
    pinned,
    plan_of_record,
    recipe_of,
    told_by,
)
from merganser.merging.recipe import Recipe, make_recipe
from merganser.merging.targets.checkpoint import make_layout, write_small_files
from merganser.statistics import FILE_NAME as STATISTICS

#: Keys below which there are sentences, which another version may word otherwise.
_WORDS = {"reason", "notes", "choice", "method_chosen_because", "others", "kind"}
#: Where keys may have come with later formats.
_GROWING = {"recipe", "options", "parents", "base", "statistics"}
_LEFT = "left behind, being no part of the model: "  # how the note begins on what else lies in a parent's folder
_PICKLE = "allow_pickle"  # which records had before format 4, and nobody heeds
_NOTHING = object()
_NO_FOLDER = Path(os.devnull)  # holds no file
_LONGEST = 100  # characters of a value in a message
_MEND = "give the parents that were merged, or merge again"


def check_itself(provenance: Mapping[str, Any], folder: Path) -> list[UserError]:
    """What is wrong with a record by itself: its hash, and keys that no version of its format writes."""
    where, problems = folder / FILE_NAME, ErrorCollector()
    if provenance["format"] >= HASHES_ITSELF or SELF in provenance:
        try:
            found = own_hash(provenance)
        except (RecursionError, ValueError) as error:
            raise CheckpointError(f"cannot be hashed: {error}", where=where, mend="restore the file") from None
        if found != provenance.get(SELF):
            what = f"was changed after the merge: its hash of itself is {found}, recorded {provenance.get(SELF)}"
            problems.add(CheckpointError(what, where=where, mend="restore the file, or merge again"))
    unknown = sorted(set(provenance) - set(ProvenanceRecord.model_fields))
    if unknown:
        what = f"keys that this version does not know, and cannot check: {', '.join(unknown[:5])}"
        problems.add(CheckpointError(what, where=where, mend="update merganser, or restore the file"))
    return problems.found


@dataclass(frozen=True)
class FoundParents:
    """The parents as they are now.

    Attributes:
        problems: what is not as it was merged, weights and statistics.
        absent: parents and statistics that cannot be had here, with the reason.
        missing: how many of these are parents.
        hashes: of the tensors of each, by its recorded name.
    """

    problems: list[UserError]
    absent: list[str]
    missing: int
    hashes: dict[str, dict[str, str]]


def check_parents(provenance: Mapping[str, Any], folder: Path, *, allow_pickle: bool = False) -> FoundParents:
    """Look for the parents, and hold their weights and statistics against the record."""
    problems, absent, hashes, missing = ErrorCollector(), list[str](), dict[str, dict[str, str]](), 0
    known: dict[str, Checkpoint] = {}
    people, base = provenance["recipe"]["contributors"], provenance["recipe"].get("base")
    base = located(base, folder) if isinstance(base, str) else None
    entries = [*provenance["parents"], *([provenance["base"]] if provenance.get("base") else [])]
    for number, entry in enumerate(entries):
        try:
            reference = pinned(entry) if entry.get("revision") else located(entry["model"], folder)
            if provenance["recipe"].get("without_base"):
                checkpoint: Checkpoint = open_changes([reference], base=base, allow_pickle=allow_pickle).adapters[0]
            else:
                checkpoint = open_checkpoint(reference, allow_pickle=allow_pickle, known=known, base=base)
            kind, recorded = manifest_of(entry)
            found = checkpoint.manifest_hash(kind)
        except UserError as error:
            absent.append(f"{entry['model']} ({error.what})")
            missing += 1
            continue
        hashes[entry["model"]] = checkpoint.hashes
        if found != recorded:
            what, mend = f"other weights than were merged: {kind} {found}, recorded {recorded}", "give the revision"
            problems.add(CheckpointError(what, where=entry["model"], mend=f"{mend} that was merged"))
        if entry["statistics"] is None:
            continue
        named = people[number].get("statistics") if number < len(people) else None
        place = Path(located(named, folder)) if isinstance(named, str) else checkpoint.home.path / STATISTICS
        if not place.is_file():
            absent.append(f"the statistics of {entry['model']} (no file {place})")
        elif (found := sha256_file(place)) != (recorded := entry["statistics"]["sha256"]):
            what = f"other statistics than were merged: sha256 {found}, recorded {recorded}"
            problems.add(CheckpointError(what, where=place, mend="give the file that was merged"))
    return FoundParents(problems.found, absent, missing, hashes)


def plan_anew(
    provenance: Mapping[str, Any], folder: Path, hashes: Mapping[str, dict[str, str]], *, allow_pickle: bool = False
) -> tuple[Plan, Inputs]:
    """The plan as it is made today of the recorded recipe and the parents, which are to be the recorded ones.

    Args:
        provenance: the record.
        folder: the merged folder.
        hashes: of the parents' tensors, what is known of them.
        allow_pickle: whether parents may be pickles.

    Raises:
        UserError: the recipe cannot be planned.
    """
    entries, base = provenance["parents"], provenance.get("base")
    recorded = _recipe(provenance, folder)
    recipe = recipe_of(provenance, folder)
    if len(entries) != len(recorded.contributors):
        what = f"{len(entries)} parents of {len(recorded.contributors)} contributors in the recipe"
        raise CheckpointError(what, where=folder / FILE_NAME, mend="restore the file, or merge again")
    people = tuple(
        here.model_copy(update={"model": pinned(entry) if entry["revision"] else here.model, "name": one.title})
        for here, one, entry in zip(recipe.contributors, recorded.contributors, entries, strict=True)
    )
    reference = pinned(base) if base and base["revision"] and recipe.base else recipe.base
    recipe = recipe.model_copy(update={"contributors": people, "base": reference})
    inputs = open_inputs(recipe, allow_pickle=allow_pickle)
    for parent, entry in zip(inputs.sources, [*entries, *([base] if base else [])], strict=False):
        parent.checkpoint.hashes.update(hashes.get(entry["model"], {}))
    asked = bool((provenance.get("coverage") or {}).get("linear"))  # other merges tell of no tensor what it is
    plan = plan_of(recipe, inputs, adapter=form_of(provenance, folder), ask_model=asked)
    choice = provenance.get("method_chosen_because")
    grown = any(p.statistics and not entry["statistics"] for p, entry in zip(inputs.parents, entries, strict=True))
    if choice is not None and not grown:  # else there is more to choose from than there was
        found = choose_method(recipe.model_copy(update={"options": {}}), inputs)
        method, because = found.row.method, found.because
        choice = because if method == plan.recipe.method else f"{method} would be chosen: {because}"
    return replace(plan, choice=choice), inputs if plan.base else replace(inputs, base=None)


def form_of(provenance: Mapping[str, Any], folder: Path) -> AdapterForm | None:
    """The form of the adapter that a record is of; None: of a full checkpoint."""
    rank = provenance.get("as_adapter")
    plan = None if rank is None else plan_of_record(provenance, folder)
    if rank is None:
        return None
    return AdapterForm(rank) if plan is None or plan.form is None else plan.form


def told_anew(plan: Plan, inputs: Inputs, provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a record is to say, by the plan that was made anew.

    Raises:
        UserError: a parent's configuration or tokenizer cannot be read.
    """
    told = _told(plan, describe_inputs(plan, inputs), provenance, folder)
    if plan.rank is None:
        layout = make_layout(plan)
        with scratch_folder() as scratch:
            write_small_files(plan, inputs, layout, scratch)
            told["files"] = {**file_digests(scratch, {}, {}), **weight_files(plan, provenance)}
        versions = provenance["versions"].get("transformers"), library_versions()["transformers"]
        if plan.vocabulary is not None and plan.vocabulary.added and versions[0] != versions[1]:
            tokenizers = (file for file in told["files"] if is_tokenizer_file(file))  # which another version writes
            told["files"] |= {file: provenance["files"].get(file) for file in tokenizers}
    return told


def told_by_itself(provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a record is to say, by its own recipe and plan.

    Raises:
        UserError: these are none.
    """
    recorded, ledger = _recipe(provenance, folder), provenance.get("ledger") is not None
    plan = None if ledger else plan_of_record(provenance, folder)  # a ledger's steps have no contributors
    people = [
        {**entry, "model": one.model, "name": one.title, "coefficient": one.coefficient}
        for one, entry in zip(recorded.contributors, provenance["parents"], strict=False)
    ]
    if plan is None:
        return {"parents": people}
    told = _told(plan, (people, provenance.get("base")), provenance, folder)
    if plan.rank is None:
        told["files"] = {**provenance["files"], **weight_files(plan, provenance)}
    return told


def _recipe(provenance: Mapping[str, Any], folder: Path) -> Recipe:
    """The recipe as it was written down; nothing is opened by it."""
    values = {key: value for key, value in provenance["recipe"].items() if key != _PICKLE}
    return make_recipe(values, str(folder / FILE_NAME))


def _told(
    plan: Plan,
    described: tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None],
    provenance: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """What follows from a plan, as JSON, with the names that the record has for what it was made from."""
    told = as_named(json.loads(json.dumps({**told_by(plan, *described), "as_adapter": plan.rank})), provenance, folder)
    if plan.rank is None:
        told["tensors"] = {
            name: {"method": step.method, "reason": step.reason} for step in plan.steps for name in step.unit.names
        }
    return told


def told_by_repetition(again: Mapping[str, Any], provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a record is to say, by that of the same merge done again; hashes are left to the files themselves."""
    hashes = {"tensors", "files", "card", "versions", SELF}
    told = as_named({key: again.get(key) for key in ProvenanceRecord.model_fields.keys() - hashes}, provenance, folder)
    told["tensors"] = {
        name: {key: entry[key] for key in ("method", "reason", "note")} for name, entry in again["tensors"].items()
    }
    return told


def as_named(told: dict[str, Any], provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a record is to say, with the names that it has for the places that it was made from."""
    recorded, base = _recipe(provenance, folder), provenance.get("base")
    told["format"] = provenance["format"]
    for one, entry in zip(recorded.contributors, told["parents"], strict=False):
        entry["model"] = one.model
    mine, theirs = [*told["parents"], told["base"] or {}], [*provenance["parents"], base or {}]
    for entry, other in zip(mine, theirs, strict=False) if provenance["format"] < FORMAT else ():
        if entry and other and manifest_of(other)[0] == "sha256":  # which was compared with the weights
            del entry["manifest_blake3"]
            entry["manifest_sha256"] = other["manifest_sha256"]
        if entry and other and told.get("as_adapter") is not None and other["statistics"] is None:
            entry["statistics"] = None  # of which adapters once said nothing
    name = recorded.base or (base["model"] if base else None)
    if told["base"] is not None:
        told["base"]["model"] = told["plan"]["base"] = name
    wheres = {"contributors": recorded.model_dump(mode="json")["contributors"], "base": recorded.base}
    told["recipe"] = {**told["recipe"], **wheres}
    if provenance["format"] < HASHES_ITSELF and _PICKLE in provenance["recipe"]:
        told["recipe"][_PICKLE] = provenance["recipe"][_PICKLE]
    return told


def weight_files(plan: Plan, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The weight files of a plan and their hashes, by those of the recorded tensors."""
    layout, tensors = make_layout(plan), provenance["tensors"]
    if set(tensors) != set(plan.specs) or not all(entry.get("blake3") for entry in tensors.values()):
        return {file: provenance["files"].get(file, "") for file in layout.files}
    hashes = {layout.places[name]: entry["blake3"] for name, entry in tensors.items()}
    return file_digests(_NO_FOLDER, hashes, layout.files)


def compare(provenance: Mapping[str, Any], told: Mapping[str, Any], folder: Path) -> tuple[list[UserError], list[str]]:
    """Where a record says something else than what it is to say.

    Args:
        provenance: the record.
        told: what it is to say.
        folder: named in errors.

    Returns:
        The differences, one of each part of the record; and those that another version of merganser or of transformers
        may have made, being of words alone.
    """
    older = provenance["format"] < FORMAT
    told = {key: value for key, value in told.items() if key in provenance or not older}
    found = {key: provenance.get(key) for key in told}
    if tensors := told.get("tensors"):
        keys = [*next(iter(tensors.values()))]
        found["tensors"] = {name: {key: entry[key] for key in keys} for name, entry in provenance["tensors"].items()}
    elif told.get("as_adapter") is not None and "plan" in told:  # more is found out while it is made
        said = provenance.get("notes") or []
        told = {**told, "plan": {**told["plan"], "notes": said}}
        found |= {"notes": said[: len(told["notes"])], "plan": {"notes": [], **(found["plan"] or {})}}
    here, versions = library_versions(), provenance["versions"]
    others = [key for key in ("merganser", "transformers") if versions.get(key) != here[key]]
    groups: dict[tuple[str, bool], list[str]] = {}
    for place, have, want in _differences(found, told, growing=older):
        words = bool(_WORDS.intersection(place)) and (bool(others) or older or _only_left_behind(place, have, want))
        text = f"{_shown_place(place)} is {_shown(have)}, where {_shown(want)} follows from the recipe and its parents"
        groups.setdefault((place[0], words), []).append(text)
    problems, notes = list[UserError](), list[str]()
    for (_, words), texts in groups.items():
        text = texts[0] + (f"; and {len(texts) - 1} more like it" if len(texts) > 1 else "")
        if words:
            notes.append(f"worded otherwise today: {text}")
        else:
            problems.append(CheckpointError(text, where=folder / FILE_NAME, mend=_MEND))
    return problems, notes


def _differences(
    have: Any, want: Any, place: tuple[str, ...] = (), *, growing: bool = False
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Places at which two JSON values differ, and what stands there; a missing key differs from every value.

    Args:
        have, want: the values.
        place: where they stand.
        growing: keys that are missing from ``have`` are no difference where later formats have added some.
    """
    if isinstance(have, dict) and isinstance(want, dict):
        added = not place or _GROWING.intersection(place[-1:]) or "contributors" in place[-2:]
        lenient = growing and (added or place[0] == "parents")
        for key in dict.fromkeys([*want, *have]):
            if not (lenient and key not in have):
                yield from _differences(
                    have.get(key, _NOTHING), want.get(key, _NOTHING), (*place, str(key)), growing=growing
                )
    elif isinstance(have, list) and isinstance(want, list) and len(have) == len(want):
        for number, (one, other) in enumerate(zip(have, want, strict=True)):
            yield from _differences(one, other, (*place, str(number)), growing=growing)
    elif have != want or isinstance(have, bool) != isinstance(want, bool):
        yield place, have, want


def _only_left_behind(place: Sequence[str], have: Any, want: Any) -> bool:
    """Whether notes differ in nothing but what else lies in a parent's folder, which may come and go."""
    notes = [[one] if isinstance(one, str) else one if isinstance(one, list) else [] for one in (have, want)]
    here, there = ([note for note in some if not str(note).startswith(_LEFT)] for some in notes)
    return "notes" in place and here == there


def _shown_place(place: Sequence[str]) -> str:
    first, *rest = place
    return first + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)


def _shown(value: Any) -> str:
    """A value in few words."""
    if value is _NOTHING:
        return "not there"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
