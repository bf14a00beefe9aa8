"""From what a user types (a folder, or ``org/name@revision`` on the Hub) to an open checkpoint."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch

from merganser.checkpoints.header import TensorInfo, read_infos
from merganser.checkpoints.reader import Checkpoint, read_json
from merganser.errors import CheckpointError, raise_all

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def open_checkpoint(reference: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model folder, or a Hub reference, reading headers only.

    Args:
        reference: a local folder, or ``org/name`` or ``org/name@revision``.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only=True``) where there is no safetensors.

    Raises:
        CheckpointError: nothing there, truncated or malformed files, missing shards, pickled weights.
    """
    name = str(reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        return Checkpoint(name, path, local_tensors(path, allow_pickle=allow_pickle))
    if path.exists():
        raise CheckpointError(
            "a model is a folder, this is a file", where=name, mend=f"give its folder, {path.parent}"
        )
    match = _HUB.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")):
        raise CheckpointError(
            "no such folder", where=name, mend="give a model folder, or org/name@revision on the Hub"
        )
    from merganser.checkpoints.hub import open_hub

    return open_hub(name, match["repo"], match["revision"])


def local_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of a model folder: the model's own, then those of nested sentence-transformers modules.

    Raises:
        CheckpointError: see :func:`open_checkpoint`.
    """
    infos = _main_tensors(folder, allow_pickle)
    for nested in nested_modules(folder):
        infos += [
            TensorInfo(f"{nested}/{info.name}", info.dtype, info.shape, info.file, info.offset, info.nbytes)
            for info in read_infos(folder / nested / SINGLE, f"{nested}/{SINGLE}")
        ]
    return {info.name: info for info in infos}


def nested_modules(folder: Path) -> list[str]:
    """Sub-folders of a sentence-transformers model that hold weights of their own (such as ``2_Dense``)."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return []
    try:
        import json

        paths = [str(module.get("path", "")) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"unreadable JSON: {error}", where=modules, mend="restore the file") from None
    inside = [p for p in paths if p and ".." not in Path(p).parts and not Path(p).is_absolute()]
    return [p for p in inside if (folder / p / SINGLE).is_file()]


def _main_tensors(folder: Path, allow_pickle: bool) -> list[TensorInfo]:
    if (folder / SINGLE).is_file():  # where both are there, transformers takes the single file
        return read_infos(folder / SINGLE, SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if any((folder / pickle).is_file() for pickle in _PICKLES):
        if not allow_pickle:
            raise CheckpointError(
                "the weights are pickled (pytorch_model.bin), and a pickle from a stranger can run code",
                where=folder,
                mend="convert them to safetensors, or add --allow-pickle (read with weights_only=True)",
            )
        return _from_pickle(folder)
    if (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            "this is a PEFT adapter, not a full checkpoint",
            where=folder,
            mend="merge it into its base first (peft: model.merge_and_unload().save_pretrained(...))",
        )
    nested = nested_modules(folder)
    if nested:
        return []
    raise CheckpointError(
        f"no weights here: neither {SINGLE} nor {INDEX}",
        where=folder,
        mend="give a folder with safetensors weights",
    )


def _sharded(folder: Path) -> list[TensorInfo]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError("no weight_map in the index", where=folder / INDEX, mend="restore the file")
    found: dict[str, TensorInfo] = {}
    problems = []
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            problems.append(
                CheckpointError(
                    f"shard {shard} is missing", where=folder / INDEX, mend="copy or download the shard"
                )
            )
            continue
        found.update(
            {info.name: info for info in read_infos(folder / shard, shard) if info.name in weight_map}
        )
    raise_all(problems)
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise CheckpointError(
            f"the index lists tensors that no shard holds: {', '.join(absent[:5])}",
            where=folder / INDEX,
            mend="restore the shards or the index",
        )
    return list(found.values())


_CONVERTED: list[tempfile.TemporaryDirectory[str]] = []  # alive until the process ends


def _from_pickle(folder: Path) -> list[TensorInfo]:
    from safetensors.torch import save_file

    index = folder / "pytorch_model.bin.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["pytorch_model.bin"]
    place = tempfile.TemporaryDirectory(prefix="merganser-")
    _CONVERTED.append(place)
    infos: list[TensorInfo] = []
    for number, file in enumerate(files):
        try:
            state = torch.load(folder / file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"cannot be read as plain tensors: {error}",
                where=folder / file,
                mend="convert it to safetensors",
            ) from None
        target = Path(place.name) / f"{number}.safetensors"
        save_file({name: t.contiguous().clone() for name, t in state.items() if torch.is_tensor(t)}, target)
        infos += read_infos(target, str(target))
    return infos
