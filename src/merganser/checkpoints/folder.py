"""The tensors of a model folder: one file or shards, pickles where they are allowed, nested modules, an adapter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from merganser.checkpoints import adapters
from merganser.checkpoints.header import TensorInfo, read_infos
from merganser.checkpoints.reader import read_json
from merganser.errors import CheckpointError, raise_all

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_CONVERTED: list[tempfile.TemporaryDirectory[str]] = []  # alive until the process ends


class PickledWeights(CheckpointError):
    """Weights that are there as pickles alone, and may not be read."""


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
            raise pickled(folder, "pytorch_model")
        index = read_json(folder / "pytorch_model.bin.index.json")
        return _from_pickle(folder, sorted(set(index["weight_map"].values())) if index else ["pytorch_model.bin"])
    if (folder / adapters.WEIGHTS).is_file():
        return read_infos(folder / adapters.WEIGHTS, adapters.WEIGHTS)
    if (folder / adapters.PICKLED).is_file():
        if not allow_pickle:
            raise pickled(folder, Path(adapters.PICKLED).stem)
        return _from_pickle(folder, [adapters.PICKLED], adapters.WEIGHTS)
    if (folder / adapters.CONFIG).is_file():
        raise CheckpointError(
            f"an adapter's configuration without its weights ({adapters.WEIGHTS})",
            where=folder,
            mend="restore the file",
        )
    nested = nested_modules(folder)
    if nested:
        return []
    raise CheckpointError(
        f"no weights here: neither {SINGLE} nor {INDEX}", where=folder, mend="give a folder with safetensors weights"
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
                CheckpointError(f"shard {shard} is missing", where=folder / INDEX, mend="copy or download the shard")
            )
            continue
        found.update({info.name: info for info in read_infos(folder / shard, shard) if info.name in weight_map})
    raise_all(problems)
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise CheckpointError(
            f"the index lists tensors that no shard holds: {', '.join(absent[:5])}",
            where=folder / INDEX,
            mend="restore the shards or the index",
        )
    return list(found.values())


def pickled(place: str | Path, stem: str) -> CheckpointError:
    """The error for weights that are there as pickles alone, with a command that converts them.

    Args:
        place: the folder, or a name on the Hub.
        stem: ``pytorch_model`` or ``adapter_model``: what their files' names begin with.
    """
    target = "model" if stem == "pytorch_model" else stem
    convert = (
        "import glob, torch; from safetensors.torch import save_file; save_file({n: t.contiguous().clone() "
        f"for f in glob.glob('{stem}*.bin') for n, t in torch.load(f, map_location='cpu', "
        "weights_only=True).items() if torch.is_tensor(t)}, "
        f"'{target}.safetensors', {{'format': 'pt'}})"
    )
    return PickledWeights(
        f"the weights are pickled ({stem}.bin), and a pickle from a stranger can run code",
        where=place,
        mend="add --allow-pickle (from Python: allow_pickle=True; read with weights_only=True), or write them as "
        f'safetensors, in a copy of the folder: python -c "{convert}"',
    )


def _from_pickle(folder: Path, files: list[str], target_name: str = SINGLE) -> list[TensorInfo]:
    from safetensors.torch import save_file

    place = tempfile.TemporaryDirectory(prefix="merganser-")
    _CONVERTED.append(place)
    infos: list[TensorInfo] = []
    for number, file in enumerate(files):
        try:
            state = torch.load(folder / file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"cannot be read as plain tensors: {error}", where=folder / file, mend="convert it to safetensors"
            ) from None
        target = Path(place.name) / str(number) / target_name
        target.parent.mkdir()
        save_file({name: t.contiguous().clone() for name, t in state.items() if torch.is_tensor(t)}, target)
        infos += read_infos(target, str(target))
    return infos
