"""The statistics file: what a data owner publishes beside a checkpoint. Never text, never labels.

A safetensors file whose metadata key ``merganser`` holds a :class:`StatisticsHeader` as JSON. Tensors:

``gram.<input>``      float32, packed upper triangle (d·(d+1)/2,) of the mean of x xᵀ over real tokens; or, from
                      protocol 2 on, in fewer bytes: see :mod:`merganser.statistics.gram_encodings`
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
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from merganser.errors import StatisticsError

FILE_NAME = "merge_statistics.safetensors"
PROTOCOL = 3  # the newest; a file is of the oldest protocol that has all of its tensors
METADATA_KEY = "merganser"
MAX_METADATA = 32 * 2**20  # bytes of header JSON; a thousand layers need a few hundred thousand
AGAIN = "collect the statistics again, or download the file again"

HashKind = Literal["sha256", "blake3"]
FisherKind = Literal["expected", "empirical", "predicted"]

#: Notes of multi-label files, which say whether the information is of annotated labels alone.
FISHER_OF_ANNOTATED = "Fisher information counts only the labels that are annotated"
FISHER_OF_ALL = "Fisher information counts every output: no labels were read that say which are annotated"


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
        hash_kind: of the hashes of weights: sha256 up to protocol 2; blake3, which merging needs anyway, from 3 on.
        manifest_hash: of the whole checkpoint, see :meth:`merganser.checkpoints.Checkpoint.manifest_hash`.
        tensor_hashes: of every on-disk weight tensor. In files, both names end in the kind, as in ``tensor_blake3``.
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
    hash_kind: HashKind = "sha256"
    manifest_hash: str
    tensor_hashes: dict[str, str]
    examples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    masking: str
    dtype: str = "float32"
    fisher: FisherKind | None = None
    fisher_examples: int = Field(0, ge=0)
    versions: dict[str, str] = Field(default_factory=dict)
    label: str = ""
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_kind(cls, values: Any) -> Any:
        """The names that files have, which say the kind."""
        kind = next((k for k in get_args(HashKind) if isinstance(values, dict) and f"tensor_{k}" in values), None)
        if kind is None:
            return values
        found = {k: v for k, v in values.items() if k not in (f"tensor_{kind}", f"manifest_{kind}")}
        named = {"tensor_hashes": values[f"tensor_{kind}"], "manifest_hash": values.get(f"manifest_{kind}")}
        return {**found, **named, "hash_kind": kind}

    @model_serializer(mode="wrap")
    def _write_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        kind = values.pop("hash_kind")
        hashes, manifest = values.pop("tensor_hashes"), values.pop("manifest_hash")
        return {**values, f"tensor_{kind}": hashes, f"manifest_{kind}": manifest}

    def protocol_with(self, tensors: int) -> int:
        """The oldest protocol that has this header, where its tensors need at least the protocol ``tensors``."""
        return 3 if self.hash_kind == "blake3" else tensors


def parse_header(text: str, file: Path) -> StatisticsHeader:
    """The header of a file, from its JSON.

    Raises:
        StatisticsError: no such header, or one of a newer protocol.
    """
    if len(text) > MAX_METADATA:
        raise StatisticsError(f"a header of {len(text)} characters is too long", where=file, mend=AGAIN)
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"the header is no JSON: {error}", where=file, mend=AGAIN) from None
    protocol = fields.get("protocol") if isinstance(fields, dict) else None
    if type(protocol) is not int or protocol < 1:
        raise StatisticsError(f"the header has no valid protocol number ({protocol!r})", where=file, mend=AGAIN)
    if protocol > PROTOCOL:
        what = f"written by protocol {protocol}; this version of merganser reads up to {PROTOCOL}"
        raise StatisticsError(what, where=file, mend="upgrade merganser")
    try:
        return StatisticsHeader.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StatisticsError(f"the header's {place}: {first['msg']}", where=file, mend=AGAIN) from None
