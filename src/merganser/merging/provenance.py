"""What is told of a merge: its model card, and ``provenance.json``, by which anyone can check it and repeat it.

``provenance.json`` holds no time and no name of the output folder: the same merge gives the same file.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from merganser.checkpoints import open_checkpoint, sha256_file
from merganser.checkpoints.header import TensorInfo, read_header, tensor_infos
from merganser.checkpoints.reader import HASHES, PIECE, begin_hash, read_json
from merganser.checkpoints.writer import TensorSpec, file_layout
from merganser.errors import CheckpointError, UserError
from merganser.merging.execution import TensorRecord
from merganser.merging.plan import Plan
from merganser.merging.recipe import Inputs, Parent, Recipe, make_recipe
from merganser.text import markdown

FILE_NAME = "provenance.json"
FORMAT = 3  # 1 had sha256 where later ones have blake3, and neither 1 nor 2 had the plan
_KINDS = {"blake3:": "blake3", "tensors:": "sha256"}  # by how a weight file's hash begins
_LOADED = (".safetensors", ".bin", ".json", ".py")  # files that change what from_pretrained loads


def write_provenance(
    plan: Plan,
    folder: Path,
    records: Mapping[str, TensorRecord],
    parents: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None,
    files: Mapping[str, Sequence[TensorSpec]] | None = None,
    places: Mapping[str, tuple[str, str]] | None = None,
    **more: Any,
) -> None:
    """Write ``provenance.json`` into ``folder``, with the hashes of all files that are there by now.

    The card is left out: its owner is meant to edit it.

    Args:
        plan: what was done.
        folder: of the result.
        records: what became of each tensor.
        parents: the contributors, see :func:`describe_parent`.
        base: the base model, likewise.
        files: the tensors of each weight file; these need not be in the folder.
        places: file and name inside it of each tensor.
        more: what else is to be said.
    """
    values = plan.to_json()
    found = {
        "format": FORMAT,
        "recipe": values.pop("recipe"),
        "plan": values,
        "method_chosen_because": plan.choice,
        "parents": list(parents),
        "base": base,
        "coverage": {**asdict(plan.coverage), "share": plan.coverage.share},
        "notes": list(plan.notes),
        "tensors": {name: asdict(records[name]) for name in sorted(records)},
        "files": _file_digests(folder, records, files or {}, places or {}),
        "versions": library_versions(),
        **more,
    }
    (folder / FILE_NAME).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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


def plan_of_record(provenance: Mapping[str, Any], where: Path) -> Plan | None:
    """The plan to repeat a merge by, its folders as they are found from here; None in formats 1 and 2.

    Raises:
        RecipeError: the record was edited so that it is no plan.
    """
    if "plan" not in provenance:
        return None
    values = {**provenance["plan"], "recipe": recipe_of(provenance, where).model_dump(mode="json")}
    return Plan.from_json(values, str(where / FILE_NAME))


def recipe_of(provenance: Mapping[str, Any], where: Path) -> Recipe:
    """The recipe to repeat a merge by, its folders as they are found from here.

    That pickled weights were allowed once, as older records say, allows none now.
    """
    values = {key: value for key, value in provenance["recipe"].items() if key != "allow_pickle"}
    recipe = make_recipe(values, str(where / FILE_NAME))
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


def check_parents(
    provenance: Mapping[str, Any], folder: Path, *, allow_pickle: bool = False
) -> tuple[list[UserError], list[str]]:
    """What differs between the parents as they are now and as they were merged; and which cannot be had here."""
    problems: list[UserError] = []
    absent = []
    for entry in [*provenance["parents"], *([provenance["base"]] if provenance.get("base") else [])]:
        try:
            reference = _pinned(entry) if entry.get("revision") else located(entry["model"], folder)
            checkpoint = open_checkpoint(reference, allow_pickle=allow_pickle)
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


def describe_inputs(plan: Plan, inputs: Inputs) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The contributors and the base model as they are recorded."""
    uses = plan.method.needs.statistics is not None
    base = describe_parent(inputs.base, False) if inputs.base else None
    return [describe_parent(parent, uses) for parent in inputs.parents], base


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


def _file_digests(
    folder: Path,
    records: Mapping[str, TensorRecord],
    weights: Mapping[str, Sequence[TensorSpec]],
    places: Mapping[str, tuple[str, str]],
) -> dict[str, str]:
    """The hashes of a result's files.

    A weight file's is made of its header and of its tensors' hashes, which are known once the tensors are written: the
    file is not read again. It starts with ``blake3:``, or in provenance of format 1 with ``tensors:`` for sha256. Every
    other file's is the sha256 of its bytes.
    """
    known = {places[name]: record.blake3 for name, record in records.items() if name in places}
    found = {file: sha256_file(folder / file) for file in _files(folder) if file not in weights}
    for file, specs in weights.items():
        header, infos = file_layout(file, specs)
        found[file] = _digest(header, [known[file, info.name] for info in infos], "blake3:")
    return dict(sorted(found.items()))


def file_digest(path: Path, like: str) -> str:
    """The hash of a file, of the kind that ``like`` is.

    Raises:
        CheckpointError: no weight file where there should be one.
    """
    prefix = next((prefix for prefix in _KINDS if like.startswith(prefix)), None)
    if prefix is None:
        return sha256_file(path)
    header, infos = _layout(path)
    with path.open("rb") as stream:
        return _digest(header, [_hash(stream, info, _KINDS[prefix]) for info in infos], prefix)


def _hash(stream: BinaryIO, info: TensorInfo, kind: str) -> str:
    digest, left = begin_hash(info.dtype, info.shape, kind), info.nbytes
    stream.seek(info.offset)
    while left and (data := stream.read(min(left, PIECE))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def _digest(header: bytes, hashes: list[str], prefix: str) -> str:
    return prefix + HASHES[_KINDS[prefix]](header + "\n".join(hashes).encode()).hexdigest()


def _layout(path: Path) -> tuple[bytes, list[TensorInfo]]:
    """The bytes of a weight file's header, and its tensors in file order."""
    header, start = read_header(path)
    with path.open("rb") as stream:
        return stream.read(start), tensor_infos(header, start, path.stat().st_size, path, path.name)


def model_card(
    plan: Plan,
    people: Sequence[Mapping[str, Any]],
    records: Mapping[str, TensorRecord],
    *,
    front: Mapping[str, Any],
    made: str,
    title: str = "",
    sections: str = "",
    notes: Sequence[str] = (),
) -> str:
    """README.md of a result, with the metadata that the Hub reads.

    Args:
        plan: what was done.
        people: the contributors, as provenance has them.
        records: what became of each tensor.
        front: the metadata, beside the tags of a merge.
        made: how it was made, a paragraph.
        title: what it is, beside a merge of so many models.
        sections: more, in Markdown.
        notes: what the user should know.
    """
    metadata = {**front, "tags": [*front.get("tags", ()), "merge", "merganser"]}
    rows = "\n".join(
        f"| {markdown(public_name(one['model'], one['revision']))} | {one['coefficient']:g} | "
        f"{one['statistics']['examples'] if one['statistics'] else '–'} |"
        for one in people
    )
    used = Counter((r.method, r.reason if r.method != "kept separate" else None) for r in records.values())
    treatment = "\n".join(
        f"| {method} | {count} | {markdown(reason or '')} |"
        for (method, reason), count in sorted(used.items(), key=str)
    )
    options = ", ".join(f"{key} {markdown(value)}" for key, value in plan.recipe.options.items()) or "no options"
    said = "\n## Notes\n\n" + "".join(f"- {markdown(note)}\n" for note in notes) if notes else ""
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# Merge of {len(people)} models by {plan.method.name}{title}

{made.format(f"{plan.method.summary} ({options})")}

| contributor | coefficient | examples in its statistics |
|---|---|---|
{rows}

| treatment | tensors | why not the method |
|---|---|---|
{treatment}

{plan.method.name} reached {plan.coverage}.
{sections}{said}
The licences of the contributors apply to the result.
"""


def public_name(model: str, revision: str | None) -> str:
    """A Hub name as it is; of a local folder only its last part, which says nothing about the machine."""
    if revision and "+" in revision:  # an adapter on its base, one of them on the Hub
        name, _, commit = revision.rsplit("+", 1)[1].partition("@")
        return public_name(name, commit or None)
    return model.rsplit("@", 1)[0] if revision else model.rstrip("/").rsplit("/", 1)[-1]
