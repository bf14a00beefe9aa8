"""Writing a statistics file, tensor by tensor: nothing larger than what belongs to one input is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from merganser.checkpoints import TensorInfo
from merganser.checkpoints.header import read_header
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import StatisticsError, UserError, raise_all
from merganser.files import Output, Refusal, new_file, other_kind
from merganser.statistics.format import METADATA_KEY, StatisticsHeader, layout_problems
from merganser.tensors import DTYPE_NAMES

#: As safetensors sorts tensors in a file, so that both writers give the same bytes.
_ORDER = ("I64", "F32", "BF16")
#: Tensors that are computed together: what they will be, and the function that computes all of them.
TensorGroup = tuple[Sequence[TensorSpec], Callable[[], Mapping[str, Tensor]]]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are computed when they are asked for, those of one group together.

    Iterating in order computes every group once and keeps no more than one.

    Args:
        groups: see :data:`TensorGroup`.
    """

    def __init__(self, groups: Sequence[TensorGroup]) -> None:
        self.infos = {
            spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, "", 0, spec.nbytes)
            for specs, _ in groups
            for spec in specs
        }
        self._makers = {spec.name: make for specs, make in groups for spec in specs}
        self._kept: Mapping[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept = {}  # before the next group is computed
            self._kept = self._makers[name]()
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Dtypes and shapes of tensors; those that are :class:`LazyTensors` are not computed for it."""
    if isinstance(tensors, LazyTensors):
        return dict(tensors.infos)
    dtypes = {name: DTYPE_NAMES.get(t.dtype, str(t.dtype)) for name, t in tensors.items()}
    return {name: TensorInfo(name, dtypes[name], tuple(t.shape), "", 0, t.nbytes) for name, t in tensors.items()}


def statistics_output(
    path: Path, reads: Collection[Path], *, overwrite: bool, allowed: Collection[Path] = ()
) -> Output:
    """A statistics file, which may take the place of another one.

    Args:
        path: of the file.
        reads: what it is made from.
        overwrite: whether the user said so.
        allowed: those of ``reads`` that it may be written into or replace all the same.
    """
    return Output(path, recognise_statistics, overwrite, reads, allowed, folder=False)


def recognise_statistics(path: Path) -> Refusal | None:
    """Why a file is not replaced by statistics: it holds none."""
    try:
        metadata = read_header(path)[0].get("__metadata__")
    except UserError:
        metadata = None
    if isinstance(metadata, dict) and METADATA_KEY in metadata:
        return None
    return other_kind("statistics file")


def write_statistics(
    path: str | Path, header: StatisticsHeader, tensors: Mapping[str, Tensor], *, output: Output | None = None
) -> Path:
    """Write a statistics file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: of the file; an existing one is replaced once the new one is complete, and may be what ``tensors`` are
            computed from.
        header: see :class:`~merganser.statistics.StatisticsHeader`.
        tensors: by the names given in :mod:`merganser.statistics.format`; they are taken one after the other.
        output: what may be replaced at ``path``; by default anything that is there.

    Raises:
        StatisticsError: the tensors are not what the header says.
        FileError: the file cannot be written.
    """
    target = Path(path)
    infos = infos_of(tensors)
    raise_all([StatisticsError(text) for text in layout_problems(header, infos)])
    ordered = sorted(infos.values(), key=lambda info: (_ORDER.index(info.dtype), info.name))
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in ordered]
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    new = new_file(target) if output is None else output.new()
    with new as work, SafetensorsWriter(work.parent, {work.name: specs}, {METADATA_KEY: text}) as writer:
        for name, tensor in tensors.items():
            writer.write(work.name, name, tensor)
    return target
