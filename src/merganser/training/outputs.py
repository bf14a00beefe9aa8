"""The folder that a training writes: what marks it, and what it may take the place of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merganser.checkpoints import sha256_file
from merganser.documents import read_json
from merganser.errors import UserError
from merganser.files import Output, Refusal, files_below, other_kind, real_files, unlisted

MARK = "merganser_training.json"  # lists the files of a trained model; weights without their hashes


def trained_output(
    output: Path, sources: Iterable[str | Path], *, overwrite: bool, work: str | Path | None = None
) -> Output:
    """The folder of a training, which may take the place of another training's.

    Args:
        output: the folder.
        sources: the models that are trained: folders, ``folder::heads/name`` or names on the Hub.
        overwrite: whether the user said so.
        work: the folder of a training that can be taken up again.
    """
    folders = [Path(str(source).partition("::")[0]) for source in sources]
    reads = [place for folder in folders if folder.exists() for place in real_files(folder)]
    return Output(output, recognise_training, overwrite, [*reads, *([] if work is None else [Path(work)])])


@contextmanager
def new_trained(output: Output) -> Iterator[Path]:
    """The folder to fill, which is marked and takes its place at the end (see :meth:`Output.new`)."""
    with output.new() as folder:
        yield folder
        found = {name: _digest(folder / name) for name in sorted(files_below(folder))}
        (folder / MARK).write_text(json.dumps({"format": 1, "files": found}, indent=1) + "\n", encoding="utf-8")


def recognise_training(folder: Path) -> Refusal | None:
    """Why a folder is not replaced by a training: it is none itself, or holds something that is no part of it."""
    files = _recorded(folder / MARK)
    if files is None:
        return other_kind(f"training (no sound {MARK} is in it)", "folder")
    changed = [name for name, found in files.items() if found and (folder / name).is_file()]
    known = {MARK, *files} - {name for name in changed if _digest(folder / name) != files[name]}
    return unlisted(files_below(folder), known, "the training as it was written")


def _recorded(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except UserError:
        return None
    files = found.get("files") if isinstance(found, dict) else None
    return files if isinstance(files, dict) else None


def _digest(path: Path) -> str | None:
    return None if path.suffix == ".safetensors" else sha256_file(path)
