"""Whether published statistics can be what they say they are; a stranger's file is judged before it is used.

A Gram matrix G and a mean m are those of some inputs if and only if C = G − m mᵀ, the covariance, is positive
semi-definite, which implies that G is. Rounding is allowed for beside each input's own size, not beside the trace: C +
τ·diag(G) has to have a Cholesky factor, which is the same question for any scaling of the inputs. It is asked in
float32 first, which answers for sound matrices; what float32 doubts, float64 decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merganser.blas import cholesky_
from merganser.checkpoints import TensorInfo
from merganser.errors import UserError
from merganser.statistics.gram_encodings import GramEncoding, encoding_of, layer_tensors, variances_of
from merganser.tensors import is_finite, packed_width, roomy_empty, unpack_upper

Read = Callable[[str], Tensor]

#: τ: what float32 sums of many products lose, and for each input what a mean does to m mᵀ that was summed in float32:
#: where inputs hardly vary, all of its numbers are off the same way (by 3e-7 in a model of 1,312 inputs and 40 rows).
_SUMS, _MEANS = 1e-4, 2.0**-21
#: The size, beside the average input's, below which squares of an input may have become zero while products have not.
_TINY = 1e-10
_FACTOR_TOLERANCE = 1e-5  # of the diagonal: factors are stored such that they leave room for it
_WIDE = threading.Lock()  # one matrix in float64 at a time, whatever the number of threads


@dataclass(frozen=True)
class Judgement:
    """What was found of one statistic.

    Attributes:
        name: ``gram.<input>`` in whatever encoding, with its mean; ``count.<module>``; ``fisher.<tensor>``.
        problems: what is wrong with it.
        size: the mean of the Gram matrix's diagonal, or of the Fisher information; all counts together.
        sums: of its numbers, and of some of them. Other data give others.
    """

    name: str
    problems: tuple[str, ...]
    size: float = 0.0
    sums: tuple[float, float] = (0.0, 0.0)


def judged_names(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The statistics of a file, as :class:`Judgement` names them."""
    inputs = [f"gram.{name.removeprefix('mean.')}" for name in tensors if name.startswith("mean.")]
    return sorted(inputs + [name for name in tensors if name.startswith(("count.", "fisher."))])


def judge(name: str, tensors: Mapping[str, TensorInfo], read: Read) -> Judgement:
    """Read one statistic once, and say what is wrong with it.

    Args:
        name: see :class:`Judgement`.
        tensors: of the file.
        read: reads a tensor by its name.
    """
    kind, _, key = name.partition(".")
    held: dict[str, Tensor] = {}
    problems = []
    for part in layer_tensors(tensors, key, "") if kind == "gram" else (name,):
        try:
            held[part] = read(part)
        except (UserError, OSError) as error:
            problems.append(f"{part} cannot be read: {error.what if isinstance(error, UserError) else error}")
            continue
        problems += [text] if (text := number_problem(part, held[part])) else []
    if problems:
        return Judgement(name, tuple(problems))
    if kind == "gram":
        return _judge_gram(name, key, encoding_of(tensors, key), held)
    total = float(held[name].sum(dtype=torch.float64))
    if kind == "count":
        problems = [] if total else [f"{name} counts nothing"]
        return Judgement(name, tuple(problems), total, (total, _first_half(held[name])))
    return Judgement(name, (), total / held[name].numel(), (total, _first_half(held[name])))


def number_problem(name: str, values: Tensor) -> str | None:
    """What is wrong with the numbers of one tensor, each looked at by itself."""
    if values.is_floating_point() and not is_finite(values):
        return f"{name} holds NaN or infinite numbers"
    if name.startswith(("count.", "fisher.", "diagonal.")) and bool((values < 0).any()):
        return f"{name} has negative numbers"
    if name.startswith("scale.") and not 0 < float(values) <= 1:
        return f"{name} is {float(values):g}, it should be above 0 and at most 1"
    return None


def is_semidefinite(matrix: Tensor, diagonal: Tensor) -> bool:
    """Whether a symmetric (d, d) matrix is positive semi-definite, up to what float32 sums lose.

    Args:
        matrix: the upper triangle counts; used up.
        diagonal: (d,), of the Gram matrix that it was made from: the size beside which rounding is allowed for.
    """
    width = len(diagonal)
    if not bool(diagonal.any()):
        return not bool(matrix.triu().any())
    matrix.diagonal().add_(_sizes(diagonal) * (_SUMS + width * _MEANS))
    return cholesky_(matrix, upper=True)


def _sizes(diagonal: Tensor) -> Tensor:
    """(d,): the size of each input, of which rounding is a part."""
    return diagonal + _TINY * diagonal.mean()


def _judge_gram(name: str, key: str, encoding: GramEncoding, held: Mapping[str, Tensor]) -> Judgement:
    first = f"{encoding}.{key}"
    diagonal = _diagonal(encoding, key, held).to(torch.float64)
    size = float(diagonal.mean())
    sums = (float(held[first].sum(dtype=torch.float64)), float(diagonal.sum()))
    return Judgement(name, tuple(_matrix_problems(first, key, encoding, held, diagonal)), size, sums)


def _matrix_problems(
    first: str, key: str, encoding: GramEncoding, held: Mapping[str, Tensor], diagonal: Tensor
) -> Iterator[str]:
    mean = held[f"mean.{key}"]
    if bool((diagonal < 0).any()):
        yield f"{first} has negative numbers on its diagonal, so it is no mean of x xᵀ"
    elif encoding == "factor":  # FᵀF + diag(rest) needs no factorisation
        rest = variances_of(diagonal, mean) - held[first].to(torch.float64).square_().sum(0)
        if bool((rest < -_FACTOR_TOLERANCE * _sizes(diagonal)).any()):
            yield f"{first} is not positive semi-definite with its diagonal and mean, so it is no mean of x xᵀ"
    elif not is_semidefinite(_covariance(encoding, key, held, torch.float32), diagonal.to(torch.float32)):
        with _WIDE:
            if is_semidefinite(_covariance(encoding, key, held, torch.float64), diagonal):
                return
            whole = encoding == "gram" and is_semidefinite(
                _covariance(encoding, key, held, torch.float64, centred=False), diagonal
            )
        if whole:
            yield f"{first} is smaller than the square of its mean, which no set of inputs gives"
        else:
            yield f"{first} is not positive semi-definite, so it is no mean of x xᵀ"


def _diagonal(encoding: GramEncoding, key: str, held: Mapping[str, Tensor]) -> Tensor:
    """(d,): the diagonal of the Gram matrix."""
    if encoding != "gram":
        return held[f"diagonal.{key}"]
    packed = held[f"gram.{key}"]
    width = packed_width(packed.numel())
    rows = torch.arange(width)
    return packed[rows * width - rows * (rows - 1) // 2]


def _covariance(
    encoding: GramEncoding, key: str, held: Mapping[str, Tensor], dtype: torch.dtype, *, centred: bool = True
) -> Tensor:
    """(d, d): the upper triangle of C = G − m mᵀ; of G where it is not to be centred."""
    mean = held[f"mean.{key}"].to(dtype)
    if encoding == "covariance":
        matrix = unpack_upper(held[f"covariance.{key}"]).to(dtype).mul_(held[f"scale.{key}"].to(dtype))
        matrix.diagonal().copy_(variances_of(held[f"diagonal.{key}"], held[f"mean.{key}"]))
        return matrix
    packed = held[f"gram.{key}"].numpy()
    matrix = roomy_empty(len(mean), len(mean), mean)
    rows, line = matrix.numpy(), mean.numpy() if centred else np.zeros(len(mean), mean.numpy().dtype)
    start = 0
    with np.errstate(all="ignore"):  # what overflows in float32 is looked at in float64
        for row in range(len(mean)):
            np.multiply(line[row:], -line[row], out=rows[row, row:])
            rows[row, row:] += packed[start : start + len(mean) - row]
            start += len(mean) - row
    return matrix


def _first_half(values: Tensor) -> float:
    """The sum of the first half of the numbers."""
    return float(values.flatten()[: values.numel() // 2].sum(dtype=torch.float64))
