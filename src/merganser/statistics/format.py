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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merganser.errors import StatisticsError

FILE_NAME = "merge_statistics.safetensors"
PROTOCOL = 2  # the newest; a file is of the oldest protocol that has all of its tensors
METADATA_KEY = "merganser"
MAX_METADATA = 32 * 2**20  # bytes of header JSON; a thousand layers need a few hundred thousand
AGAIN = "collect the statistics again, or download the file again"

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
