"""Writing a statistics file, tensor by tensor: nothing larger than what belongs to one input is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import raise_all
from merganser.files import new_file
from merganser.statistics.checks import layout_problems
from merganser.statistics.derived import infos_of
from merganser.statistics.format import METADATA_KEY, StatisticsHeader

_ORDER = (
    "I64",
    "F32",
    "BF16",
)  # as safetensors sorts tensors in a file, so that both writers give the same bytes


def write_statistics(path: str | Path, header: StatisticsHeader, tensors: Mapping[str, Tensor]) -> Path:
    """Write a statistics file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: of the file; an existing one is replaced once the new one is complete, and may be what ``tensors`` are
            computed from.
        header: see :class:`~merganser.statistics.StatisticsHeader`.
        tensors: by the names given in :mod:`merganser.statistics.format`; they are taken one after the other.

    Raises:
        StatisticsError: the tensors are not what the header says.
        FileError: the file cannot be written.
    """
    target = Path(path)
    infos = infos_of(tensors)
    raise_all(layout_problems(header, infos))
    ordered = sorted(infos.values(), key=lambda info: (_ORDER.index(info.dtype), info.name))
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in ordered]
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    with (
        new_file(target) as work,
        SafetensorsWriter(work.parent, {work.name: specs}, {METADATA_KEY: text}) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(work.name, name, tensor)
    return target
