"""The statistics file: what a data owner publishes beside a checkpoint. Never text, never labels.

A safetensors file whose metadata key ``merganser`` holds a :class:`StatisticsHeader` as JSON. Tensors:

``gram.<input>``      float32, packed upper triangle (d·(d+1)/2,) of the mean of x xᵀ over real tokens; or, from
                      protocol 2 on, in fewer bytes: see :mod:`merganser.statistics.forms`
``mean.<input>``      float32 (d,), the mean of x
``count.<module>``    int64 (vocabulary,), how often an embedding looked up each row for a real token
``fisher.<tensor>``   float32 (from protocol 2 on, or bfloat16), diagonal Fisher information of the on-disk tensor,
                      mean over examples

A file from a stranger is data: sizes are checked against the file before anything is allocated, values
before use. A Gram matrix is built from activations of private text and can leak; hashes prove origin,
nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from merganser.checkpoints import Checkpoint, TensorInfo, sha256_file
from merganser.checkpoints.header import read_header, tensor_infos
from merganser.errors import CheckpointError, StatisticsError, UserError, raise_all
from merganser.statistics.checks import binding_problems, layout_problems, naming_problems, value_problems
from merganser.statistics.derived import infos_of
from merganser.statistics.forms import Form, dense, form_of
from merganser.tensors import is_finite

FILE_NAME = "merge_statistics.safetensors"
PROTOCOL = 2  # the newest; a file is of the oldest protocol that has all of its tensors
METADATA_KEY = "merganser"
MAX_METADATA = 32 * 2**20  # bytes of header JSON; a thousand layers need a few hundred thousand
AGAIN = "collect the statistics again, or download the file again"

FisherKind = Literal["expected", "empirical", "predicted"]


class LayerStatistics(BaseModel):
    """What the file knows of one layer.

    Attributes:
        module: the layer's name in the model.
        kind: ``linear``, ``conv1d`` or ``embedding``.
        weight: on-disk name of its weight.
        bias: on-disk name of its bias, if it has one.
        input: key of ``gram.`` and ``mean.``; layers with the same key share their input. None for an
            embedding, whose counts are ``count.<module>``.
        rows: how many token rows were counted.
        tied: another layer uses the same on-disk weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    kind: Literal["linear", "conv1d", "embedding"]
    weight: str
    bias: str | None = None
    input: str | None = None
    rows: int = Field(ge=0)
    tied: bool = False


class StatisticsHeader(BaseModel):
    """Everything about a statistics file but its numbers.

    Attributes:
        protocol: version of this format; readers read their own and every older one.
        layers: the layers with statistics, in module order.
        manifest_sha256: of the whole checkpoint, see :func:`merganser.checkpoints.reader.manifest_sha256`.
        tensor_sha256: of every on-disk weight tensor.
        examples, tokens: how many examples and real tokens (of encoder and decoder together) were counted.
        masking: the rule by which padding was left out.
        dtype: of the accumulators.
        fisher: kind of the Fisher information, None where there is none.
        fisher_examples: over how many examples it is the mean.
        versions: of the libraries.
        label: free text of whoever collected.
        notes: what was left out or assumed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: int = 1
    layers: tuple[LayerStatistics, ...] = ()
    manifest_sha256: str
    tensor_sha256: dict[str, str]
    examples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    masking: str
    dtype: str = "float32"
    fisher: FisherKind | None = None
    fisher_examples: int = Field(0, ge=0)
    versions: dict[str, str] = Field(default_factory=dict)
    label: str = ""
    notes: tuple[str, ...] = ()


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
        self._layers: dict[str, LayerStatistics] = {}
        for layer in header.layers:
            self._layers.setdefault(layer.weight, layer)

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Open a statistics file; header, names, dtypes and shapes are checked, no tensor is read.

        Args:
            path: the file, or the folder that holds :data:`FILE_NAME`.

        Raises:
            StatisticsError: missing, truncated, malformed, of a newer protocol, or with tensors that its
                header does not explain. Several mistakes come as one :class:`~merganser.errors.Problems`.
        """
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        if not file.is_file():
            raise StatisticsError("no such statistics file", where=file, mend="run merganser collect first")
        header, infos = _read_layout(file)
        raise_all([_located(problem, file) for problem in layout_problems(header, infos)])

        stored = Checkpoint(
            str(file), file.parent, infos
        )  # reads one tensor at a time, from an unchanged file
        return cls(header, infos, stored.read, file)

    @classmethod
    def in_memory(cls, header: StatisticsHeader, tensors: Mapping[str, Tensor]) -> Statistics:
        """Statistics that were just collected or computed.

        Raises:
            StatisticsError: the tensors are not what the header says.
        """
        infos = infos_of(tensors)
        raise_all(layout_problems(header, infos))
        return cls(header, infos, lambda name: tensors[name])

    def __repr__(self) -> str:
        return f"Statistics({str(self.path or 'in memory')!r}, {len(self.tensors)} tensors)"

    def layer(self, weight: str) -> LayerStatistics | None:
        """The first layer whose weight is the on-disk tensor ``weight``; None: it has no statistics."""
        return self._layers.get(weight)

    def gram(self, input: str) -> Tensor:
        """(d, d) float32: the mean of x xᵀ, symmetric; checked to be finite, with no negative diagonal.

        The same whatever the file's storage is.
        """
        matrix = dense(form_of(self.tensors, input), input, self._checked)
        if bool((matrix.diagonal() < 0).any()):
            raise self._error(f"the Gram matrix of {input} has negative numbers on its diagonal")
        return matrix

    def mean(self, input: str) -> Tensor:
        """(d,) float32: the mean of x; checked to be finite."""
        return self._checked(f"mean.{input}")

    def count(self, module: str) -> Tensor:
        """(vocabulary,) int64: how often each row of an embedding was looked up; none is negative."""
        counts = self._checked(f"count.{module}")
        if bool((counts < 0).any()):
            raise self._error(f"count.{module} has negative counts")
        return counts

    def fisher(self, parameter: str) -> Tensor:
        """Diagonal Fisher information of an on-disk tensor, float32, in its shape; none is negative."""
        values = self._checked(f"fisher.{parameter}").to(torch.float32)
        if bool((values < 0).any()):
            raise self._error(f"fisher.{parameter} has negative numbers")
        return values

    def has_fisher(self, parameter: str) -> bool:
        """Whether the on-disk tensor ``parameter`` has Fisher information."""
        return f"fisher.{parameter}" in self.tensors

    def has_count(self, module: str) -> bool:
        """Whether the embedding ``module`` has token counts."""
        return f"count.{module}" in self.tensors

    def validate(self) -> None:
        """Read everything: finite, positive semi-definite, no negative counts, means within the Grams.

        Raises:
            StatisticsError: naming each tensor that fails.
        """
        problems = [self._error(text) for text in value_problems(self.tensors, self._read)]
        raise_all(problems)

    def sha256(self) -> str:
        """The hash of the file, computed once; if the file changes after this, no tensor can be read any more.

        Raises:
            StatisticsError: these statistics are in memory.
        """
        if self.path is None:
            raise StatisticsError("statistics in memory have no file hash", mend="write them first")
        if self._hash is None:
            self._read(
                min(self.tensors, key=lambda name: self.tensors[name].nbytes)
            )  # looks at the file's state
            self._hash = sha256_file(self.path)
        return self._hash

    def check_names(self, checkpoint: Checkpoint) -> list[StatisticsError]:
        """What headers alone show of statistics of other weights; no weight is read."""
        return [
            self._error(text, "give the statistics of these weights, or collect them again")
            for text in naming_problems(self.header, self.tensors, checkpoint)
        ]

    def check_binding(self, checkpoint: Checkpoint) -> list[StatisticsError]:
        """What shows that these are statistics of other weights: each tensor that differs, both hashes."""
        return [
            self._error(text, "give the statistics of these weights, or collect them again")
            for text in binding_problems(self.header, self.tensors, checkpoint)
        ]

    def packed(self, name: str) -> Tensor:
        """Any tensor by its name in the file, as it is stored; checked to be finite."""
        return self._checked(name)

    @property
    def inputs(self) -> dict[str, Form]:
        """The inputs with a Gram matrix, and in which form the file holds it, in the order of the layers."""
        return {
            layer.input: form_of(self.tensors, layer.input) for layer in self.header.layers if layer.input
        }

    def width(self, input: str) -> int:
        """The d of an input's Gram matrix (d, d)."""
        return self.tensors[f"mean.{input}"].shape[0]

    @property
    def storage(self) -> str:
        """How Gram matrices and Fisher information are stored: ``float32``, ``bfloat16``, ``lowrank:r`` or several."""
        kinds = []
        for input, form in self.inputs.items():
            rank = self.tensors[f"factor.{input}"].shape[0] if form == "factor" else 0
            kinds.append({"gram": "float32", "covariance": "bfloat16"}.get(form, f"lowrank:{rank}"))
        if not kinds:
            kinds = ["bfloat16" if info.dtype == "BF16" else "float32" for info in self.tensors.values()]
        return " and ".join(sorted(set(kinds))) or "float32"

    def _checked(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise self._error(f"there is no {name}")
        try:
            tensor = self._read(name)
        except UserError as error:
            raise self._error(f"{name} cannot be read: {error.what}", error.mend or AGAIN) from None
        except OSError as error:
            raise self._error(f"{name} cannot be read: {error}") from None
        if tensor.is_floating_point() and not is_finite(tensor):
            raise self._error(f"{name} holds NaN or infinite numbers")
        if name.startswith("scale.") and not 0 < float(tensor) <= 1:
            raise self._error(f"{name} is {float(tensor):g}, it should be above 0 and at most 1")
        return tensor

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
    return _parse_header(text, file), {info.name: info for info in infos}


def _parse_header(text: str, file: Path) -> StatisticsHeader:
    if len(text) > MAX_METADATA:
        raise StatisticsError(f"a header of {len(text)} characters is too long", where=file, mend=AGAIN)
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"the header is no JSON: {error}", where=file, mend=AGAIN) from None
    protocol = fields.get("protocol") if isinstance(fields, dict) else None
    if type(protocol) is not int or protocol < 1:
        raise StatisticsError(
            f"the header has no valid protocol number ({protocol!r})", where=file, mend=AGAIN
        )
    if protocol > PROTOCOL:
        raise StatisticsError(
            f"written by protocol {protocol}; this version of merganser reads up to {PROTOCOL}",
            where=file,
            mend="upgrade merganser",
        )
    try:
        return StatisticsHeader.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StatisticsError(f"the header's {place}: {first['msg']}", where=file, mend=AGAIN) from None


def _located(problem: StatisticsError, file: Path) -> StatisticsError:
    return StatisticsError(problem.what, where=file, mend=problem.mend or AGAIN)
