"""The statistics file: what a data owner publishes beside a checkpoint. Never text, never labels.

A safetensors file whose metadata key ``merganser`` holds a :class:`StatisticsHeader` as JSON. Tensors:

``gram.<input>``      float32, packed upper triangle (d·(d+1)/2,) of the mean of x xᵀ over real tokens; or, from
                      protocol 2 on, in fewer bytes: see :mod:`merganser.statistics.gram_encodings`
``mean.<input>``      float32 (d,), the mean of x
``count.<module>``    int64 (vocabulary,), how often an embedding looked up each row for a real token
``fisher.<tensor>``   float32 (from protocol 2 on, or bfloat16), diagonal Fisher information of the on-disk tensor,
                      mean over examples

From protocol 5 on, ``gram.<output>`` and ``mean.<output>`` in the same encodings are those of the gradients g of the
log-likelihood with respect to a layer's outputs (K-FAC): the mean of g gᵀ over real tokens, and zeros.

A file from a stranger is data: sizes are checked against the file before anything is allocated, values
before use. A Gram matrix is built from activations of private text and can leak; hashes prove origin,
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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

from merganser.checkpoints import Checkpoint, TensorInfo
from merganser.documents import parse_json
from merganser.errors import StatisticsError
from merganser.statistics.gram_encodings import layer_tensors, shape_problems, width_of

FILE_NAME = "merge_statistics.safetensors"
PROTOCOL = 5  # the newest; a file is of the oldest protocol that has all of its tensors
METADATA_KEY = "merganser"
MAX_METADATA = 32 * 2**20  # bytes of header JSON; a thousand layers need a few hundred thousand
AGAIN = "collect the statistics again, or download the file again"

HashKind = Literal["sha256", "blake3"]
FisherKind = Literal["expected", "empirical", "predicted"]
KfacKind = Literal["expected", "sampled", "empirical"]

#: Notes of multi-label files, which say whether the information is of annotated labels alone.
FISHER_OF_ANNOTATED = "Fisher information counts only the labels that are annotated"
FISHER_OF_ALL = "Fisher information counts every output: no labels were read that say which are annotated"


class LayerStatistics(BaseModel):
    """What the file knows of one layer.

    Attributes:
        module: the layer's name in the model.
        kind: ``linear``, ``conv1d``, ``embedding``, or, from protocol 4 on, ``convolution``, whose input are the
            patches under its kernel, in the order of ``weight.flatten(1)``.
        weight: on-disk name of its weight.
        bias: on-disk name of its bias, if it has one.
        input: key of ``gram.`` and ``mean.``; layers with the same key share their input. None for an
            embedding, whose counts are ``count.<module>``.
        rows: how many token rows were counted.
        tied: another layer uses the same on-disk weight.
        expert: which matrix of a stack of them the on-disk weight has here, from protocol 4 on; None where the weight
            is one matrix, or the statistics hold for all of them.
        output: key of ``gram.`` and ``mean.`` of the gradients of its outputs, from protocol 5 on; None where there are
            none.
        output_rows: how many token rows these are of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    kind: Literal["linear", "conv1d", "embedding", "convolution"]
    weight: str
    bias: str | None = None
    input: str | None = None
    rows: int = Field(ge=0)
    tied: bool = False
    expert: int | None = Field(None, ge=0)
    output: str | None = None
    output_rows: int = Field(default=0, ge=0)

    @model_serializer(mode="wrap")
    def _leave_out_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Older protocols know no experts and no gradients of outputs."""
        new = {"expert": None, "output": None, "output_rows": 0}
        return {key: value for key, value in handler(self).items() if key not in new or value != new[key]}

    @property
    def gram_rows(self) -> dict[str, int]:
        """The keys of its Gram matrices, of inputs and of gradients, and how many rows each is the mean of."""
        return {key: n for key, n in ((self.input, self.rows), (self.output, self.output_rows)) if key is not None}

    @property
    def without_rows(self) -> LayerStatistics:
        """The same layer, whatever was counted."""
        return self.model_copy(update={"rows": 0, "output_rows": 0})


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
        kfac: whose labels the gradients of outputs are of, None where there are none.
        kfac_examples: how many examples they are of.
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
    fisher_examples: int = Field(default=0, ge=0)
    kfac: KfacKind | None = None
    kfac_examples: int = Field(default=0, ge=0)
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
        if self.kfac is None:  # which older protocols do not know
            del values["kfac"], values["kfac_examples"]
        return {**values, f"tensor_{kind}": hashes, f"manifest_{kind}": manifest}

    def protocol_with(self, tensors: int) -> int:
        """The oldest protocol that has this header, where its tensors need at least the protocol ``tensors``."""
        if self.kfac is not None or any(layer.output is not None for layer in self.layers):
            return 5
        if any(layer.kind == "convolution" or layer.expert is not None for layer in self.layers):
            return 4
        return 3 if self.hash_kind == "blake3" else tensors


def parse_header(text: str, file: Path) -> StatisticsHeader:
    """The header of a file, from its JSON.

    Raises:
        StatisticsError: no such header, or one of a newer protocol.
    """
    if len(text) > MAX_METADATA:
        raise StatisticsError(f"a header of {len(text)} characters is too long", where=file, mend=AGAIN)
    fields = parse_json(text, file, StatisticsError, mend=AGAIN)
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


MOST_NAMED = 10  # problems of one sort that are spelt out


def layout_problems(header: StatisticsHeader, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What header and tensor names, dtypes and shapes say against each other."""
    if header.hash_kind == "blake3" and header.protocol < 3:
        yield f"protocol {header.protocol} knows weights by sha256, this header by blake3"
    needed_protocol = header.protocol_with(1)
    if header.protocol < 5 == needed_protocol:
        yield f"protocol {header.protocol} knows no gradients of outputs, which this header has"
    elif header.protocol < 4 == needed_protocol:
        yield f"protocol {header.protocol} knows no convolutions and no experts, which this header has"
    needed = {name for layer in header.layers for name in layer_tensors(tensors, layer.input, layer.module)}
    outputs = {layer.output for layer in header.layers if layer.output is not None}
    needed |= {name for output in outputs for name in layer_tensors(tensors, output, output)}
    for name in sorted(needed - set(tensors)):
        yield f"{name} is missing"
    for name in sorted(set(tensors) - needed):
        if not name.startswith("fisher."):
            yield f"{name} belongs to no layer of the header"
        elif name.removeprefix("fisher.") not in header.tensor_hashes:
            yield f"{name} is of a tensor that the header does not know"
    for layer in header.layers:
        if layer.weight not in header.tensor_hashes:
            yield f"layer {layer.module}: the header has no hash of {layer.weight}"
        if (layer.kind == "embedding") != (layer.input is None):
            yield f"layer {layer.module}: an embedding has counts, any other layer an input"
        if layer.rows < 1:
            yield f"layer {layer.module}: statistics of no rows"
        if layer.output is not None and (layer.input is None or layer.output_rows < 1 or ":" not in layer.output):
            yield f"layer {layer.module}: gradients of outputs need an input, rows and a key of their own"
    if bool(outputs) != (header.kfac is not None and header.kfac_examples > 0):
        yield "the layers and the header disagree on whether there are gradients of outputs"
    has_fisher = any(name.startswith("fisher.") for name in tensors)
    if has_fisher != (header.fisher is not None and header.fisher_examples > 0):
        yield "the header and the tensors disagree on whether there is Fisher information"
    for name in tensors:
        yield from shape_problems(name, tensors, header.protocol)


def binding_problems(
    header: StatisticsHeader, tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, *, read: bool = True
) -> Iterator[str]:
    """How the statistics are not of these weights: absent, another hash (one tensor stands for all), misshapen.

    Args:
        read: the weights, for their hashes; without that, headers alone are compared.
    """
    kind, hashes = header.hash_kind, header.tensor_hashes.items()
    found = [_other_weight(name, known if read else None, kind, checkpoint) for name, known in hashes]
    texts = [text for text in found if text]
    if texts:
        rest = f"; {len(texts) - 1} more like it" if len(texts) > 1 else ""
        yield f"statistics of other weights: {texts[0]}{rest}"
        return
    if read and (ours := checkpoint.manifest_hash(kind)) != header.manifest_hash:
        yield (
            f"statistics of other weights: the manifest of {checkpoint.name} has {kind} {ours}, "
            f"the statistics were computed from {header.manifest_hash}"
        )
    yield from _misshapen(header, tensors, checkpoint)


def _other_weight(name: str, theirs: str | None, kind: str, checkpoint: Checkpoint) -> str | None:
    """What shows that a checkpoint does not have a tensor that statistics are of; without a hash, its name alone."""
    if name not in checkpoint.tensors:
        return f"{checkpoint.name} has no tensor {name}"
    if theirs is None or (ours := checkpoint.hash(name, kind)) == theirs:
        return None
    return f"tensor {name} of {checkpoint.name} has {kind} {ours}, the statistics were computed from {theirs}"


def _misshapen(header: StatisticsHeader, tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint) -> Iterator[str]:
    for layer in header.layers:
        shape = checkpoint.tensors[layer.weight].shape
        name = layer_tensors(tensors, layer.input, layer.module)[0]
        width = width_of(tensors[name])
        if width != _width(layer, shape):
            yield f"{name} is of width {width}, which does not fit {layer.weight} {list(shape)}"
        elif layer.output is not None and _height_of(layer, tensors) != _height(layer, shape):
            found = _height_of(layer, tensors)
            yield f"{layer.output} is of width {found}, which does not fit the outputs of {layer.weight} {list(shape)}"
        elif layer.expert is not None and (len(shape) != 3 or layer.expert >= shape[0]):
            yield f"{name} is of expert {layer.expert}, which {layer.weight} {list(shape)} does not have"
    for name, info in tensors.items():
        if name.startswith("fisher."):
            shape = checkpoint.tensors[name.removeprefix("fisher.")].shape
            if info.shape != shape:
                yield f"{name} has the shape {list(info.shape)}, the tensor has {list(shape)}"


def _width(layer: LayerStatistics, shape: tuple[int, ...]) -> int | None:
    """The number of inputs (or rows of an embedding) of an on-disk weight; None where it has not the layer's shape."""
    if layer.kind == "convolution":
        return math.prod(shape[1:]) if len(shape) > 2 else None
    if len(shape) not in (2, 2 if layer.kind == "embedding" else 3):
        return None
    return shape[-1] if layer.kind == "linear" else shape[-2]


def _height_of(layer: LayerStatistics, tensors: Mapping[str, TensorInfo]) -> int:
    return width_of(tensors[layer_tensors(tensors, layer.output, layer.module)[0]])


def _height(layer: LayerStatistics, shape: tuple[int, ...]) -> int | None:
    """The number of outputs of an on-disk weight that is one matrix; None for any other."""
    if len(shape) != 2:
        return None
    return shape[-1] if layer.kind == "conv1d" else shape[0]
