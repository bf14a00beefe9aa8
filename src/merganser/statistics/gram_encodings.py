"""The encodings in which a file holds a Gram matrix, and how each becomes the dense matrix that a merge uses.

``gram``        ``gram.<input>`` float32, the packed upper triangle of G (protocol 1)
``covariance``  ``covariance.<input>`` bfloat16, the packed upper triangle of C = G − m mᵀ; ``scale.<input>``, one
                float32 number s; ``diagonal.<input>`` float32, the diagonal of G (protocol 2)
``factor``      ``factor.<input>`` bfloat16 (r, d), rows F of C ≈ Fᵀ F + a diagonal; ``diagonal.<input>`` likewise
                (protocol 2)

with ``mean.<input>`` m beside each. Off the diagonal, G is m mᵀ + s·C or m mᵀ + FᵀF; on it, what ``diagonal`` says, to
the bit. The mean is taken out before anything is rounded or cut, because a merge that solves biases needs more than
a positive semi-definite G: the Gram matrix of the inputs and a 1, [[G, m], [mᵀ, 1]], is that only if G − m mᵀ is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from merganser.checkpoints import TensorInfo
from merganser.checkpoints.writer import TensorSpec
from merganser.tensors import mirror_upper, packed_width, unpack_upper

GramEncoding = Literal["gram", "covariance", "factor"]

#: The tensors of each encoding beside the mean; the first one tells the encoding and the width.
TENSORS_OF: dict[GramEncoding, tuple[str, ...]] = {
    "gram": ("gram",),
    "covariance": ("covariance", "diagonal", "scale"),
    "factor": ("factor", "diagonal"),
}
#: Dtypes of a tensor by the first word of its name: of protocol 1, and what protocol 2 takes beside.
DTYPES_OF: dict[str, tuple[str, ...]] = {
    "count": ("I64",),
    "gram": ("F32",),
    "mean": ("F32",),
    "fisher": ("F32", "BF16"),
    "covariance": ("BF16",),
    "diagonal": ("F32",),
    "scale": ("F32",),
    "factor": ("BF16",),
}
_NEW = ("covariance", "diagonal", "scale", "factor")  # in protocol 2
#: A factor of few bytes stands for a dense matrix of any width. No published layer has as many inputs as this, and
#: the dense float32 matrix of one input then takes at most 16 GiB.
WIDEST = 2**16


def spec_of(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """A tensor to be written, in the first dtype that its kind may have."""
    return TensorSpec(name, DTYPES_OF[name.partition(".")[0]][0], shape)


def gram_specs(encoding: GramEncoding, input: str, width: int, rank: int = 0) -> list[TensorSpec]:
    """The tensors that hold an input's Gram matrix (width, width) and mean."""
    triangle, vector = (width * (width + 1) // 2,), (width,)
    shapes: dict[str, tuple[int, ...]] = {
        "gram": triangle, "covariance": triangle, "diagonal": vector, "scale": (1,), "factor": (rank, width),
        "mean": vector,
    }  # fmt: skip
    return [spec_of(f"{kind}.{input}", shapes[kind]) for kind in (*TENSORS_OF[encoding], "mean")]


def encoding_of(tensors: Mapping[str, TensorInfo], input: str) -> GramEncoding:
    """How the file holds the Gram matrix of an input; ``gram`` where it holds none."""
    for encoding in ("factor", "covariance"):
        if f"{encoding}.{input}" in tensors:
            return encoding
    return "gram"


def layer_tensors(tensors: Mapping[str, TensorInfo], input: str | None, module: str) -> tuple[str, ...]:
    """Names of a layer's tensors, by its input's key, or for an embedding (no input) by its module."""
    if input is None:
        return (f"count.{module}",)
    return (*(f"{part}.{input}" for part in TENSORS_OF[encoding_of(tensors, input)]), f"mean.{input}")


def width_of(info: TensorInfo) -> int:
    """The number of inputs (or rows of an embedding) that a layer's first tensor is for.

    Raises:
        ValueError: a packed triangle of a length that is none.
    """
    if info.name.startswith(("gram.", "covariance.")):
        return packed_width(info.shape[0])
    return info.shape[-1]


def protocol_of(tensors: Mapping[str, TensorInfo]) -> int:
    """The oldest protocol that has all of these tensors."""
    new = any(n.startswith(tuple(f"{part}." for part in _NEW)) or t.dtype == "BF16" for n, t in tensors.items())
    return 2 if new else 1


def shape_problems(name: str, tensors: Mapping[str, TensorInfo], protocol: int) -> Iterator[str]:
    """What is wrong with a tensor's dtype and shape, from the header alone."""
    info, (kind, _, key) = tensors[name], name.partition(".")
    mean = tensors.get(f"mean.{key}")
    wanted = DTYPES_OF.get(kind, ("F32",))
    if protocol < protocol_of({name: info}):
        yield f"{name} is {info.dtype}, which protocol {protocol} does not have"
    elif info.dtype not in wanted:
        yield f"{name} is {info.dtype}, it should be {' or '.join(wanted)}"
    if 0 in info.shape:
        yield f"{name} is empty, shape {list(info.shape)}"
    elif kind == "factor":
        yield from _factor_shape(info, mean)
    elif kind in ("gram", "covariance"):
        yield from _triangle_shape(info, mean)
    elif kind == "scale" and info.shape != (1,):
        yield f"{name} has the shape {list(info.shape)}, it should be one number"
    elif kind in ("mean", "count", "diagonal") and len(info.shape) != 1:
        yield f"{name} has the shape {list(info.shape)}, it should be a vector"
    elif kind == "diagonal":
        yield from _width_problems(info, mean)


def _triangle_shape(info: TensorInfo, mean: TensorInfo | None) -> Iterator[str]:
    if len(info.shape) != 1:
        yield (
            f"{info.name} has the shape {list(info.shape)}: only packed upper triangles are accepted, "
            "because a full matrix need not be symmetric"
        )
        return
    try:
        width_of(info)
    except ValueError:
        yield f"{info.name} has {info.shape[0]} numbers, which is no triangle d·(d+1)/2"
        return
    yield from _width_problems(info, mean)


def _factor_shape(info: TensorInfo, mean: TensorInfo | None) -> Iterator[str]:
    if len(info.shape) != 2 or info.shape[0] > info.shape[1]:
        yield f"{info.name} has the shape {list(info.shape)}, it should be rank × width"
        return
    width = info.shape[1]
    if width > WIDEST:
        yield (
            f"{info.name} is of width {width}, whose dense matrix would take {4 * width**2 / 1e9:,.0f} GB; "
            f"at most {WIDEST} is accepted"
        )
    yield from _width_problems(info, mean)


def _width_problems(info: TensorInfo, mean: TensorInfo | None) -> Iterator[str]:
    if mean is not None and mean.shape != (width_of(info),):
        yield f"{info.name} is of width {width_of(info)}, its mean has the shape {list(mean.shape)}"


def dense_gram(encoding: GramEncoding, input: str, read: Callable[[str], Tensor]) -> Tensor:
    """(d, d) float32: the Gram matrix of an input, symmetric to the bit.

    Args:
        encoding: how it is held.
        input: its key.
        read: reads a tensor by its name.
    """
    if encoding == "gram":
        return unpack_upper(read(f"gram.{input}"))
    mean = read(f"mean.{input}")
    if encoding == "factor":
        factor = read(f"factor.{input}").to(torch.float32)
        matrix = factor.T @ factor
    else:
        matrix = unpack_upper(read(f"covariance.{input}")).to(torch.float32).mul_(read(f"scale.{input}"))
    matrix.addr_(mean, mean).diagonal().copy_(read(f"diagonal.{input}"))
    return mirror_upper(matrix)


def variances_of(diagonal: Tensor, mean: Tensor) -> Tensor:
    """(d,) float64: the variances, which the squares of a factor must leave room for; exact but for one rounding."""
    wide = mean.to(torch.float64)
    return diagonal.to(torch.float64) - wide * wide
