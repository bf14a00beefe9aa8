"""Hashes of the files of a merged folder.

A weight file's is made of its header and of its tensors' hashes, which are known once the tensors are written: the file
is not read again. It starts with ``blake3:``, or in provenance of format 1 with ``tensors:`` for sha256. Every other
file's is the sha256 of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from merganser.checkpoints import sha256_file
from merganser.checkpoints.header import TensorInfo, read_header, tensor_infos
from merganser.checkpoints.reader import HASHES, PIECE, begin_hash
from merganser.checkpoints.writer import file_layout
from merganser.merging.execution import Outcome
from merganser.merging.layout import Layout

_KINDS = {"blake3:": "blake3", "tensors:": "sha256"}  # by how a weight file's hash begins


def file_digests(
    folder: Path, files: list[str], layout: Layout | None, outcomes: Mapping[str, Outcome]
) -> dict[str, str]:
    """The hashes of a merge's files; weight files need not be in the folder.

    Args:
        folder: that holds the others.
        files: what is in it.
        layout: which tensor went where; None: every file is read.
        outcomes: the hashes of the tensors.
    """
    if layout is None:
        return {file: sha256_file(folder / file) for file in files}
    known: dict[tuple[str, str], str] = {}
    for name, outcome in outcomes.items():
        head, _, inner = name.rpartition("/")
        place = layout.places.get(name, (f"{head}/head.safetensors", inner))
        known[place] = outcome.blake3
    found = {file: sha256_file(folder / file) for file in files if file not in layout.files}
    for file, specs in layout.files.items():
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
