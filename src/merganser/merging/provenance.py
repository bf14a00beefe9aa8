"""``provenance.json``: what a merge was made of, so that anyone can check it and repeat it byte for byte.

It holds no time and no name of the output folder: the same merge gives the same file.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.reader import read_json
from merganser.errors import CheckpointError, UserError
from merganser.merging.digests import file_digest, file_digests
from merganser.merging.execution import Outcome
from merganser.merging.layout import Layout
from merganser.merging.parents import Parent
from merganser.merging.plan import Plan
from merganser.merging.recipe import Recipe, make_recipe

FILE_NAME = "provenance.json"
FORMAT = 2  # 1 had sha256 where this one has blake3
_LOADED = (".safetensors", ".bin", ".json", ".py")  # files that change what from_pretrained loads


def make_provenance(
    plan: Plan, outcomes: Mapping[str, Outcome], folder: Path, layout: Layout | None = None
) -> dict[str, Any]:
    """Everything that ``provenance.json`` says, with the hashes of all files that are in ``folder`` by now.

    The card is left out: its owner is meant to edit it.
    """
    return {
        "format": FORMAT,
        "recipe": plan.recipe.model_dump(mode="json"),
        "method_chosen_because": plan.choice,
        "parents": [describe_parent(parent, plan.method.needs.statistics is not None) for parent in plan.parents],
        "base": describe_parent(plan.base, False) if plan.base else None,
        "notes": list(plan.notes),
        "tensors": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "files": file_digests(folder, _files(folder), layout, outcomes),
        "versions": library_versions(),
    }


def write_provenance(provenance: Mapping[str, Any], folder: Path) -> None:
    """Write ``provenance.json`` into ``folder``."""
    text = json.dumps(provenance, indent=1, ensure_ascii=False) + "\n"
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a merged folder.

    Raises:
        CheckpointError: there is none, or it is of a newer format or malformed.
    """
    path = folder / FILE_NAME
    found = read_json(path)
    if found is None:
        raise CheckpointError(f"no {FILE_NAME} here", where=folder, mend="give a folder that merganser merge wrote")
    if not isinstance(found.get("format"), int) or found["format"] > FORMAT:
        raise CheckpointError(
            f"provenance of format {found.get('format')!r}, this version reads up to {FORMAT}",
            where=path,
            mend="update merganser",
        )
    shapes = {"recipe": dict, "parents": list, "tensors": dict, "files": dict}
    for key, kind in shapes.items():
        if not isinstance(found.get(key), kind):
            raise CheckpointError(f"{key!r} is missing or malformed", where=path, mend="merge again")
    return found


def recipe_of(provenance: Mapping[str, Any], where: Path) -> Recipe:
    """The recipe to repeat a merge by, its folders as they are found from here."""
    recipe = make_recipe(provenance["recipe"], str(where / FILE_NAME))
    people = tuple(
        one.model_copy(
            update={"model": located(one.model, where), "statistics": one.statistics and located(one.statistics, where)}
        )
        for one in recipe.contributors
    )
    return recipe.model_copy(update={"contributors": people, "base": recipe.base and located(recipe.base, where)})


def located(reference: str, folder: Path) -> str:
    """A path that was relative to where the merge ran: as it is, or below a folder that holds ``folder``.

    Whatever is found is held against its recorded hash before it is used.
    """
    if Path(reference).is_absolute() or Path(reference).exists():
        return reference
    if "+" in reference:  # base+adapter
        return "+".join(located(part, folder) for part in reference.split("+") if part)
    places = (place / reference for place in folder.resolve().parents)
    return next((str(place) for place in places if place.exists()), reference)


def check_files(folder: Path, provenance: Mapping[str, Any]) -> list[UserError]:
    """What differs between a merged folder and its provenance: files and tensors, changed, missing or added."""
    problems: list[UserError] = []
    recorded, present = provenance["files"], set(_files(folder))
    for file in sorted(set(recorded) | present):
        if file not in present:
            problems.append(CheckpointError(f"{file} is missing", where=folder, mend="merge again"))
        elif file not in recorded:
            if Path(file).suffix in _LOADED and not file.endswith("merge_statistics.safetensors"):
                problems.append(CheckpointError(f"{file} was added after the merge", where=folder, mend="remove it"))
        elif (found := file_digest(folder / file, recorded[file])) != recorded[file]:
            problems.append(
                CheckpointError(
                    f"{file} was changed after the merge: its hash is {found}, recorded {recorded[file]}",
                    where=folder,
                    mend="merge again, or restore the file",
                )
            )
    return problems


def differing_files(recorded: Mapping[str, str], folder: Path) -> list[str]:
    """The files that are not as recorded in a folder, or not recorded at all."""
    present = _files(folder)
    return sorted(
        file
        for file in {*recorded, *present}
        if file not in present or file not in recorded or file_digest(folder / file, recorded[file]) != recorded[file]
    )


def check_parents(provenance: Mapping[str, Any], folder: Path) -> tuple[list[UserError], list[str]]:
    """What differs between the parents as they are now and as they were merged; and which cannot be had here."""
    problems: list[UserError] = []
    absent = []
    for entry in [*provenance["parents"], *([provenance["base"]] if provenance.get("base") else [])]:
        try:
            reference = _pinned(entry) if entry.get("revision") else located(entry["model"], folder)
            checkpoint = open_checkpoint(reference, allow_pickle=provenance["recipe"].get("allow_pickle", False))
        except UserError as error:
            absent.append(f"{entry['model']} ({error.what})")
            continue
        kind, recorded = manifest_of(entry)
        if (found := checkpoint.manifest_hash(kind)) != recorded:
            problems.append(
                CheckpointError(
                    f"other weights than were merged: {kind} {found}, recorded {recorded}",
                    where=entry["model"],
                    mend="give the revision that was merged",
                )
            )
    return problems, absent


def library_versions() -> dict[str, str]:
    """Versions of what the result's bytes may depend on."""
    found = {"python": platform.python_version()}
    for package in ("merganser", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def manifest_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of a recorded parent's hash, and the hash: sha256 of ledgers and of format 1, else blake3."""
    kind = "blake3" if "manifest_blake3" in entry else "sha256"
    return kind, str(entry[f"manifest_{kind}"])


def _pinned(entry: Mapping[str, Any]) -> str:
    if "+" in str(entry["revision"]):  # an adapter on its base: the whole reference
        return str(entry["revision"])
    return f"{str(entry['model']).rsplit('@', 1)[0]}@{entry['revision']}"


def describe_parent(parent: Parent, uses_statistics: bool) -> dict[str, Any]:
    """A contributor or base as it is recorded: its name, coefficient and hashes."""
    statistics = parent.statistics if uses_statistics else None
    return {
        "model": parent.contributor.model,
        "name": parent.title,
        "revision": parent.checkpoint.revision,
        "coefficient": parent.contributor.coefficient,
        "manifest_blake3": parent.checkpoint.manifest_hash("blake3"),
        "statistics": statistics
        and {
            "sha256": statistics.sha256(),
            "label": statistics.header.label,
            "examples": statistics.header.examples,
            "tokens": statistics.header.tokens,
        },
    }


def _files(folder: Path) -> list[str]:
    inside = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in inside)
    return sorted(name for name in names if name not in (FILE_NAME, "README.md"))
