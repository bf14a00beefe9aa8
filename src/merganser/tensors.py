"""Small things about tensors that every layer may use: storage dtypes, packed triangles, threads."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

_HUGE = 4 * 2**20  # bytes of two huge pages
#: safetensors' dtype names and torch's.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # the bits of infinity
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def is_floating(dtype_name: str) -> bool:
    """Whether tensors of this safetensors dtype are numbers with a fraction; those of one byte are codes of a scale."""
    return DTYPES[dtype_name].is_floating_point


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinite."""
    infinite = _INFINITE.get(tensor.dtype)
    if infinite is not None and tensor.device.type == "cpu" and tensor.numel():
        # Of the bits as signed numbers, what is positive and not finite is largest; as unsigned ones, what is negative.
        bits = tensor.contiguous().view(torch.int16).numpy()
        return bool(bits.max() < infinite and bits.view(np.uint16).max() < infinite + 0x8000)
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    # A sum shows it in one pass; where it overflows by itself, every number is looked at.
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(torch.isfinite(tensor).all())


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied; to be used while the tensor lives."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only a contiguous tensor on the CPU has its bytes in a row")
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def pack_upper(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric ``(d, d)`` matrix, row by row, as ``(d·(d+1)/2,)``."""
    d = matrix.shape[0]
    packed = matrix.new_empty(d * (d + 1) // 2)
    start = 0
    for row in range(d):  # slices, not index tensors, which would be four times as large as the triangle
        packed[start : start + d - row] = matrix[row, row:]
        start += d - row
    return packed


def unpack_upper(packed: Tensor) -> Tensor:
    """The symmetric ``(d, d)`` matrix of a packed upper triangle ``(d·(d+1)/2,)``.

    Args:
        packed: on the CPU.

    Raises:
        ValueError: the length is not a triangular number.
    """
    d = packed_width(packed.numel())
    matrix = roomy_empty(d, d, packed)
    bits = _BITS[packed.itemsize]  # numpy takes a tenth of torch's time for a slice, and does not know bfloat16
    rows, line = matrix.view(bits).numpy(), packed.contiguous().view(bits).numpy()
    start = 0
    for row in range(d):
        rows[row, row:] = line[start : start + d - row]
        start += d - row
    return mirror_upper(matrix)


def mirror_upper(matrix: Tensor, block: int = 128) -> Tensor:
    """Copy the upper triangle of ``matrix`` ``(d, d)`` into its lower one, in place, and return it."""
    for start in range(0, matrix.shape[0], block):
        stop = start + block
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return matrix


def roomy_empty(rows: int, columns: int, like: Tensor) -> Tensor:
    """A ``(rows, columns)`` matrix on the device of ``like`` and in its dtype, its numbers of no meaning.

    A large one on the CPU is in huge pages, where the system has them: with small ones, a tenth of a merge by Gram
    matrices of width 3072 is spent on page faults.
    """
    nbytes = rows * columns * like.itemsize
    if like.device.type != "cpu" or nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(rows, columns)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(rows, columns)


def packed_width(length: int) -> int:
    """The width d of a packed upper triangle of ``length = d·(d+1)/2`` numbers."""
    d = (math.isqrt(8 * length + 1) - 1) // 2
    if d * (d + 1) // 2 != length:
        raise ValueError(f"{length} is not the length of a packed triangle")
    return d


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums have one order and bytes do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
