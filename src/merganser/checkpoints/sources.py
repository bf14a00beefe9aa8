"""Where a tensor of a merge lies on disk: a stored tensor, a part of one, or several put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.reader import Checkpoint
from merganser.tensors import DTYPES


@dataclass(frozen=True)
class Source:
    """A tensor on disk, a part of one, or several together. What is not set is the whole, as it is stored.

    Attributes:
        tensor: its name in the checkpoint; empty where there are ``parts``.
        index: which one of a stack along the first dimension, such as one expert.
        rows: (start, stop) along the first dimension of what ``index`` or ``parts`` give.
        columns: (start, stop) along the last dimension, likewise.
        transposed: the last two dimensions change places, in the end.
        parts: sources that lie behind each other along the first dimension.
        stacked: each of the parts is one of a stack, so that there is a new first dimension.
    """

    tensor: str = ""
    index: int | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False
    parts: tuple[Source, ...] = ()
    stacked: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it is a stored tensor as it is."""
        parts = self.parts or self.transposed or self.index is not None
        return not parts and self.rows is None and self.columns is None

    def tensors(self) -> Iterator[str]:
        """The names of the stored tensors."""
        if not self.parts:
            yield self.tensor
        for part in self.parts:
            yield from part.tensors()

    @property
    def leaf(self) -> Source:
        """The first stored tensor that it is made of, or the part of it."""
        return self.parts[0].leaf if self.parts else self

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Of what it names."""
        if not self.parts:
            stored = checkpoint.tensors[self.tensor].shape
            shape = stored if self.index is None else stored[1:]
        else:
            shapes = [part.shape(checkpoint) for part in self.parts]
            height = len(shapes) if self.stacked else sum(shape[0] for shape in shapes)
            shape = (height, *(shapes[0] if self.stacked else shapes[0][1:]))
        if self.rows is not None:
            shape = (self.rows[1] - self.rows[0], *shape[1:])
        if self.columns is not None:
            shape = (*shape[:-1], self.columns[1] - self.columns[0])
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def dtype(self, checkpoint: Checkpoint) -> str:
        """The storage dtype; of several tensors, the first's."""
        return checkpoint.tensors[self.leaf.tensor].dtype

    def one_of(self, number: int) -> Source:
        """One of the stack that it names."""
        if self.parts and self.stacked and self.rows is None and self.columns is None and not self.transposed:
            return self.parts[number]
        if self.parts or self.index is not None or self.rows is not None:
            raise ValueError("no stack that can be taken apart")
        return replace(self, index=number)


def read_source(checkpoint: Checkpoint, source: Source, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start:stop`` of what a source names, as stored; a tensor that is read as it is is hashed on the way."""
    if source.transposed:
        return read_source(checkpoint, replace(source, transposed=False)).mT.contiguous()[start:stop]
    if source.columns is not None:
        first, last = source.columns
        return read_source(checkpoint, replace(source, columns=None), start, stop)[..., first:last].contiguous()
    if source.rows is not None:
        first, last = source.rows
        stop = last if stop is None else min(first + stop, last)
        return read_source(checkpoint, replace(source, rows=None), first + start, stop)
    if source.parts:
        return _read_parts(checkpoint, source, start, stop)
    if source.index is not None:
        return checkpoint.read(source.tensor, source.index, source.index + 1)[0][start:stop]
    stored = checkpoint.read(source.tensor, start, stop)
    checkpoint.observe(source.tensor, stored, start)
    return stored


def _read_parts(checkpoint: Checkpoint, source: Source, start: int, stop: int | None) -> Tensor:
    if source.stacked:
        return torch.stack([read_source(checkpoint, part) for part in source.parts[start:stop]])
    found, first = [], 0
    for part in source.parts:
        height = part.shape(checkpoint)[0]
        low, high = max(start - first, 0), height if stop is None else min(stop - first, height)
        if low < high:
            found.append(read_source(checkpoint, part, low, high))
        first += height
    return found[0] if len(found) == 1 else torch.cat(found)


class RenamedCheckpoint(Checkpoint):
    """A checkpoint as it would be if its files had other names: for what is to be written.

    Args:
        stored: the files as they are.
        sources: where each tensor lies in them, by its name here.
    """

    def __init__(self, stored: Checkpoint, sources: Mapping[str, Source]) -> None:
        infos = {}
        for name, source in sources.items():
            dtype, shape = source.dtype(stored), source.shape(stored)
            infos[name] = TensorInfo(name, dtype, shape, "", 0, DTYPES[dtype].itemsize * prod(shape))
        super().__init__(stored.name, stored.path, infos, revision=stored.revision)
        self._stored, self._sources = stored, dict(sources)

    @property
    def config(self) -> dict[str, Any]:
        """As the files have it."""
        return self._stored.config

    @property
    def modules_path(self) -> Path:
        """As the files have it."""
        return self._stored.modules_path

    @property
    def tokenizer_path(self) -> Path:
        """As the files have it."""
        return self._stored.tokenizer_path

    def side_paths(self) -> dict[str, Path]:
        """As the files have it."""
        return self._stored.side_paths()

    def side_files(self) -> list[str]:
        """As the files have it."""
        return self._stored.side_files()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor ``name``, or its rows ``start:stop``."""
        return read_source(self._stored, self._sources[name], start, stop)
