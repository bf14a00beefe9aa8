"""Writing a model folder: header first, tensors streamed into their places in any order, whole or nothing."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from merganser.checkpoints.header import TensorInfo
from merganser.tensors import DTYPES, byte_view

_SYNC_EVERY = 64 * 2**20  # bytes that may wait for the disk before it is set to work


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()


def shard(specs: Sequence[TensorSpec], stem: str, max_bytes: int) -> dict[str, list[TensorSpec]]:
    """Files of at most ``max_bytes`` (or one tensor) each, in order, named as the Hub names them."""
    groups: list[list[TensorSpec]] = [[]]
    room = max_bytes
    for spec in specs:
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    n = len(groups)
    return {f"{stem}-{i:05d}-of-{n:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def index_json(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index of a sharded checkpoint."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


class SafetensorsWriter:
    """Safetensors files whose headers are written at once and whose tensors may come in any order, from any thread.

    Args:
        folder: where the files go; must exist.
        files: the tensors of each file, by file name relative to ``folder``.
        metadata: of each file; by default the format that the Hub expects of weights.

    Use as a context manager; leaving it checks that every tensor was written and flushes to disk. Much of the
    flushing happens before, beside the work.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Sequence[TensorSpec]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._places: dict[tuple[str, str], TensorInfo] = {}
        self._descriptors: dict[str, int] = {}
        self._missing: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._syncing = ThreadPoolExecutor(1, "sync")
        self._synced: list[Future[None]] = []
        self._unsynced: dict[str, int] = dict.fromkeys(files, 0)
        for file, specs in files.items():
            header, infos = file_layout(file, specs, metadata)
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors[file] = descriptor
            _write_at(descriptor, header, 0)
            os.ftruncate(descriptor, max([len(header), *(i.offset + i.nbytes for i in infos)]))
            self._places.update({(file, info.name): info for info in infos})
        self._missing = {place: info.nbytes for place, info in self._places.items() if info.nbytes}

    def write(self, file: str, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a tensor, or some rows of one from row ``start`` on, into its place. Each row is to be written once.

        Rows may be those of a stack of matrices, counted through.

        Raises:
            ValueError: its dtype or shape is not what was announced.
        """
        info = self._places[file, name]
        shape, rows = tuple(tensor.shape), tensor.shape[0] if tensor.dim() else 1
        deeper = max(len(info.shape) - len(shape), 0)
        height = prod(info.shape[: deeper + 1]) if info.shape else 1
        fits = shape[1:] == info.shape[deeper + 1 :] and bool(shape) == bool(info.shape)
        if not fits or start + rows > height or tensor.dtype != DTYPES[info.dtype]:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} is not {info.dtype} {list(info.shape)}"
                + (f" from row {start} on" if start else "")
            )
        tensor = tensor.contiguous()
        data = byte_view(tensor)
        _write_at(self._descriptors[file], data, info.offset + start * (len(data) // max(rows, 1)))
        with self._lock:
            left = self._missing.get((file, name), 0) - len(data)
            self._missing[file, name] = left
            if not left:
                del self._missing[file, name]
            self._unsynced[file] += len(data)
            if self._unsynced[file] >= _SYNC_EVERY:
                self._unsynced[file] = 0
                self._synced.append(self._syncing.submit(os.fsync, self._descriptors[file]))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise RuntimeError(f"never written: {sorted(self._missing)[:5]}")
                self._synced += [self._syncing.submit(os.fsync, d) for d in self._descriptors.values()]
                for done in self._synced:  # the system tells of a failed write once, to whoever flushes first
                    done.result()
        finally:
            self._syncing.shutdown(cancel_futures=True)
            for descriptor in self._descriptors.values():
                os.close(descriptor)


def file_layout(
    file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[TensorInfo]]:
    """The first bytes of a safetensors file, up to its tensors, and where each of these lies, in file order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    infos, offset = [], start
    for spec in specs:
        infos.append(TensorInfo(spec.name, spec.dtype, spec.shape, file, offset, spec.nbytes))
        offset += spec.nbytes
    return struct.pack("<Q", len(header)) + header, infos


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
