"""A checkpoint: a model folder in Hugging Face layout, its tensors read one at a time and never all at once."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from torch import Tensor

from merganser.checkpoints import side_files
from merganser.checkpoints.configuration_checks import check_configuration
from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.json_files import read_json as read_json
from merganser.checkpoints.modules import Module, main_folder, read_modules
from merganser.checkpoints.quantisation import Quantisation
from merganser.errors import CheckpointError
from merganser.tensors import DTYPES, byte_view


class Digest(Protocol):
    """A hash being computed."""

    def update(self, data: bytes | memoryview, /) -> object:
        """More bytes."""

    def hexdigest(self) -> str:
        """The hash, in hexadecimal."""


#: Statistics and ledgers know weights by sha256. Provenance has blake3, of all that is read and written while merging:
#: sha256 was half of an average's work.
HASHES: dict[str, Callable[[bytes], Digest]] = {"sha256": hashlib.sha256, "blake3": blake3}
PIECE = 16 * 2**20  # bytes that are read at once where a whole tensor is not needed


class Checkpoint:
    """A model folder whose tensors are read lazily. Made by :func:`merganser.checkpoints.open_checkpoint`.

    Args:
        name: as the user gave it.
        path: the folder.
        tensors: where each tensor lies, by name.
        revision: commit of a Hub reference, else None.
        fetch: brings the weight files of a Hub reference to this machine; None when they are here.

    Attributes:
        quantisation: how the files are quantised; None where the weights are plain numbers.
        known_layers: the layers by their weight (see :mod:`merganser.checkpoints.layers`), where no configuration has
            to tell them; None: it has to.
    """

    quantisation: Quantisation | None = None
    known_layers: Mapping[str, Any] | None = None

    def __init__(
        self,
        name: str,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        *,
        revision: str | None = None,
        fetch: Callable[[], None] | None = None,
    ) -> None:
        self.name, self.path, self.tensors, self.revision = name, path, dict(tensors), revision
        self._fetch = fetch
        self._hashes: dict[str, dict[str, str]] = {kind: {} for kind in HASHES}
        self._hashing: dict[str, TensorHash] = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._descriptors: dict[str, tuple[int, Path]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.tensors)} tensors)"

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, or an empty dictionary where the folder has none.

        Raises:
            UserError: it is damaged, or describes no model that could have these tensors.
        """
        where = self.model_path / "config.json"
        found: dict[str, Any] = read_json(where, missing={})
        check_configuration(found, self.tensors, where)
        return found

    @property
    def main(self) -> str:
        """The sub-folder in which the transformer lies; empty for the folder itself, as nearly always."""
        return main_folder(self.path)

    @property
    def model_path(self) -> Path:
        """The folder that transformers opens."""
        return self.path / self.main

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules of a sentence-transformers model."""
        return read_modules(self.modules_path)

    @property
    def modules_path(self) -> Path:
        """The folder that lists them and holds their configurations."""
        return self.path

    @property
    def tokenizer_path(self) -> Path:
        """The folder with its tokenizer."""
        return self.path

    @property
    def nested(self) -> list[str]:
        """The modules' folders with tensors of their own, whose names begin with the folder; inner ones first."""
        folders = {module.path for module in self.modules} - {"", self.main}
        inner_first = sorted(folders, key=lambda folder: (-folder.count("/"), folder))
        return [folder for folder in inner_first if any(name.startswith(f"{folder}/") for name in self.tensors)]

    @property
    def home(self) -> Checkpoint:
        """The files that its statistics are kept with: of an adapter, its own."""
        return self

    @property
    def is_here(self) -> bool:
        """Whether the weights can be read without a download."""
        return self._fetch is None

    def fetch(self) -> None:
        """Download the weights of a Hub reference; nothing to do for a folder."""
        with self._lock:
            if self._fetch is not None:
                self._fetch()
                self._fetch = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor ``name`` in its storage dtype, or its rows ``start:stop`` along the first dimension.

        The result is a private copy.

        Raises:
            CheckpointError: the file is shorter than its header says, or changed while it was in use.
        """
        self.fetch()  # before the offsets are looked up: a remote header does not tell where its data begin
        info = self.tensors[name]
        shape, offset = info.shape, info.offset
        if shape and (start or stop is not None):
            stop = shape[0] if stop is None else min(stop, shape[0])
            offset += start * (info.nbytes // max(shape[0], 1))
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=DTYPES[info.dtype])
        self._read_into(byte_view(tensor), info.file, offset)
        return tensor

    def pieces(self, name: str, nbytes: int = PIECE) -> Iterator[tuple[int, int]]:
        """Ranges of rows of tensor ``name`` of about ``nbytes`` each, in order and at least one."""
        info = self.tensors[name]
        rows = info.shape[0] if info.shape else 1
        step = max(1, nbytes * rows // max(info.nbytes, 1))
        return ((start, min(start + step, rows)) for start in range(0, max(rows, 1), step))

    def prefetch(self, name: str) -> None:
        """Tell the system that tensor ``name`` will be read soon."""
        info = self.tensors[name]
        if self._fetch is None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(info.file)[0], info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def hash(self, name: str, kind: str, tensor: Tensor | None = None) -> str:
        """The hash of a tensor: dtype, shape and bytes. Computed once; ``tensor``, the whole, saves reading it.

        Args:
            name: of the tensor.
            kind: one of :data:`HASHES`.
            tensor: the whole, if it is at hand.
        """
        known = self._hashes[kind]
        if name not in known:
            info = self.tensors[name]
            running = TensorHash(info.dtype, info.shape, kind)
            if tensor is not None:
                running.update(tensor)
            for start, stop in self.pieces(name) if tensor is None else ():
                running.update(self.read(name, start, stop))
            known[name] = running.hexdigest()
        return known[name]

    def sha256(self, name: str, tensor: Tensor | None = None) -> str:
        """The hash that statistics and ledgers know a tensor by."""
        return self.hash(name, "sha256", tensor)

    def observe(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Hash tensor ``name`` on the way, by blake3: what was just read of it, from row ``start``.

        Rows count when they come in order from the first on; anything else is passed over.
        """
        if name in self.hashes:
            return
        info = self.tensors[name]
        if start == 0:
            self._hashing[name] = TensorHash(info.dtype, info.shape, "blake3")
        running = self._hashing.get(name)
        if running is None or running.rows != start:
            return
        running.update(tensor)
        if running.complete:
            self.hashes[name] = running.hexdigest()
            self._hashing.pop(name, None)

    @property
    def hashes(self) -> dict[str, str]:
        """The tensors' blake3 hashes that are known by now; may be added to by who read the same files elsewhere."""
        return self._hashes["blake3"]

    def manifest_hash(self, kind: str) -> str:
        """The hash over every tensor's name and hash: equal for equal weights, however they are sharded."""
        lines = "".join(f"{name} {self.hash(name, kind)}\n" for name in sorted(self.tensors))
        return HASHES[kind](lines.encode()).hexdigest()

    def manifest_sha256(self) -> str:
        """The hash that statistics and ledgers know these weights by."""
        return self.manifest_hash("sha256")

    def side_files(self) -> list[str]:
        """The files beside the weights that belong to the model, see :mod:`merganser.checkpoints.side_files`.

        Returns:
            their paths, relative to the folder.

        Raises:
            CheckpointError: one of them is a link that leads out of the folder.
        """
        return side_files.belonging(self.path)

    def side_paths(self) -> dict[str, Path]:
        """Where each of these files lies, by its path relative to the folder.

        Raises:
            CheckpointError: as of :meth:`side_files`.
        """
        return {file: self.path / file for file in self.side_files()}

    def _read_into(self, view: memoryview, file: str, offset: int) -> None:
        """Fill ``view`` from a weight file."""
        descriptor, path = self._descriptor(file)
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error}", where=path, mend="put it back") from None
        if self._stamps[file] != (status.st_size, status.st_mtime_ns, status.st_ino):
            raise CheckpointError("the file changed while it was being read", where=path, mend="run again")
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise CheckpointError("the file ends early", where=path, mend="copy or download it again")
            done += count

    def _descriptor(self, file: str) -> tuple[int, Path]:
        """An open weight file; its size, time and place are those that it must keep."""
        with self._lock:
            if file not in self._descriptors:
                path = self.path / file
                try:
                    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise CheckpointError(
                        f"cannot be read: {error}", where=path, mend="check the file and its permissions"
                    ) from None
                weakref.finalize(self, os.close, descriptor)
                status = os.fstat(descriptor)
                self._stamps[file] = (status.st_size, status.st_mtime_ns, status.st_ino)
                self._descriptors[file] = (descriptor, path)
            return self._descriptors[file]


class TensorHash:
    """The hash of a tensor's dtype name, shape and bytes, made of pieces in order.

    Args:
        dtype: safetensors dtype name.
        shape: of the whole tensor.
        kind: one of :data:`HASHES`.
    """

    def __init__(self, dtype: str, shape: Sequence[int], kind: str) -> None:
        self.rows, self._left = 0, DTYPES[dtype].itemsize * math.prod(shape)
        self._digest = begin_hash(dtype, shape, kind)

    def update(self, piece: Tensor) -> None:
        """The next rows, in storage dtype."""
        piece = piece.contiguous()
        data = byte_view(piece)
        self._digest.update(data)
        self._left -= len(data)
        self.rows += piece.shape[0] if piece.dim() else 1

    @property
    def complete(self) -> bool:
        """Whether every byte has come."""
        return self._left == 0

    def hexdigest(self) -> str:
        """The hash, in hexadecimal."""
        return self._digest.hexdigest()


def begin_hash(dtype: str, shape: Sequence[int], kind: str) -> Digest:
    """The beginning of a tensor's hash: its bytes are to follow."""
    return HASHES[kind](f"{dtype} {list(shape)}\n".encode())


def hash_tensor(tensor: Tensor, dtype: str, kind: str) -> str:
    """The hash of a tensor's dtype name, shape and bytes, in hexadecimal."""
    whole = TensorHash(dtype, tensor.shape, kind)
    whole.update(tensor)
    return whole.hexdigest()


def sha256_file(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def align(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Map each of ``names`` to its twin among ``others``; names without a twin are absent.

    Twins are equal, or equal but for one leading component (``bert.`` before everything, say). The prefix is the
    one that pairs the most names; a name that is there literally always wins.
    """
    ours, available = set(names), set(others)
    by_prefix: dict[str, dict[str, str]] = {}
    for name in names:
        prefix, dot, rest = name.partition(".")
        if dot and rest in available and name not in available:
            by_prefix.setdefault(prefix, {})[name] = rest
    for other in others:
        prefix, dot, rest = other.partition(".")
        if dot and rest in ours and rest not in available:
            by_prefix.setdefault(prefix, {})[rest] = other
    best = max(by_prefix.values(), key=len, default={})
    pairs = ((name, name if name in available else best.get(name)) for name in names)
    return {name: twin for name, twin in pairs if twin is not None}


def renamed(name: str) -> list[str]:
    """How old files spell a parameter: ``gamma`` for a norm's ``weight``, ``beta`` for its ``bias``."""
    spellings = ((".weight", ".gamma"), (".bias", ".beta"))
    return [name.removesuffix(new) + old for new, old in spellings if name.endswith(new)]
