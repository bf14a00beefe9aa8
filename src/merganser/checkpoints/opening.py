"""From what a user types (a folder, ``org/name@revision`` on the Hub, ``base+adapter``) to an open checkpoint.

Of a folder: one file or shards, pickles where they are allowed, nested modules, an adapter. Of the Hub: small files and
headers first, weights only when a plan holds, by the Hub client's own conventions (its cache, its tokens,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints import adapters
from merganser.checkpoints.adapter_files import combine
from merganser.checkpoints.adapter_settings import read_settings
from merganser.checkpoints.header import TensorInfo, read_infos, tensor_infos
from merganser.checkpoints.json_files import read_json
from merganser.checkpoints.modules import MODULES, Module, has_weights, main_folder, read_modules
from merganser.checkpoints.quantisation import QuantisedWeights
from merganser.checkpoints.quantised import as_numbers
from merganser.checkpoints.reader import Checkpoint
from merganser.errors import CheckpointError, ErrorCollector, raise_all
from merganser.files import lasting_scratch

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_WEIGHTS = ["*.safetensors"]
_HUB_PICKLES = "pytorch_model*.bin"
_UNWANTED = [
    "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.pkl", "onnx/*", "openvino/*",
    "checkpoint-*/*",
]  # fmt: skip
_STATISTICS = "merge_statistics.safetensors"  # small beside the weights, and needed to plan


def open_checkpoint(
    reference: str | Path,
    *,
    allow_pickle: bool = False,
    known: dict[str, Checkpoint] | None = None,
    codes: bool = False,
) -> Checkpoint:
    """Open a model folder, a Hub reference, or a LoRA adapter on its base, reading headers only.

    Args:
        reference: a local folder, or ``org/name`` or ``org/name@revision``; of an adapter alone, whose configuration
            names its base, or written ``base+adapter``.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only=True``) where there is no safetensors.
        known: checkpoints that are open already, by reference; adapters of one base then share it. Added to.
        codes: accept a model whose quantised weights cannot be read as numbers, as a
            :class:`~merganser.checkpoints.CodedCheckpoint`. Such as can be read (FP8, MXFP4) always are.

    Raises:
        UserError: nothing there, truncated or malformed files, missing shards, pickled weights, quantised weights that
            cannot be read as numbers, an adapter that does not fit its base (all of its problems at once).
    """
    name = str(reference)
    known = {} if known is None else known
    pair = None if Path(name).expanduser().is_dir() else _pair(name)
    files = _open_files(name if pair is None else pair[1], allow_pickle)
    if not is_adapter(files):
        if pair is not None:
            raise CheckpointError(
                "base+adapter: what follows the + is no PEFT adapter",
                where=files.name,
                mend=f"give a folder or repository with {adapters.CONFIG} and {adapters.WEIGHTS}",
            )
        return as_numbers(files, codes=codes)
    place = _base_of(files) if pair is None else pair[0]
    if place not in known:
        known[place] = _open_base(place, files, allow_pickle)
    return combine(name, known[place], files)


def is_adapter(files: Checkpoint) -> bool:
    """Whether these are the files of a PEFT adapter and not of a model."""
    named = any(Path(file).name == adapters.WEIGHTS for file in {info.file for info in files.tensors.values()})
    return named or (not files.tensors and (files.path / adapters.CONFIG).is_file())


def _pair(name: str) -> tuple[str, str] | None:
    """Base and adapter of ``base+adapter``; where folders have a + in their names, the split whose parts exist."""
    splits = [(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "+"]
    splits = [(base, adapter) for base, adapter in splits if base and adapter]
    real = [pair for pair in splits if all(Path(part).expanduser().is_dir() for part in pair)]
    return next(iter(real or splits), None)


def _base_of(files: Checkpoint) -> str:
    """The base that an adapter's configuration names: a folder from here or beside the adapter, or a Hub reference."""
    where = files.path / adapters.CONFIG
    settings = read_json(where, missing={})
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not where.is_file() or not isinstance(name, str) or not name:
        read_settings(files)  # says so where the configuration is missing or not of LoRA
        raise CheckpointError(
            "the adapter's configuration names no base (base_model_name_or_path)",
            where=where,
            mend="write base+adapter, such as org/base+" + files.name,
        )
    if Path(name).expanduser().is_absolute() or Path(name).is_dir():
        return name
    beside = next((str(p / name) for p in files.path.resolve().parents if (p / name).is_dir()), None)
    return beside or (f"{name}@{revision}" if isinstance(revision, str) and revision else name)


def _open_base(place: str, adapter: Checkpoint, allow_pickle: bool) -> Checkpoint:
    try:
        base = _open_files(place, allow_pickle)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of this adapter, {place}: {error.what}",
            where=adapter.name,
            mend=f"write base+adapter, such as org/base+{adapter.name}",
        ) from None
    if is_adapter(base):
        raise CheckpointError(
            f"the base of this adapter, {place}, is itself an adapter",
            where=adapter.name,
            mend="merge the first one into its base with peft, and give that as the base",
        )
    try:
        return as_numbers(base)
    except QuantisedWeights as error:
        raise QuantisedWeights(  # the same words for every adapter of this base
            f"the base of an adapter: {error.what}",
            where=place,
            mend="give the base in full precision, the model that was quantised: write base+adapter",
        ) from None


def _open_files(name: str, allow_pickle: bool) -> Checkpoint:
    """The files of a folder or Hub reference as they are, be it a model or an adapter."""
    path = Path(name).expanduser()
    if path.is_dir():
        return Checkpoint(name, path, local_tensors(path, allow_pickle=allow_pickle))
    if path.exists():
        raise CheckpointError("a model is a folder, this is a file", where=name, mend=f"give its folder, {path.parent}")
    match = _HUB.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")):
        raise CheckpointError("no such folder", where=name, mend="give a model folder, or org/name@revision on the Hub")
    return open_hub(name, match["repo"], match["revision"], allow_pickle=allow_pickle)


class PickledWeights(CheckpointError):
    """Weights that are there as pickles alone, and may not be read."""


def local_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of a model folder: the model's own, then those of a sentence-transformers model's other modules.

    The names of the latter begin with their folder, as in ``2_Dense/linear.weight``.

    Raises:
        CheckpointError: see :func:`open_checkpoint`.
    """
    main = main_folder(folder)
    errors = ErrorCollector()
    infos = errors.catch(_main_tensors, folder / main, allow_pickle) or []
    infos = [_moved(info, main) for info in infos]
    for module in dict.fromkeys(module for module in read_modules(folder) if module.path not in ("", main)):
        found = errors.catch(_module_tensors, folder, module, allow_pickle) or []
        infos += [replace(_moved(info, module.path), name=f"{module.path}/{info.name}") for info in found]
    errors.raise_all()
    return {info.name: info for info in infos}


def _moved(info: TensorInfo, place: str) -> TensorInfo:
    """A tensor of a sub-folder's file, as seen from the whole folder; what was converted lies elsewhere."""
    return replace(info, file=f"{place}/{info.file}") if place and not Path(info.file).is_absolute() else info


def _module_tensors(folder: Path, module: Module, allow_pickle: bool) -> list[TensorInfo]:
    """The tensors of one module, by their own names.

    Raises:
        CheckpointError: pickled weights that may not be read, damaged files, or no weights where there must be some.
    """
    if has_weights(folder / module.path):
        return _main_tensors(folder / module.path, allow_pickle)
    if module.weighted:
        what = f"the module {module.path} has no weights ({SINGLE})"
        raise CheckpointError(what, where=folder, mend="copy or download the folder again, whole")
    return []


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
    if any(module.path and has_weights(folder / module.path) for module in read_modules(folder)):
        return []
    if gguf := sorted(folder.glob("*.gguf")):
        raise QuantisedWeights(
            f"the weights are in GGUF ({gguf[0].name}), as a rule quantised",
            where=folder,
            mend="give the model in full precision, as safetensors, that was converted",
        )
    raise CheckpointError(
        f"no weights here: neither {SINGLE} nor {INDEX}", where=folder, mend="give a folder with safetensors weights"
    )


def _pickled_modules(folder: Path, files: list[str]) -> list[str]:
    """The pickles that a repository has for modules which it has no safetensors for."""
    prefixes = {f"{module.path}/" if module.path else "" for module in read_modules(folder)}
    lacking = [prefix for prefix in prefixes if not {prefix + SINGLE, prefix + INDEX} & set(files)]
    return [file for file in files if any(fnmatchcase(file, prefix + _HUB_PICKLES) for prefix in lacking)]


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

    place = lasting_scratch()
    infos: list[TensorInfo] = []
    for number, file in enumerate(files):
        try:
            state = torch.load(folder / file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"cannot be read as plain tensors: {error}", where=folder / file, mend="convert it to safetensors"
            ) from None
        target = place / str(number) / target_name
        target.parent.mkdir()
        save_file({name: t.contiguous().clone() for name, t in state.items() if torch.is_tensor(t)}, target)
        infos += read_infos(target, str(target))
    return infos


def open_hub(name: str, repo: str, revision: str | None, *, allow_pickle: bool = False) -> Checkpoint:
    """Open ``repo`` at ``revision``: its configuration and headers now, its weights on ``fetch()``.

    Weights that are published as pickles alone have no header, and are downloaded at once where they are allowed.

    Raises:
        CheckpointError: the repository is not there, or not cached while offline.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError

    def snapshot(revision: str | None, **options: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **options))

    try:
        if constants.HF_HUB_OFFLINE:
            folder = snapshot(revision, local_files_only=True, ignore_patterns=_UNWANTED)
            tensors = local_tensors(folder, allow_pickle=allow_pickle)
            return Checkpoint(name, folder, tensors, revision=folder.name)
        # By the name that was given, so that the cache remembers what it stands for; from then on by its commit.
        folder = snapshot(revision, ignore_patterns=_HUB_WEIGHTS + _UNWANTED)
        commit = folder.name
        if (folder / MODULES).is_file():  # modules hold weights that no index lists, and some of them pickles
            files = huggingface_hub.list_repo_files(repo, revision=commit)
            pickles = _pickled_modules(folder, files)
            if pickles and not allow_pickle:
                raise pickled(f"{name}, {pickles[0].rpartition('/')[0]}", "pytorch_model")
            snapshot(commit, ignore_patterns=_UNWANTED)
            folder = snapshot(commit, allow_patterns=pickles) if pickles else folder
            return Checkpoint(name, folder, local_tensors(folder, allow_pickle=allow_pickle), revision=commit)
        try:
            headers = huggingface_hub.get_safetensors_metadata(repo, revision=commit).files_metadata
        except NotASafetensorsRepoError:
            if any(Path(f).match(_HUB_PICKLES) for f in huggingface_hub.list_repo_files(repo, revision=commit)):
                if not allow_pickle:
                    raise pickled(name, "pytorch_model") from None
                folder = snapshot(commit, ignore_patterns=[p for p in _UNWANTED if p != "*.bin"])
                return Checkpoint(name, folder, local_tensors(folder, allow_pickle=True), revision=commit)
            if not (folder / adapters.CONFIG).is_file():
                raise
            file = adapters.WEIGHTS
            headers = {file: huggingface_hub.parse_safetensors_file_metadata(repo, file, revision=commit)}
        with suppress(EntryNotFoundError):
            huggingface_hub.hf_hub_download(repo, _STATISTICS, revision=commit)
    except CheckpointError:
        raise
    except Exception as error:  # the client raises many kinds; all mean that the reference cannot be had
        raise CheckpointError(
            f"cannot be had from the Hub: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=name,
            mend=f"check the name and the network, or download it where there is one (hf download {repo}) "
            "and give the folder",
        ) from None
    tensors = {}
    for file, parsed in headers.items():
        header = {
            key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for key, t in parsed.tensors.items()
        }
        infos = tensor_infos(header, 0, 1 << 62, Path(name) / file, file)
        tensors.update({info.name: info for info in infos})
    checkpoint = Checkpoint(name, folder, tensors, revision=commit)

    def fetch() -> None:
        place = snapshot(commit, allow_patterns=_HUB_WEIGHTS, ignore_patterns=_UNWANTED)
        checkpoint.path, checkpoint.tensors = place, local_tensors(place)

    checkpoint._fetch = fetch
    return checkpoint
