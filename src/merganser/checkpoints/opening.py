"""From what a user types (a folder, ``org/name@revision`` on the Hub, ``base+adapter``) to an open checkpoint.

Of a folder: one file or shards, pickles where they are allowed, nested modules, an adapter. Of the Hub: small files and
headers first, weights only when a plan holds, by the Hub client's own conventions (its cache, its tokens,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merganser.checkpoints import adapters, side_files
from merganser.checkpoints.adapter_files import combine
from merganser.checkpoints.adapter_settings import read_settings
from merganser.checkpoints.header import TensorInfo, read_infos, tensor_infos
from merganser.checkpoints.json_files import read_json
from merganser.checkpoints.modules import MODULES, Module, has_weights, main_folder, read_modules
from merganser.checkpoints.pickles import converted, pickled
from merganser.checkpoints.quantisation import QuantisedWeights
from merganser.checkpoints.quantised import as_numbers
from merganser.checkpoints.reader import Checkpoint
from merganser.errors import CheckpointError, ErrorCollector
from merganser.files import remove_leftovers
from merganser.paths import expanded, inside, leads_anywhere, path_text, real

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_WEIGHTS = ["*.safetensors"]
_HUB_PICKLES = "pytorch_model*.bin"
_UNWANTED = [
    "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.pkl", "onnx/*", "openvino/*",
    "checkpoint-*/*",
]  # fmt: skip
_GIVE = "give a model folder, or org/name@revision on the Hub"
_STATISTICS = "merge_statistics.safetensors"  # small beside the weights, and needed to plan


def open_checkpoint(
    reference: str | Path,
    *,
    allow_pickle: bool = False,
    known: dict[str, Checkpoint] | None = None,
    codes: bool = False,
    base: str | None = None,
) -> Checkpoint:
    """Open a model folder, a Hub reference, or a LoRA adapter on its base, reading headers only.

    Args:
        reference: a local folder, or ``org/name`` or ``org/name@revision``; of an adapter alone, whose configuration
            names its base, or written ``base+adapter``.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only=True``) where there is no safetensors.
        known: checkpoints that are open already, by reference; adapters of one base then share it. Added to.
        codes: accept a model whose quantised weights cannot be read as numbers, as a
            :class:`~merganser.checkpoints.CodedCheckpoint`. Such as can be read (FP8, MXFP4) always are.
        base: the model that the user names as the base of a merge: an adapter may name the same folder as its own.

    Raises:
        UserError: nothing there, truncated or malformed files, missing shards, pickled weights, quantised weights that
            cannot be read as numbers, an adapter that does not fit its base (all of its problems at once).
    """
    name = model_reference(reference)
    known = {} if known is None else known
    pair = None if expanded(name).is_dir() else pair_of(name)
    files = open_files(name if pair is None else pair[1], allow_pickle)
    if not is_adapter(files):
        if pair is not None:
            raise CheckpointError(
                "base+adapter: what follows the + is no PEFT adapter",
                where=files.name,
                mend=f"give a folder or repository with {adapters.CONFIG} and {adapters.WEIGHTS}",
            )
        return as_numbers(files, codes=codes)
    place = _base_of(files, base) if pair is None else pair[0]
    if place not in known:
        known[place] = _open_base(place, files, allow_pickle)
    return combine(name, known[place], files)


def model_reference(given: object) -> str:
    """What a caller named as a model, as text.

    Raises:
        CheckpointError: it is no text and no path, such as a model in memory; or no folder can have this name.
    """
    mend = f"{_GIVE}; save_pretrained writes the folder of a model that is in memory"
    return path_text(given, CheckpointError, what="a model", mend=mend)


def is_adapter(files: Checkpoint) -> bool:
    """Whether these are the files of a PEFT adapter and not of a model."""
    named = any(Path(file).name == adapters.WEIGHTS for file in {info.file for info in files.tensors.values()})
    return named or (not files.tensors and (files.path / adapters.CONFIG).is_file())


def pair_of(name: str) -> tuple[str, str] | None:
    """Base and adapter of ``base+adapter``; where folders have a + in their names, the split whose parts exist."""
    splits = [(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "+"]
    splits = [(base, adapter) for base, adapter in splits if base and adapter]
    real = [pair for pair in splits if all(expanded(part).is_dir() for part in pair)]
    return next(iter(real or splits), None)


def _base_of(files: Checkpoint, given: str | None) -> str:
    """The base that an adapter's configuration names: a folder from here or beside the adapter, or a Hub reference.

    A path that can lead anywhere needs the user's word: what a stranger's adapter names would become a part of the
    result.

    Args:
        files: of the adapter.
        given: the base that the user names.

    Raises:
        CheckpointError: no base is named, or one by a path that leads anywhere and that the user has not named.
    """
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
    beside = _beside(files.path, name)
    if beside is not None:
        return beside
    if leads_anywhere(name) and expanded(name).is_dir():
        if given is not None and expanded(given).is_dir() and _same_place(given, name):
            return given
        raise CheckpointError(
            f"the adapter names its base by a path of this machine, {name}",
            where=where,
            mend=f"if that is the model to take, say so: {shlex.quote(f'{name}+{files.name}')} instead of "
            f"{shlex.quote(files.name)} (or, in a merge, --base {shlex.quote(name)}, or --without-base to merge "
            "adapters with one another)",
        )
    return f"{name}@{revision}" if isinstance(revision, str) and revision else name


def _beside(adapter: Path, name: str) -> str | None:
    """The folder of a relative name, from here, beside an adapter, or from a folder between the two; None: it is none.

    Raises:
        CheckpointError: it is a link beside the adapter that leads elsewhere.
    """
    if leads_anywhere(name):
        return None
    if Path(name).is_dir():
        return name
    here, found = real(Path.cwd()), real(adapter)
    for number, place in enumerate(found.parents):
        if number and not place.is_relative_to(here):
            return None
        if (place / name).is_dir():
            return str(place / inside(place, name, CheckpointError, where=adapter / adapters.CONFIG, what="the base"))
    return None


def _same_place(one: str, other: str) -> bool:
    return real(expanded(one)) == real(expanded(other))


def names_missing_base(files: Checkpoint, tried: dict[str, bool], *, allow_pickle: bool = False) -> bool:
    """Whether an adapter names no base that is to be had: none at all, no folder here, nothing on the Hub.

    A folder by a path that can lead anywhere is there: to take it is for the user to say.

    Args:
        files: of the adapter.
        tried: what was found of names before, since the Hub may take its time to answer. Added to.
        allow_pickle: a base may be pickled.
    """
    settings = read_json(files.path / adapters.CONFIG, missing={})
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        return True
    if _beside(files.path, name) is not None or (leads_anywhere(name) and expanded(name).is_dir()):
        return False
    reference = f"{name}@{revision}" if isinstance(revision, str) and revision else name
    if reference not in tried:
        try:
            open_files(reference, allow_pickle)
            tried[reference] = False
        except CheckpointError:
            tried[reference] = True
    return tried[reference]


def _open_base(place: str, adapter: Checkpoint, allow_pickle: bool) -> Checkpoint:
    try:
        base = open_files(place, allow_pickle)
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


def open_files(name: str, allow_pickle: bool) -> Checkpoint:
    """The files of a folder or Hub reference as they are, be it a model or an adapter."""
    path = expanded(model_reference(name))
    if not path.exists():
        remove_leftovers(path)  # which puts a folder back that a killed command had moved away
    if path.is_dir():
        side_files.check_links(path)
        return Checkpoint(name, path, local_tensors(path, allow_pickle=allow_pickle))
    if path.exists():
        raise CheckpointError("a model is a folder, this is a file", where=name, mend=f"give its folder, {path.parent}")
    match = _HUB.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")):
        raise CheckpointError("no such folder", where=name, mend=_GIVE)
    return open_hub(name, match["repo"], match["revision"], allow_pickle=allow_pickle)


def local_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of a model folder: the model's own, then those of a sentence-transformers model's other modules.

    The names of the latter begin with their folder, as in ``2_Dense/linear.weight``.

    Raises:
        CheckpointError: see :func:`open_checkpoint`.
    """
    main, files = main_folder(folder), _WeightFiles(_root_of(folder), allow_pickle)
    errors = ErrorCollector()
    infos = errors.catch(files.read, folder / main) or []
    infos = [_moved(info, main) for info in infos]
    for module in dict.fromkeys(module for module in read_modules(folder) if module.path not in ("", main)):
        found = errors.catch(files.read_module, folder, module) or []
        infos += [replace(_moved(info, module.path), name=f"{module.path}/{info.name}") for info in found]
    errors.raise_all()
    return {info.name: info for info in infos}


def _root_of(folder: Path) -> Path:
    """The folder that a model's files lie in: of one head of a merge, the folder of the whole merge."""
    outer = Path(os.path.abspath(folder)).parents  # noqa: PTH100 (links stay as they are)
    is_head = len(outer) > 1 and outer[0].name == "heads" and (outer[1] / "config.json").is_file()
    return outer[1] if is_head else folder


def _moved(info: TensorInfo, place: str) -> TensorInfo:
    """A tensor of a sub-folder's file, as seen from the whole folder; what was converted lies elsewhere."""
    return replace(info, file=f"{place}/{info.file}") if place and not Path(info.file).is_absolute() else info


@dataclass(frozen=True)
class _WeightFiles:
    """The weights in the folders of a model.

    Attributes:
        root: the folder that every file has to lie in.
        allow_pickle: read pickles where there is nothing else.
    """

    root: Path
    allow_pickle: bool

    def read(self, folder: Path) -> list[TensorInfo]:
        """The tensors of a folder, by their own names, with their files relative to it.

        Raises:
            CheckpointError: see :func:`open_checkpoint`.
        """
        if (folder / SINGLE).is_file():  # where both are there, transformers takes the single file
            return self._infos(folder, SINGLE)
        if (folder / INDEX).is_file():
            return self._sharded(folder)
        if any((folder / pickle).is_file() for pickle in _PICKLES):
            if not self.allow_pickle:
                raise pickled(folder, "pytorch_model")
            files = [*_PICKLES[:1]]
            if (folder / _PICKLES[1]).is_file():
                files = sorted(set(self._weight_map(folder, _PICKLES[1]).values()))
            return converted(folder, [self._inside(folder, file) for file in files], SINGLE)
        if (folder / adapters.WEIGHTS).is_file():
            return self._infos(folder, adapters.WEIGHTS)
        if (folder / adapters.PICKLED).is_file():
            if not self.allow_pickle:
                raise pickled(folder, Path(adapters.PICKLED).stem)
            return converted(folder, [self._inside(folder, adapters.PICKLED)], adapters.WEIGHTS)
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
            f"no weights here: neither {SINGLE} nor {INDEX}",
            where=folder,
            mend="give a folder with safetensors weights",
        )

    def read_module(self, folder: Path, module: Module) -> list[TensorInfo]:
        """The tensors of one module, by their own names.

        Raises:
            CheckpointError: pickled weights that may not be read, damaged files, or no weights where there must be
                some.
        """
        if has_weights(folder / module.path):
            return self.read(folder / module.path)
        if module.weighted:
            what = f"the module {module.path} has no weights ({SINGLE})"
            raise CheckpointError(what, where=folder, mend="copy or download the folder again, whole")
        return []

    def _inside(self, folder: Path, file: str, where: Path | None = None) -> str:
        mend = "put the file into the folder, and its name into the index"
        return inside(folder, file, CheckpointError, root=self.root, where=where, what="the weight file", mend=mend)

    def _infos(self, folder: Path, file: str) -> list[TensorInfo]:
        return read_infos(folder / self._inside(folder, file), file)

    def _weight_map(self, folder: Path, index: str) -> dict[str, str]:
        """Which file has which tensor, as an index says."""
        found = (read_json(folder / index) or {}).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise CheckpointError("no weight_map in the index", where=folder / index, mend="restore the file")
        return found

    def _sharded(self, folder: Path) -> list[TensorInfo]:
        weight_map, where = self._weight_map(folder, INDEX), folder / INDEX
        found: dict[str, TensorInfo] = {}
        errors = ErrorCollector()
        for shard in sorted(set(weight_map.values())):
            file = errors.catch(self._inside, folder, shard, where)
            if file is not None and not (folder / file).is_file():
                errors.add(CheckpointError(f"shard {shard} is missing", where=where, mend="copy or download the shard"))
            elif file is not None:
                infos = errors.catch(read_infos, folder / file, file) or []
                found.update({info.name: info for info in infos if info.name in weight_map})
        errors.raise_all()
        absent = [name for name in weight_map if name not in found]
        if absent:
            raise CheckpointError(
                f"the index lists tensors that no shard holds: {', '.join(absent[:5])}",
                where=where,
                mend="restore the shards or the index",
            )
        return list(found.values())


def _pickled_modules(folder: Path, files: list[str]) -> list[str]:
    """The pickles that a repository has for modules which it has no safetensors for."""
    prefixes = {f"{module.path}/" if module.path else "" for module in read_modules(folder)}
    lacking = [prefix for prefix in prefixes if not {prefix + SINGLE, prefix + INDEX} & set(files)]
    return [file for file in files if any(fnmatchcase(file, prefix + _HUB_PICKLES) for prefix in lacking)]


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
        infos = tensor_infos(header, 0, None, Path(name) / file, file)
        tensors.update({info.name: info for info in infos})
    checkpoint = Checkpoint(name, folder, tensors, revision=commit)

    def fetch() -> None:
        place = snapshot(commit, allow_patterns=_HUB_WEIGHTS, ignore_patterns=_UNWANTED)
        checkpoint.path, checkpoint.tensors = place, local_tensors(place)

    checkpoint._fetch = fetch
    return checkpoint
