"""Reading statistics tensor by tensor; what is read is checked before it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from merganser.checkpoints import Checkpoint, TensorInfo, sha256_file
from merganser.checkpoints.header import read_header, tensor_infos
from merganser.errors import CheckpointError, StatisticsError, UserError, raise_all
from merganser.paths import inside
from merganser.progress import track
from merganser.statistics.format import (
    AGAIN,
    FILE_NAME,
    METADATA_KEY,
    LayerStatistics,
    StatisticsHeader,
    binding_problems,
    layout_problems,
    parse_header,
)
from merganser.statistics.gram_encodings import GramEncoding, dense_gram, encoding_of
from merganser.statistics.judging import Judgement, judge, judged_names, number_problem
from merganser.statistics.writing import infos_of
from merganser.tensors import one_thread

#: By the hash of the file and the name: grids of merges use the same files again and again.
_JUDGED: dict[tuple[str, str], Judgement] = {}
_MOST_JUDGED = 100_000
OTHERS = "give the statistics of these weights, or collect them again"


class Statistics:
    """Statistics of one checkpoint, read tensor by tensor. Made by :meth:`open`, or from tensors in memory.

    Args:
        header: see :class:`StatisticsHeader`.
        tensors: where each tensor lies; only names, dtypes and shapes are used here.
        read: reads one tensor by its name.
        path: the file; None in memory.
    """

    def __init__(
        self,
        header: StatisticsHeader,
        tensors: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
        path: Path | None = None,
    ) -> None:
        self.header, self.tensors, self.path = header, dict(tensors), path
        self._read = read
        self._hash: str | None = None
        self._layers: dict[tuple[str, int | None], LayerStatistics] = {}
        for layer in header.layers:
            self._layers.setdefault((layer.weight, layer.expert), layer)
        several = Counter(layer.module for layer in header.layers)
        self.expert_modules = {module for module, count in several.items() if count > 1}

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Open a statistics file; header, names, dtypes and shapes are checked, no tensor is read.

        Args:
            path: the file, or the folder that holds :data:`FILE_NAME`, and no link to another's.

        Raises:
            StatisticsError: missing, truncated, malformed, of a newer protocol, or with tensors that its
                header does not explain. Several mistakes come as one :class:`~merganser.errors.Problems`.
        """
        file = Path(path)
        if file.is_dir():
            file = file / inside(file, FILE_NAME, StatisticsError, where=file, what="the file")
        if not file.is_file():
            raise StatisticsError("no such statistics file", where=file, mend="run merganser collect first")
        header, infos = _read_layout(file)
        raise_all([StatisticsError(text, where=file, mend=AGAIN) for text in layout_problems(header, infos)])
        stored = Checkpoint(str(file), file.parent, infos)  # reads one tensor at a time, from an unchanged file
        return cls(header, infos, stored.read, file)

    @classmethod
    def in_memory(cls, header: StatisticsHeader, tensors: Mapping[str, Tensor]) -> Statistics:
        """Statistics that were just collected or computed.

        Raises:
            StatisticsError: the tensors are not what the header says.
        """
        infos = infos_of(tensors)
        raise_all([StatisticsError(text) for text in layout_problems(header, infos)])
        return cls(header, infos, lambda name: tensors[name])

    def __repr__(self) -> str:
        return f"Statistics({str(self.path or 'in memory')!r}, {len(self.tensors)} tensors)"

    def layer(self, weight: str, expert: int | None = None) -> LayerStatistics | None:
        """The first layer whose weight is the on-disk tensor ``weight``; None: it has no statistics.

        Args:
            weight: the tensor's name.
            expert: which of its matrices; one without statistics of its own has those that hold for all.
        """
        own = self._layers.get((weight, expert))
        return own if own is not None or expert is None else self._layers.get((weight, None))

    def gram(self, input: str) -> Tensor:
        """(d, d) float32: the mean of x xᵀ, symmetric; checked to be finite, with no negative diagonal.

        The same whatever the file's storage is.
        """
        matrix = dense_gram(encoding_of(self.tensors, input), input, self.packed)
        if bool((matrix.diagonal() < 0).any()):
            raise self._error(f"the Gram matrix of {input} has negative numbers on its diagonal")
        return matrix

    def mean(self, input: str) -> Tensor:
        """(d,) float32: the mean of x; checked to be finite."""
        return self.packed(f"mean.{input}")

    def count(self, module: str) -> Tensor:
        """(vocabulary,) int64: how often each row of an embedding was looked up; none is negative."""
        return self.packed(f"count.{module}")

    def fisher(self, parameter: str) -> Tensor:
        """Diagonal Fisher information of an on-disk tensor, float32, in its shape; none is negative."""
        return self.packed(f"fisher.{parameter}").to(torch.float32)

    def has_fisher(self, parameter: str) -> bool:
        """Whether the on-disk tensor ``parameter`` has Fisher information."""
        return f"fisher.{parameter}" in self.tensors

    def has_count(self, module: str) -> bool:
        """Whether the embedding ``module`` has token counts."""
        return f"count.{module}" in self.tensors

    def judge(self, name: str) -> Judgement:
        """What is wrong with one statistic, and its size; a file whose hash is known is judged once by a process.

        Args:
            name: see :class:`~merganser.statistics.judging.Judgement`.
        """
        if self._hash is None:
            return judge(name, self.tensors, self._read)
        known = (self._hash, name)
        found = _JUDGED.get(known) or judge(name, self.tensors, self._read)
        if not found.problems:
            if len(_JUDGED) >= _MOST_JUDGED:
                _JUDGED.clear()
            _JUDGED[known] = found
        return found

    def validate(self, threads: int = 1) -> None:
        """Read everything: finite, positive semi-definite, no negative counts, means within the Grams.

        Args:
            threads: how many statistics are judged at once.

        Raises:
            StatisticsError: naming each tensor that fails.
        """
        names = judged_names(self.tensors)
        with one_thread(), ThreadPoolExecutor(threads) as pool:
            found = list(track(pool.map(self.judge, names), "judging statistics", "tensors", len(names)))
        raise_all([self._error(text) for judgement in found for text in judgement.problems])

    def sha256(self) -> str:
        """The hash of the file, computed once; if the file changes after this, no tensor can be read any more.

        Raises:
            StatisticsError: these statistics are in memory.
        """
        if self.path is None:
            raise StatisticsError("statistics in memory have no file hash", mend="write them first")
        if self._hash is None:
            # reading the smallest tensor looks at the file's state
            self._read(min(self.tensors, key=lambda name: self.tensors[name].nbytes))
            self._hash = sha256_file(self.path)
        return self._hash

    def check_names(self, checkpoint: Checkpoint) -> list[StatisticsError]:
        """What headers alone show of statistics of other weights; no weight is read."""
        return [
            self._error(text, OTHERS) for text in binding_problems(self.header, self.tensors, checkpoint, read=False)
        ]

    def check_binding(self, checkpoint: Checkpoint) -> list[StatisticsError]:
        """What shows that these are statistics of other weights: each tensor that differs, both hashes."""
        return [self._error(text, OTHERS) for text in binding_problems(self.header, self.tensors, checkpoint)]

    def packed(self, name: str) -> Tensor:
        """Any tensor by its name in the file, as it is stored; its numbers are checked one by one."""
        if name not in self.tensors:
            raise self._error(f"there is no {name}")
        try:
            tensor = self._read(name)
        except (UserError, OSError) as error:
            what, mend = (error.what, error.mend) if isinstance(error, UserError) else (error, None)
            raise self._error(f"{name} cannot be read: {what}", mend or AGAIN) from None
        if problem := number_problem(name, tensor):
            raise self._error(problem)
        return tensor

    @property
    def inputs(self) -> dict[str, GramEncoding]:
        """What has a Gram matrix, and in which encoding the file holds it, in the order of the layers.

        These are the layers' inputs and, with K-FAC, the gradients of their outputs.
        """
        return {key: encoding_of(self.tensors, key) for layer in self.header.layers for key in layer.gram_rows}

    @property
    def others(self) -> list[str]:
        """Names of the tensors that belong to no Gram matrix: token counts and Fisher information."""
        return [name for name in self.tensors if name.startswith(("count.", "fisher."))]

    def width(self, input: str) -> int:
        """The d of an input's Gram matrix (d, d)."""
        return self.tensors[f"mean.{input}"].shape[0]

    @property
    def storage(self) -> str:
        """How Gram matrices and Fisher information are stored: ``float32``, ``bfloat16``, ``lowrank:r`` or several."""
        kinds = []
        for input, encoding in self.inputs.items():
            rank = self.tensors[f"factor.{input}"].shape[0] if encoding == "factor" else 0
            kinds.append({"gram": "float32", "covariance": "bfloat16"}.get(encoding, f"lowrank:{rank}"))
        if not kinds:
            kinds = ["bfloat16" if info.dtype == "BF16" else "float32" for info in self.tensors.values()]
        return " and ".join(sorted(set(kinds))) or "float32"

    def _error(self, what: str, mend: str = AGAIN) -> StatisticsError:
        return StatisticsError(what, where=self.path, mend=mend)


def _read_layout(file: Path) -> tuple[StatisticsHeader, dict[str, TensorInfo]]:
    try:
        raw, start = read_header(file)
        infos = tensor_infos(raw, start, file.stat().st_size, file, file.name)
    except CheckpointError as error:
        raise StatisticsError(error.what, where=file, mend=AGAIN) from None
    metadata = raw.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise StatisticsError("no merganser statistics: the header is missing", where=file, mend=AGAIN)
    return parse_header(text, file), {info.name: info for info in infos}
