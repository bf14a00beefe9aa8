"""From what a user types (a folder, ``org/name@revision`` on the Hub, ``base+adapter``) to an open checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from merganser.checkpoints import adapters
from merganser.checkpoints.adapter_files import combine
from merganser.checkpoints.adapter_settings import read_settings
from merganser.checkpoints.folder import local_tensors
from merganser.checkpoints.hub import open_hub
from merganser.checkpoints.reader import Checkpoint, read_json
from merganser.errors import CheckpointError

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def open_checkpoint(
    reference: str | Path, *, allow_pickle: bool = False, known: dict[str, Checkpoint] | None = None
) -> Checkpoint:
    """Open a model folder, a Hub reference, or a LoRA adapter on its base, reading headers only.

    Args:
        reference: a local folder, or ``org/name`` or ``org/name@revision``; of an adapter alone, whose configuration
            names its base, or written ``base+adapter``.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only=True``) where there is no safetensors.
        known: checkpoints that are open already, by reference; adapters of one base then share it. Added to.

    Raises:
        UserError: nothing there, truncated or malformed files, missing shards, pickled weights, an adapter that does
            not fit its base (all of its problems at once).
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
        return files
    place = _base_of(files) if pair is None else pair[0]
    if place not in known:
        known[place] = _open_base(place, files, allow_pickle)
    return combine(name, known[place], files)


def is_adapter(files: Checkpoint) -> bool:
    """Whether these are the files of a PEFT adapter and not of a model."""
    named = any(Path(info.file).name == adapters.WEIGHTS for info in files.tensors.values())
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
    return base


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
