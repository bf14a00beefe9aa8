"""Quantised checkpoints, read as the numbers that their codes mean.

A weight that is stored as FP8 or FP4 codes and scales is seen by everybody as one BF16 tensor under the weight's own
name, and is made where it is read, row by row. The scales do not show, the configuration says nothing of quantisation,
and a tensor's hash is that of its stored bytes: codes and scales. Whatever cannot be read so is refused, or opened as a
:class:`CodedCheckpoint` that is only looked at, or loaded by transformers itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.quantisation import Codes, Quantisation, find_quantisation, refusal, without_quantisation
from merganser.checkpoints.reader import HASHES, PIECE, Checkpoint
from merganser.tensors import DTYPES

_READ_AS = "BF16"
_CACHED = 2**18  # numbers that are made at once


class QuantisedCheckpoint(Checkpoint):
    """A checkpoint whose codes are read as BF16 weights. Made by :func:`merganser.checkpoints.open_checkpoint`.

    Args:
        stored: the files as they are.
        quantisation: which of their tensors hold codes and scales, all of them readable.
    """

    quantisation: Quantisation

    def __init__(self, stored: Checkpoint, quantisation: Quantisation) -> None:
        self.stored, self.quantisation = stored, quantisation
        super().__init__(stored.name, stored.path, _infos(stored, quantisation), revision=stored.revision)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` without what it says of quantisation: what is read is plain numbers."""
        found: dict[str, Any] = without_quantisation(self.stored.config)
        return found

    @property
    def is_here(self) -> bool:
        """Whether the weights can be read without a download."""
        return self.stored.is_here

    def fetch(self) -> None:
        """Download what is on the Hub."""
        self.stored.fetch()
        self.path = self.stored.path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor ``name``, or its rows ``start:stop``: codes as the BF16 numbers that they mean.

        The result is a private copy.
        """
        codes = self.quantisation.codes.get(name)
        if codes is None:
            return self.stored.read(name, start, stop)
        self.fetch()
        shape = codes.weight_shape
        stop = shape[0] if stop is None else min(stop, shape[0])
        found = torch.empty((max(stop - start, 0), *shape[1:]), dtype=DTYPES[_READ_AS])
        step = max(1, PIECE // max(math.prod(shape[1:]), 1))
        for first in range(start, stop, step):
            self._decode(codes, first, min(first + step, stop), found[first - start : first - start + step])
        return found

    def prefetch(self, name: str) -> None:
        """Tell the system that a tensor will be read soon."""
        codes = self.quantisation.codes.get(name)
        self.stored.prefetch(name if codes is None else codes.codes)

    def observe(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Hash a plain tensor on the way; codes are hashed as they are read, and not by what they mean."""
        if name not in self.quantisation.codes:
            self.stored.observe(name, tensor, start)

    @property
    def hashes(self) -> dict[str, str]:
        """The tensors' hashes that are known by now; may be added to by whoever read the same files elsewhere."""
        known = self.stored.hashes
        for name in self.tensors:
            if all(part in known for part in self._parts(name).values()):
                self.hash(name, "blake3")
        return self._hashes["blake3"]

    def hash(self, name: str, kind: str, tensor: Tensor | None = None) -> str:
        """The hash of a plain tensor, or of codes and scales as they are stored, which ``tensor`` does not save."""
        known, codes = self._hashes[kind], self.quantisation.codes.get(name)
        if name not in known and codes is None:
            known[name] = self.stored.hash(name, kind, tensor)
        elif name not in known and codes is not None:
            parts: dict[str, object] = {role: self.stored.hash(own, kind) for role, own in self._parts(name).items()}
            parts |= {"grid": codes.grid, "blocks": codes.blocks, "transposed": codes.transposed}
            text = json.dumps(parts, sort_keys=True)
            known[name] = HASHES[kind](f"codes and scales\n{text}\n".encode()).hexdigest()
        return known[name]

    def _parts(self, name: str) -> dict[str, str]:
        """The stored tensors that one is made of, by what they are."""
        codes = self.quantisation.codes.get(name)
        return {"plain": name} if codes is None else {"codes": codes.codes, "scale": codes.scale}

    def _decode(self, codes: Codes, start: int, stop: int, found: Tensor) -> None:
        """Fill ``found`` with rows ``start:stop`` of the first dimension."""
        stored = self.stored.read(codes.codes, start, stop)
        self.stored.observe(codes.codes, stored, start)  # its bytes are here: no need to read them again
        first, last = 0, 1
        if codes.grid[0] > 1:
            first, last = start // codes.blocks[0], (stop - 1) // codes.blocks[0] + 1
        scales = self.stored.read(codes.scale, first, last) if codes.grid[0] > 1 else self.stored.read(codes.scale)
        grid = _numbers(scales).view(last - first, *codes.grid[1:])
        if len(codes.shape) == 2:
            _decode_matrix(stored, grid, codes, start - first * codes.blocks[0] if codes.grid[0] > 1 else 0, found)
            return
        for number in range(stop - start):
            own = (start + number) // codes.blocks[0] - first if codes.grid[0] > 1 else 0
            _decode_matrix(stored[number], grid[own], codes, 0, found[number])


class CodedCheckpoint(Checkpoint):
    """A checkpoint of codes that cannot be read as weights: to be looked at, or loaded by transformers.

    Args:
        stored: the files as they are.
        quantisation: what is known of it.
    """

    quantisation: Quantisation

    def __init__(self, stored: Checkpoint, quantisation: Quantisation) -> None:
        self.quantisation = quantisation
        super().__init__(stored.name, stored.path, stored.tensors, revision=stored.revision)
        self._stored = stored

    def fetch(self) -> None:
        """Download what is on the Hub."""
        self._stored.fetch()
        self.path, self.tensors = self._stored.path, self._stored.tensors


def as_numbers(stored: Checkpoint, *, codes: bool = False) -> Checkpoint:
    """A model's files as a checkpoint of weights: as they are, or dequantised where they are read.

    Args:
        stored: the files.
        codes: return codes that cannot be read as a :class:`CodedCheckpoint`.

    Raises:
        QuantisedWeights: the codes cannot be read as weights.
    """
    quantisation = find_quantisation(stored.config, stored.tensors)
    if quantisation is None:
        return stored
    if quantisation.readable:
        return QuantisedCheckpoint(stored, quantisation)
    if codes:
        return CodedCheckpoint(stored, quantisation)
    raise refusal(stored.name, stored.config, quantisation)


def _infos(stored: Checkpoint, quantisation: Quantisation) -> dict[str, TensorInfo]:
    """The weights by their own names, in the order of the files."""
    names = {codes.codes: name for name, codes in quantisation.codes.items()}
    return {info.name: info for info in _seen(stored, quantisation, names)}


def _seen(stored: Checkpoint, quantisation: Quantisation, names: dict[str, str]) -> Iterator[TensorInfo]:
    for own, info in stored.tensors.items():
        if own in names:
            shape = quantisation.codes[names[own]].weight_shape
            nbytes = math.prod(shape) * DTYPES[_READ_AS].itemsize
            yield replace(info, name=names[own], dtype=_READ_AS, shape=shape, nbytes=nbytes)
        elif own not in quantisation.hidden:
            yield info


def _numbers(scale: Tensor) -> Tensor:
    """Scales in float32; a byte is the exponent of a power of two."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def _decode_matrix(stored: Tensor, grid: Tensor, codes: Codes, shift: int, found: Tensor) -> None:
    """Fill ``found`` with what the rows of a matrix of codes mean, a few rows at a time so that they stay in the cache.

    Args:
        stored: codes (rows, columns); FP4 ones (rows, …) with two in each byte.
        grid: the scales of these rows, float32 (rows of blocks, columns of blocks).
        codes: how they are stored.
        shift: how many rows of the first row of blocks come before these rows.
        found: BF16 (rows, columns), or (columns, rows) where the codes lie transposed.
    """
    rows, columns = stored.shape[0], codes.shape[-1]
    high, wide = codes.blocks[-2:]
    whole = columns // wide * wide
    step = max(1, _CACHED // columns)
    table = _table(stored.dtype, codes.packed)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        looked_up = np.take(table, stored[start:stop].view(torch.uint8).numpy(), mode="clip")
        numbers = torch.from_numpy(looked_up.view(np.float32)).view(stop - start, columns)
        scales = grid
        if len(grid) > 1:
            scales = grid.index_select(0, torch.arange(shift + start, shift + stop) // high)
        numbers[:, :whole].unflatten(1, (-1, wide)).mul_(scales[:, : whole // wide, None])
        if whole < columns:  # the last block of a row is a short one
            numbers[:, whole:].mul_(scales[:, -1:])
        if codes.transposed:
            found[:, start:stop] = numbers.to(found.dtype).T
        else:
            found[start:stop] = numbers


@cache
def _table(dtype: torch.dtype, packed: bool) -> np.ndarray[Any, Any]:
    """What each of the 256 bytes means, float32; of packed codes, the two numbers as one of 64 bits.

    To look numbers up is twice as fast as torch's own conversion of float8.
    """
    if not packed:
        return np.asarray(torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy())
    from transformers.integrations.mxfp4 import FP4_VALUES

    values, byte = np.array(FP4_VALUES, dtype=np.float32), np.arange(256)
    return np.stack((values[byte & 0x0F], values[byte >> 4]), axis=-1).view(np.uint64)[:, 0]
