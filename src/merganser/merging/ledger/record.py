"""What a ledger says of itself: ``ledger.json``, the one file that decides which sums count.

It names the file of the sums, so replacing it is the moment at which a contributor joins or leaves. It carries its
own hash: a ledger that was edited or damaged is not read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from merganser.checkpoints.layers import Kind, Layer
from merganser.checkpoints.reader import read_json
from merganser.errors import CheckpointError
from merganser.merging.plan import AVERAGE, COPY, Step
from merganser.methods import SUMMED, Facts, Unit
from merganser.methods.least_squares import LeastSquares

FILE_NAME = "ledger.json"
FORMAT = 2  # 1 did not know the labels of heads

RESTORE = "restore the folder from a copy, or start a new ledger and add again"

Treatment = Literal["gram", "diagonal", "average", "copy"]


class LedgerError(CheckpointError):
    """A ledger that cannot be used, or not for this."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRecord(_Frozen):
    """A layer by the base's on-disk names, see :class:`merganser.checkpoints.layers.Layer`."""

    kind: Kind
    weight: str
    bias: str | None = None


class LedgerPart(_Frozen):
    """Tensors whose sums belong together.

    Attributes:
        names: by the base's files.
        shapes: of each.
        kind: the method's word for how they are merged.
        treatment: which sums are kept, see :mod:`merganser.merging.ledger.terms`; ``copy``: none.
        reason: why they are not merged by the method.
        layers: whose weights are among them.
    """

    names: tuple[str, ...] = Field(min_length=1)
    shapes: tuple[tuple[NonNegativeInt, ...], ...]
    kind: str
    treatment: Treatment
    reason: str | None = None
    layers: tuple[LayerRecord, ...] = ()

    @model_validator(mode="after")
    def _a_shape_each(self) -> LedgerPart:
        if len(self.names) != len(self.shapes):
            raise ValueError("a part has as many shapes as tensors")
        return self

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each."""
        return list(zip(self.names, self.shapes, strict=True))

    def unit(self) -> Unit:
        """The tensors as methods know them."""
        layers = [Layer(one.weight, one.kind, one.weight, one.bias, False) for one in self.layers]
        by_weight = {layer.weight: layer for layer in layers}
        by_bias = {layer.bias: layer for layer in layers if layer.bias}
        facts = tuple(
            Facts(name, shape, layer=by_weight.get(name), bias_of=by_bias.get(name), in_base=True)
            for name, shape in self.tensors()
        )
        return Unit(self.names, self.kind, facts)


class BaseRecord(_Frozen):
    """The model that all differences are taken from.

    Attributes:
        model: where it was found: a folder, or ``org/name@revision``.
        revision: the commit of a Hub reference.
        manifest_sha256: of its weights; this is what another copy is held against.
        model_type: its architecture.
    """

    model: str
    revision: str | None = None
    manifest_sha256: str
    model_type: str | None = None


class StatisticsRecord(_Frozen):
    """Which statistics a contributor came with."""

    file: str | None = None
    sha256: str
    examples: int
    tokens: int
    label: str = ""


class LedgerMember(_Frozen):
    """A contributor.

    Attributes:
        name: what to call it.
        model: where it was found.
        revision: the commit of a Hub reference.
        manifest_sha256: of its weights.
        coefficient: its weight in the merge.
        statistics: where the method needs any.
        dtypes: storage dtype of its tensors, by the base's names, where it is not the base's.
        labels: of its head, where it names them and the head is in the ledger.
    """

    name: str
    model: str
    revision: str | None = None
    manifest_sha256: str
    coefficient: float = Field(allow_inf_nan=False)
    statistics: StatisticsRecord | None = None
    dtypes: dict[str, str] = Field(default_factory=dict)
    labels: tuple[str, ...] = ()


class LedgerRecord(_Frozen):
    """All that ``ledger.json`` holds.

    Attributes:
        format: of ledger and sums.
        base: the reference of all differences.
        method: whose sums these are.
        options: of the method, all of them.
        exclude: name patterns of tensors that are averaged instead.
        keep_separate: name patterns of tensors that are no part of the ledger.
        contributors: in the order in which they joined.
        parts: what sums are kept; settled by the first contributor, empty before.
        generation: how often the ledger has changed.
        file: of the sums; None while there is no contributor.
        sums: hash of each tensor in it.
    """

    format: int = Field(default=FORMAT, ge=1)
    base: BaseRecord
    method: str
    options: dict[str, Any]
    exclude: tuple[str, ...] = ()
    keep_separate: tuple[str, ...] = ()
    contributors: tuple[LedgerMember, ...] = ()
    parts: tuple[LedgerPart, ...] = ()
    generation: NonNegativeInt = 0
    file: str | None = Field(default=None, pattern=r"^sums-[0-9]{6,}\.safetensors$")
    sums: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sums_of_contributors(self) -> LedgerRecord:
        if self.file is None and (self.contributors or self.sums):
            raise ValueError("contributors have sums, and sums lie in a file")
        names = [name for part in self.parts for name in part.names]
        if len(set(names)) < len(names):
            raise ValueError("a tensor is in one part alone")
        return self

    @property
    def total(self) -> float:
        """The sum of the coefficients, rounded once."""
        return math.fsum(entry.coefficient for entry in self.contributors)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors are merged how."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            by_method = part.treatment in ("gram", "diagonal")
            counts[part.kind if by_method else part.treatment] += len(part.names)
        return dict(counts)

    def purpose(self) -> dict[str, Any]:
        """What two ledgers must share so that their sums can be added."""
        return {
            "base": self.base.manifest_sha256,
            "method": self.method,
            "options": self.options,
            "exclude": list(self.exclude),
            "keep_separate": list(self.keep_separate),
        }

    @cached_property
    def numbers(self) -> dict[tuple[str, ...], int]:
        """The number of each part, by the names of its tensors."""
        return {part.names: number for number, part in enumerate(self.parts)}

    def steps(self) -> tuple[Step, ...]:
        """The parts as steps of a plan."""
        return tuple(step_of(part, self.method, self.options) for part in self.parts)

    def make_method(self, **options: Any) -> LeastSquares:
        """The method, with its options or others."""
        method = SUMMED[self.method]
        return method.configured(method.options_type.model_validate({**self.options, **options}))


def step_of(part: LedgerPart, method: str, options: Mapping[str, Any]) -> Step:
    """A part as a step of a plan, whose sums stand for all contributors."""
    used = part.treatment if part.treatment in (AVERAGE, COPY) else method
    return Step(part.unit(), used, (), (), options if used == method else {}, reason=part.reason)


def dump(record: LedgerRecord) -> bytes:
    """The contents of ``ledger.json``."""
    fields = record.model_copy(update={"format": FORMAT}).model_dump(mode="json")
    return (json.dumps({**fields, "sha256": _digest(fields)}, indent=1, ensure_ascii=False) + "\n").encode()


def load(folder: Path) -> LedgerRecord:
    """What the ledger in ``folder`` says of itself.

    Raises:
        LedgerError: there is none, it is of a newer format, damaged or edited.
    """
    path = folder / FILE_NAME
    fields = read_json(path)
    if fields is None:
        raise LedgerError("there is no ledger here", where=folder, mend="merganser ledger init DIR --base MODEL")
    if isinstance(fields.get("format"), int) and fields["format"] > FORMAT:
        raise LedgerError(
            f"a ledger of format {fields['format']}, this version reads up to {FORMAT}",
            where=path,
            mend="update merganser",
        )
    stated = fields.pop("sha256", None)
    try:
        record = LedgerRecord.model_validate(fields)
        record.make_method()
        sound = stated == _digest(fields)
    except (ValidationError, KeyError):
        sound = False
    if not sound:
        raise LedgerError(
            "the ledger is damaged or was edited: it does not have the hash it states", where=path, mend=RESTORE
        )
    return record


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
