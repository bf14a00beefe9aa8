"""The header of a safetensors file, read as data from a stranger: nothing is allocated before it is checked.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON, then the tensors' bytes).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from merganser.documents import parse_json
from merganser.errors import CheckpointError
from merganser.paths import check_file
from merganser.tensors import DTYPES

MAX_HEADER = 25_000_000  # bytes; the Hub's own limit, at which 200,000 tensors can be described
MAX_DIMENSIONS = 16
MAX_NAME = 1000  # characters of a tensor's name
MAX_ELEMENTS = 2**63  # that a computer can count
AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies on disk.

    Attributes:
        name: its name in the checkpoint (tensors of a nested sentence-transformers module carry its folder).
        dtype: safetensors dtype name, such as ``BF16``.
        shape: its shape.
        file: the file, relative to the checkpoint's folder.
        offset: of its first byte, from the start of the file.
        nbytes: its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset at which its data begin.

    Raises:
        CheckpointError: no plain file, too short, or no JSON object of a bearable size where the header should be.
    """
    size = check_file(path, CheckpointError)
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError("truncated safetensors file: not even a header", where=path, mend=AGAIN)
            (length,) = struct.unpack("<Q", prefix)
            if MAX_HEADER < length <= size - 8:
                what = f"a header of {length} bytes is too long, {MAX_HEADER} are accepted"
                raise CheckpointError(what, where=path, mend="split the model into shards")
            if length > size - 8:
                raise CheckpointError(
                    f"truncated or damaged safetensors file: its header should have {length} bytes, "
                    f"the file has {size}",
                    where=path,
                    mend=AGAIN,
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"unreadable safetensors file: {error}", where=path, mend=AGAIN) from None
    header = parse_json(text, path, CheckpointError, mend=AGAIN)
    if not isinstance(header, dict):
        raise CheckpointError("the safetensors header is no JSON object", where=path, mend=AGAIN)
    return header, 8 + length


def tensor_infos(header: dict[str, Any], start: int, size: int | None, path: Path, file: str) -> list[TensorInfo]:
    """The tensors of a header, in file order, each checked against the size of the file.

    Args:
        header: what :func:`read_header` returned.
        start: offset at which the data begin.
        size: of the whole file, in bytes; None where it is not known.
        path: named in errors.
        file: recorded as :attr:`TensorInfo.file`.

    Raises:
        CheckpointError: an entry that is malformed, of an unknown dtype, overlapping or past the end, or bytes that
            belong to no tensor.
    """
    infos = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if len(name) > MAX_NAME or not name.isprintable():
            what = "a tensor's name is too long, or has characters that cannot be seen:"
            raise CheckpointError(f"{what} {name!r}", where=path, mend="rename it")
        if not _is_sound(entry):
            raise CheckpointError(f"tensor {name!r} has a malformed header entry", where=path, mend=AGAIN)
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} has the unsupported dtype {dtype!r}",
                where=path,
                mend=f"convert it to one of {', '.join(DTYPES)}",
            )
        if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise CheckpointError(
                f"tensor {name!r}: shape {list(shape)} of {dtype} does not fill its {end - begin} bytes",
                where=path,
                mend=AGAIN,
            )
        if size is not None and start + end > size:
            raise CheckpointError(
                f"truncated safetensors file: tensor {name!r} ends at byte {start + end}, the file has {size}",
                where=path,
                mend=AGAIN,
            )
        infos.append(TensorInfo(name, dtype, shape, file, start + begin, end - begin))
    infos.sort(key=lambda info: (info.offset, info.nbytes, info.name))  # empty tensors first
    for before, after in pairwise(infos):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"tensors {before.name!r} and {after.name!r} overlap", where=path, mend=AGAIN)
    used = sum(info.nbytes for info in infos)
    if size is not None and used != size - start:
        what = f"{size - start - used} bytes of the file belong to no tensor"
        raise CheckpointError(what, where=path, mend=AGAIN)
    return infos


def _is_sound(entry: Any) -> bool:
    """Whether an entry has a dtype's name, a shape that is no larger than a tensor can be, and two offsets in order."""
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
            return False
        numbers = all(type(number) is int and number >= 0 for number in (*shape, *offsets))
        return numbers and offsets[0] <= offsets[1] and math.prod(size or 1 for size in shape) < MAX_ELEMENTS
    except (TypeError, KeyError):
        return False


def read_infos(path: Path, file: str) -> list[TensorInfo]:
    """The tensors of the safetensors file at ``path``, recorded as lying in ``file``."""
    header, start = read_header(path)
    return tensor_infos(header, start, path.stat().st_size, path, file)
