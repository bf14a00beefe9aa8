"""What can be wrong with a statistics file: names and shapes, values, and the weights it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from merganser.checkpoints import Checkpoint, TensorInfo
from merganser.errors import UserError
from merganser.statistics.format import StatisticsHeader
from merganser.statistics.gram_encodings import (
    GramEncoding,
    dense_gram,
    encoding_of,
    layer_tensors,
    shape_problems,
    variances_of,
    width_of,
)
from merganser.tensors import is_finite

PSD_TOLERANCE = 1e-5  # of the trace: float32 sums of positive semi-definite terms are off by less
MOST_NAMED = 10  # problems of one sort that are spelt out


def layout_problems(header: StatisticsHeader, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What header and tensor names, dtypes and shapes say against each other."""
    if header.hash_kind == "blake3" and header.protocol < 3:
        yield f"protocol {header.protocol} knows weights by sha256, this header by blake3"
    needed = {name for layer in header.layers for name in layer_tensors(tensors, layer.input, layer.module)}
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
    has_fisher = any(name.startswith("fisher.") for name in tensors)
    if has_fisher != (header.fisher is not None and header.fisher_examples > 0):
        yield "the header and the tensors disagree on whether there is Fisher information"
    for name in tensors:
        yield from shape_problems(name, tensors, header.protocol)


def value_problems(tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> Iterator[str]:
    """Read tensor by tensor, then matrix by matrix, and say what is wrong with the values."""
    unusable = set()
    for name in sorted(tensors):
        try:
            text = number_problem(name, read(name))
        except (UserError, OSError) as error:
            text = f"{name} cannot be read: {error.what if isinstance(error, UserError) else error}"
        if text:
            unusable.add(name)
            yield text
    for key in sorted(name.removeprefix("mean.") for name in tensors if name.startswith("mean.")):
        if not unusable.intersection(layer_tensors(tensors, key, "")):
            yield from _matrix_values(encoding_of(tensors, key), key, read)


def number_problem(name: str, values: Tensor) -> str | None:
    """What is wrong with the numbers of one tensor, each looked at by itself."""
    if values.is_floating_point() and not is_finite(values):
        return f"{name} holds NaN or infinite numbers"
    if name.startswith(("count.", "fisher.", "diagonal.")) and bool((values < 0).any()):
        return f"{name} has negative numbers"
    if name.startswith("scale.") and not 0 < float(values) <= 1:
        return f"{name} is {float(values):g}, it should be above 0 and at most 1"
    return None


def _matrix_values(encoding: GramEncoding, key: str, read: Callable[[str], Tensor]) -> Iterator[str]:
    mean = read(f"mean.{key}").to(torch.float64)
    if encoding == "factor":  # FᵀF + diag(rest) needs no factorisation
        diagonal = read(f"diagonal.{key}")
        rest = variances_of(diagonal, mean) - read(f"factor.{key}").to(torch.float64).square_().sum(0)
        if bool((rest < -PSD_TOLERANCE * diagonal.to(torch.float64)).any()):
            yield f"factor.{key} is not positive semi-definite with its diagonal and mean, so it is no mean of x xᵀ"
        return
    matrix = dense_gram(encoding, key, read).to(torch.float64)
    if not is_semidefinite(matrix):
        yield f"{encoding}.{key} is not positive semi-definite, so it is no mean of x xᵀ"
    elif not is_semidefinite(matrix.addr_(mean, mean, alpha=-1), float(mean @ mean)):
        yield f"{encoding}.{key} is smaller than the square of its mean, which no set of inputs gives"


def is_semidefinite(matrix: Tensor, scale: float = 0.0) -> bool:
    """Whether a symmetric float64 (d, d) matrix is positive semi-definite, up to what float32 sums lose.

    Args:
        matrix: left as it was.
        scale: size of what was subtracted from it, whose rounding is tolerated too.
    """
    trace = float(matrix.trace())
    tolerance = PSD_TOLERANCE * (max(trace, 0.0) + scale)
    if trace < -tolerance:
        return False
    if tolerance == 0.0:
        return not bool(matrix.any())
    shifted = matrix.clone()
    shifted.diagonal().add_(tolerance)
    _, failed = torch.linalg.cholesky_ex(shifted)
    return int(failed) == 0


def binding_problems(
    header: StatisticsHeader, tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, *, read: bool = True
) -> Iterator[str]:
    """Each way in which the statistics are not of these weights: absent, misshapen, another hash.

    Args:
        read: the weights, for their hashes; without that, headers alone are compared.
    """
    kind, hashes = header.hash_kind, header.tensor_hashes.items()
    found = [_other_weight(name, known if read else None, kind, checkpoint) for name, known in hashes]
    texts = [text for text in found if text]
    more = len(texts) - MOST_NAMED
    rest = [f"{more} more tensors {'differ' if read else 'are absent'}"] if more > 0 else []
    for text in (*texts[:MOST_NAMED], *rest):
        yield f"statistics of other weights: {text}"
    if texts:
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
        if len(shape) != 2 or width != shape[1 if layer.kind == "linear" else 0]:
            yield f"{name} is of width {width}, which does not fit {layer.weight} {list(shape)}"
    for name, info in tensors.items():
        if name.startswith("fisher."):
            shape = checkpoint.tensors[name.removeprefix("fisher.")].shape
            if info.shape != shape:
                yield f"{name} has the shape {list(info.shape)}, the tensor has {list(shape)}"
