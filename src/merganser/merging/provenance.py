"""What is told of a merge: its model card, and ``provenance.json``, by which anyone can check it and repeat it.

``provenance.json`` holds no time and no name of the output folder: the same merge gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import yaml
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from merganser.checkpoints import sha256_file
from merganser.checkpoints.header import TensorInfo, read_header, tensor_infos
from merganser.checkpoints.reader import HASHES, PIECE, begin_hash, read_json
from merganser.checkpoints.writer import TensorSpec, file_layout
from merganser.errors import CheckpointError, validated
from merganser.merging.execution import TensorRecord
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.plan import Plan
from merganser.merging.recipe import Recipe, make_recipe
from merganser.paths import real
from merganser.text import markdown

FILE_NAME, CARD = "provenance.json", "README.md"
SELF = "sha256"  # the key of provenance's hash of itself
FORMAT = 5  # 1 had sha256 where later ones have blake3, neither 1 nor 2 had the plan, and 4 no rules and layers
HASHES_ITSELF = 4  # the format from which on provenance has a hash of itself
_KINDS = {"blake3:": "blake3", "tensors:": "sha256"}  # by how a weight file's hash begins
_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _StatisticsRecord(BaseModel):
    model_config = _STRICT
    sha256: str


class _ParentRecord(BaseModel):
    model_config = _STRICT
    model: str
    name: str
    revision: str | None
    coefficient: float | list[float]
    manifest_blake3: str | None = None
    manifest_sha256: str | None = None
    statistics: _StatisticsRecord | None

    @model_validator(mode="after")
    def _has_a_hash(self) -> _ParentRecord:
        if self.manifest_blake3 is None and self.manifest_sha256 is None:
            raise ValueError("there is no hash of its weights")
        return self


class _TensorEntry(BaseModel):
    model_config = _STRICT
    blake3: str | None = None
    sha256: str | None = None
    method: str
    reason: str | None
    note: str | None

    @model_validator(mode="after")
    def _has_a_hash(self) -> _TensorEntry:
        if self.blake3 is None and self.sha256 is None:
            raise ValueError("there is no hash")
        return self


class _RecipeRecord(BaseModel):
    model_config = _STRICT
    method: str
    contributors: list[dict[str, Any]]


class ProvenanceRecord(BaseModel):
    """What ``provenance.json`` has to look like, so that whoever reads it needs to doubt no type.

    A key that is no field is none that this version writes; what its values mean is checked by
    :mod:`merganser.merging.verification`.
    """

    model_config = _STRICT
    format: int
    recipe: _RecipeRecord
    plan: dict[str, Any] | None = None
    method_chosen_because: str | None = None
    parents: list[_ParentRecord]
    base: _ParentRecord | None = None
    coverage: dict[str, Any] | None = None
    notes: list[str] = []
    tensors: dict[str, _TensorEntry]
    files: dict[str, str]
    card: str | None = None
    versions: dict[str, str]
    as_adapter: int | None = None
    ledger: dict[str, Any] | None = None
    influence: dict[str, Any] | None = None
    judged: list[str] = []
    sha256: str | None = None

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for file in files:
            path = PurePosixPath(file)
            if not file or path.is_absolute() or ".." in path.parts or "\0" in file or str(path) != file:
                raise ValueError(f"{file!r} is no path inside the folder")
        return files


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

    The card's hash is kept apart: its owner is meant to edit it.

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
    hashes = {places[name]: record.blake3 for name, record in records.items() if places and name in places}
    found = {
        **told_by(plan, parents, base),
        "tensors": {name: asdict(records[name]) for name in sorted(records)},
        "files": file_digests(folder, hashes, files or {}),
        "card": sha256_file(folder / CARD) if (folder / CARD).is_file() else None,
        "versions": library_versions(),
        **more,
    }
    found[SELF] = own_hash(found)
    (folder / FILE_NAME).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def told_by(plan: Plan, parents: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of provenance that follows from the plan and the inputs' files, before any tensor is merged."""
    values = plan.to_json()
    return {
        "format": FORMAT,
        "recipe": values.pop("recipe"),
        "plan": values,
        "method_chosen_because": plan.choice,
        "parents": list(parents),
        "base": base,
        "coverage": {**asdict(plan.coverage), "share": plan.coverage.share},
        "notes": list(plan.notes),
    }


def own_hash(provenance: Mapping[str, Any]) -> str:
    """The hash of everything else that provenance says, in hexadecimal: sha256 of JSON with sorted keys, no spaces."""
    values = {key: value for key, value in provenance.items() if key != SELF}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a merged folder, of any format so far.

    Raises:
        CheckpointError: there is none, or it is of a newer format or malformed.
        Problems: it is malformed in several places.
    """
    path = folder / FILE_NAME
    found = read_json(path)
    if found is None:
        raise CheckpointError(f"no {FILE_NAME} here", where=folder, mend="give a folder that merganser merge wrote")
    if type(found.get("format")) is not int or not 1 <= found["format"] <= FORMAT:
        raise CheckpointError(
            f"provenance of format {found.get('format')!r}, this version reads 1 to {FORMAT}",
            where=path,
            mend="update merganser",
        )
    validated(ProvenanceRecord, found, str(path), CheckpointError)
    return found


def plan_of_record(provenance: Mapping[str, Any], where: Path) -> Plan | None:
    """The plan to repeat a merge by, its folders as they are found from here; None in formats 1 and 2.

    Raises:
        RecipeError: the record was edited so that it is no plan.
    """
    if provenance.get("plan") is None:
        return None
    recipe = recipe_of(provenance, where)
    return Plan.from_json({**provenance["plan"], "recipe": recipe.model_dump(mode="json")}, str(where / FILE_NAME))


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
    if Path(reference).is_absolute() or os.path.exists(reference):  # noqa: PTH110 (of no possible path, this is False)
        return reference
    if "+" in reference:  # base+adapter
        return "+".join(located(part, folder) for part in reference.split("+") if part)
    places = (place / reference for place in real(folder).parents)
    return next((str(place) for place in places if os.path.exists(place)), reference)  # noqa: PTH110


def library_versions() -> dict[str, str]:
    """Versions of what the result's bytes may depend on."""
    packages = ("merganser", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{package: _installed(package) for package in packages}}


@cache
def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def manifest_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of a recorded parent's hash, and the hash: sha256 of ledgers and of format 1, else blake3."""
    kind = "blake3" if entry.get("manifest_blake3") else "sha256"
    return kind, str(entry[f"manifest_{kind}"])


def pinned(entry: Mapping[str, Any]) -> str:
    """A recorded parent that is on the Hub, at its commit."""
    if "+" in str(entry["revision"]):  # an adapter on its base: the whole reference
        return str(entry["revision"])
    return f"{str(entry['model']).rsplit('@', 1)[0]}@{entry['revision']}"


def describe_inputs(plan: Plan, inputs: Inputs) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The contributors and the base model as they are recorded."""
    uses = bool(plan.statistics) or plan.rank is not None  # an adapter's norms are made of them
    base = describe_parent(inputs.base, False) if inputs.base and not inputs.without_base else None
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


def file_digests(
    folder: Path, hashes: Mapping[tuple[str, str], str], weights: Mapping[str, Sequence[TensorSpec]]
) -> dict[str, str]:
    """The hashes of a result's files.

    A weight file's is made of its header and of its tensors' hashes, which are known once the tensors are written: the
    file is not read again. It starts with ``blake3:``, or in provenance of format 1 with ``tensors:`` for sha256. Every
    other file's is the sha256 of its bytes.

    Args:
        folder: of the result.
        hashes: of each tensor, by its file and its name in it.
        weights: the tensors of each weight file.
    """
    inside = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in inside} - {FILE_NAME, CARD, *weights}
    found = {file: sha256_file(folder / file) for file in names}
    for file, specs in weights.items():
        header, infos = file_layout(file, specs)
        found[file] = _digest(header, [hashes[file, info.name] for info in infos], "blake3:")
    return dict(sorted(found.items()))


def file_digest(path: Path, like: str) -> str:
    """The hash of a file, of the kind that ``like`` is.

    Raises:
        CheckpointError: no weight file where there should be one.
    """
    return hash_file(path, like)[0]


def hash_file(path: Path, like: str) -> tuple[str, dict[str, str]]:
    """The hash of a file, of the kind that ``like`` is, and where it is a weight file's, the hash of each tensor.

    Raises:
        CheckpointError: no weight file where there should be one.
    """
    prefix = next((prefix for prefix in _KINDS if like.startswith(prefix)), None)
    if prefix is None:
        return sha256_file(path), {}
    header, infos = _layout(path)
    with path.open("rb") as stream:
        hashes = {info.name: _hash(stream, info, _KINDS[prefix]) for info in infos}
    return _digest(header, [*hashes.values()], prefix), hashes


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
    """The bytes of a weight file's header, and its tensors in file order.

    Raises:
        CheckpointError: no weight file, or one with bytes that belong to no tensor, which no hash would cover.
    """
    header, start = read_header(path)
    size = path.stat().st_size
    infos = tensor_infos(header, start, size, path, path.name)
    if start + sum(info.nbytes for info in infos) != size:
        raise CheckpointError("holds bytes that belong to no tensor", where=path, mend="restore the file")
    with path.open("rb") as stream:
        return stream.read(start), infos


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
        f"| {markdown(public_name(one['model'], one['revision']))} | {_coefficient(one['coefficient'])} | "
        f"{one['statistics']['examples'] if one['statistics'] else '–'} |"
        for one in people
    )
    rules = {name: step.rule for step in plan.steps for name in step.unit.names}
    used = Counter(
        (r.method, (r.reason or rules.get(name)) if r.method != "kept separate" else None)
        for name, r in records.items()
    )
    treatment = "\n".join(
        f"| {method} | {count} | {markdown(reason or '')} |"
        for (method, reason), count in sorted(used.items(), key=str)
    )
    options = ", ".join(f"{key} {markdown(value)}" for key, value in plan.recipe.options.items()) or "no options"
    chosen = "" if plan.choice is None else f" `auto` chose it, because {markdown(plan.choice)}."
    said = "\n## Notes\n\n" + "".join(f"- {markdown(note)}\n" for note in notes) if notes else ""
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# Merge of {len(people)} models by {plan.method.name}{title}

{made.format(f"{plan.method.summary} ({options})")}{chosen}

| contributor | coefficient | examples in its statistics |
|---|---|---|
{rows}

| treatment | tensors | why |
|---|---|---|
{treatment}

{plan.method.name} reached {plan.coverage}.
{sections}{said}
The licences of the contributors apply to the result.
"""


def _coefficient(value: float | Sequence[float]) -> str:
    """For people; several are those over the depth of the model."""
    return ", ".join(f"{one:g}" for one in value) if isinstance(value, Sequence) else f"{value:g}"


def public_name(model: str, revision: str | None) -> str:
    """A Hub name as it is; of a local folder only its last part, which says nothing about the machine."""
    if revision and "+" in revision:  # an adapter on its base, one of them on the Hub
        name, _, commit = revision.rsplit("+", 1)[1].partition("@")
        return public_name(name, commit or None)
    return model.rsplit("@", 1)[0] if revision else model.rstrip("/").rsplit("/", 1)[-1]
