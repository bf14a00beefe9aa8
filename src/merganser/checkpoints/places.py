"""Which folders and files opening a checkpoint reads, so that nobody writes over them."""

from __future__ import annotations

from pathlib import Path

from merganser.checkpoints.adapters import AdapterCheckpoint
from merganser.checkpoints.reader import Checkpoint
from merganser.files import real_files


def places_read(checkpoint: Checkpoint) -> list[Path]:
    """The folders of a checkpoint, those of an adapter and of its base, and the files that links in them lead to."""
    if isinstance(checkpoint, AdapterCheckpoint):
        return [*places_read(checkpoint.base), *places_read(checkpoint.adapter)]
    weights = {checkpoint.path / file for file in {info.file for info in checkpoint.tensors.values()}}
    apart = [path for path in weights if ".." in path.parts or not path.is_relative_to(checkpoint.path)]
    return [*real_files(checkpoint.path), *sorted(apart)]  # such as those that the heads of a merge share
