"""Writing a statistics file, tensor by tensor: nothing larger than what belongs to one input is ever in memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec, sync
from merganser.errors import StatisticsError, UserError, raise_all
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
        StatisticsError: the tensors are not what the header says, or the place cannot be written to.
    """
    target = Path(path)
    infos = infos_of(tensors)
    raise_all(layout_problems(header, infos))
    ordered = sorted(infos.values(), key=lambda info: (_ORDER.index(info.dtype), info.name))
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in ordered]
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as work:
            with SafetensorsWriter(Path(work), {target.name: specs}, {METADATA_KEY: text}) as writer:
                for name, tensor in tensors.items():
                    writer.write(target.name, name, tensor)
            (Path(work) / target.name).chmod(0o666 & ~_umask())
            (Path(work) / target.name).replace(target)
            sync(target.parent)
    except UserError:  # of what the tensors are computed from
        raise
    except Exception as error:
        raise StatisticsError(
            f"cannot be written: {error}", where=target, mend="choose another place with -o, or make room"
        ) from None
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
