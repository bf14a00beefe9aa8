"""Which file each tensor of the result goes to, and the small files around the weights.

With heads kept separate, the shared tensors are one set of shards, each contributor's own tensors lie in
``heads/<name>/head.safetensors``, and an index in each folder joins the two: ``from_pretrained`` opens the root (with
the first contributor's head) and ``heads/<name>`` alike, and nothing is stored twice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.reader import read_json
from merganser.checkpoints.writer import TensorSpec, index_json, shard
from merganser.errors import CheckpointError
from merganser.merging.plan import Plan, max_shard_bytes

HEADS = "heads"


@dataclass(frozen=True)
class Layout:
    """Where the tensors go.

    Attributes:
        files: the tensors of each file, as named inside it.
        places: file and name inside it of each merged tensor.
        head_folders: for each contributor, the folder of its head (``heads/<name>``), used if it keeps any tensor.
    """

    files: dict[str, list[TensorSpec]]
    places: dict[str, tuple[str, str]]
    head_folders: tuple[str, ...]


def make_layout(plan: Plan) -> Layout:
    """Derive the layout from the plan."""
    tensors = plan.parents[0].checkpoint.tensors
    root, nested = [], []
    for spec in plan.outputs:
        file = tensors[spec.name].file
        folder = str(Path(file).parent)
        inside = spec.name.removeprefix(f"{folder}/")
        if spec.name.startswith(f"{folder}/"):
            nested.append((file, TensorSpec(inside, spec.dtype, spec.shape), spec.name))
        else:
            root.append(spec)
    files = shard(root, "model", max_shard_bytes(plan.recipe)) if root else {}
    keeps = any(plan.separate)
    if keeps and len(files) == 1:  # a lone model.safetensors would be taken for the whole model
        files = {"model-00001-of-00001.safetensors": root}
    places = {spec.name: (file, spec.name) for file, specs in files.items() for spec in specs}
    for file, spec, name in nested:
        files.setdefault(file, []).append(spec)
        places[name] = (file, spec.name)
    folders = _head_folders(plan)
    for parent, names, folder in zip(plan.parents, plan.separate, folders, strict=True):
        if names:
            infos = [parent.checkpoint.tensors[name] for name in names]
            files[f"{folder}/head.safetensors"] = [TensorSpec(i.name, i.dtype, i.shape) for i in infos]
    return Layout(files, places, folders)


def write_small_files(plan: Plan, layout: Layout, folder: Path) -> None:
    """Everything but weights, card and provenance: configuration, tokenizer, indices, heads.

    Files are copied byte for byte from the first contributor; ``config.json`` changes only where the merge changed
    what it says (labels, vocabulary size, storage dtype).
    """
    source = plan.parents[plan.vocabulary_from].checkpoint
    for file in source.side_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / file, folder / file)
    changes = _config_changes(plan)
    _write_config(plan.parents[0].checkpoint, folder, changes)
    _write_indices(plan, layout, folder)
    for parent, names, head in zip(plan.parents, plan.separate, layout.head_folders, strict=True):
        if names:
            config_file = parent.checkpoint.path / "config.json"
            if not config_file.is_file():
                raise CheckpointError("has no config.json", where=parent.checkpoint.name, mend="restore it")
            shutil.copyfile(config_file, folder / head / "config.json")
            _write_config(parent.checkpoint, folder / head)


def _write_config(checkpoint: Checkpoint, folder: Path, changes: Mapping[str, Any] | None = None) -> None:
    """``config.json`` anew where the merge changes what it says, or an adapter what its base says."""
    config = {**checkpoint.config, **(changes or {})}
    if changes or config != read_json(checkpoint.path / "config.json", missing={}):
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _write_indices(plan: Plan, layout: Layout, folder: Path) -> None:
    shared = {name: file for name, (file, _) in layout.places.items() if "/" not in file}
    sizes = {spec.name: spec.nbytes for spec in plan.outputs}
    size = sum(sizes[name] for name in shared)
    if not any(plan.separate):
        if len(set(shared.values())) > 1:
            (folder / "model.safetensors.index.json").write_bytes(index_json(shared, size))
        return
    first = True
    for parent, names, head in zip(plan.parents, plan.separate, layout.head_folders, strict=True):
        if not names:
            continue
        (folder / head).mkdir(parents=True, exist_ok=True)
        total = size + sum(parent.checkpoint.tensors[name].nbytes for name in names)
        outward = {name: f"../../{file}" for name, file in shared.items()}
        inward = dict.fromkeys(names, "head.safetensors")
        (folder / head / "model.safetensors.index.json").write_bytes(index_json({**outward, **inward}, total))
        if first and parent is plan.parents[0]:
            inner = dict.fromkeys(names, f"{head}/head.safetensors")
            (folder / "model.safetensors.index.json").write_bytes(index_json({**shared, **inner}, total))
            first = False
    if first:  # the first contributor keeps nothing of its own: the shared tensors are its whole model
        (folder / "model.safetensors.index.json").write_bytes(index_json(shared, size))


def _config_changes(plan: Plan) -> dict[str, Any]:
    first = plan.parents[0].checkpoint.config
    changes: dict[str, Any] = {}
    if plan.labels is not None and list(plan.labels.labels) != plan.parents[0].label_names:
        changes["id2label"] = {str(i): label for i, label in enumerate(plan.labels.labels)}
        changes["label2id"] = {label: i for i, label in enumerate(plan.labels.labels)}
    if plan.recipe.vocabulary == "largest":
        sizes = [parent.checkpoint.config.get("vocab_size") for parent in plan.parents]
        largest = max((size for size in sizes if isinstance(size, int)), default=None)
        if largest is not None and largest != first.get("vocab_size"):
            changes["vocab_size"] = largest
    if plan.recipe.dtype is not None:
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        for key in ("dtype", "torch_dtype"):
            if key in first and first[key] != names[plan.recipe.dtype]:
                changes[key] = names[plan.recipe.dtype]
    return changes


def _head_folders(plan: Plan) -> tuple[str, ...]:
    folders: list[str] = []
    for parent in plan.parents:
        stem = re.sub(r"[^\w.-]+", "-", parent.title).strip(".-") or "head"
        name, number = stem, 2
        while f"{HEADS}/{name}" in folders:
            name, number = f"{stem}-{number}", number + 1
        folders.append(f"{HEADS}/{name}")
    return tuple(folders)
