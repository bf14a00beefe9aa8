"""Weighted sums of tensors whose weights depend on the tensors' lengths and angles alone: what spheres share.

A spherical interpolation, a mean on the sphere and Model Stock all lie in the span of the contributors. So one pass
that takes the inner products is enough; what follows is arithmetic on T x T numbers, and one weighted sum.

The inner products are those of θ₁ and of the differences θᵢ − θ₁ (of task vectors: of δ₁ and the same differences).
Fine-tunes of one model are nearly parallel, and the cosine of 0.0001 is 1 but for half of the digits that a float64
number has; the differences keep the angle. Likewise the sum is written as one contributor plus differences from it,
so that merging a model with itself returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from merganser.methods.base import Needs, Options
from merganser.methods.elementwise import Elementwise, Position, Whole

#: What a tensor is taken for: one vector, or its rows or its columns each by itself.
Vectors = Literal["whole", "rows", "columns"]
#: A number, or one for each row or column.
Numbers: TypeAlias = Any

_BLOCK = 4096  # numbers that are multiplied and summed in float32: a larger sum would lose digits
_TINY, _HUGE = 1e-30, 1e30  # squares outside of these leave what float32 can sum


@dataclass(frozen=True)
class Combination:
    """R + Σ wᵢ(θᵢ − R) + excess · (R − θ₀), then drawn to θ₀; R is one of the contributors, θ₀ is 0 without a base.

    Every number may be one for each row or column.

    Attributes:
        reference: which contributor R is.
        weights: of each contributor, in their order; that of R does not count.
        excess: by how much the sum of the weights, with that of R, is more than 1.
        pull: how far the sum is then drawn to the base, from 0, not at all, to 1, the base itself.
        note: what is noteworthy.
    """

    reference: int
    weights: Sequence[Numbers]
    excess: Numbers = 0.0
    pull: Numbers = 0.0
    note: str | None = None


#: Of the inner products (T, T) or (T, T, vectors) of the first and of the differences from it, the coefficients and the
#: options: how the contributors are put together.
Weigh = Callable[[np.ndarray, Sequence[float], Any], Combination]


def spanned(
    *,
    weigh: Weigh,
    needs: Needs,
    options: Options,
    vectors: Callable[[Any], Vectors] = lambda options: "whole",
    **words: str,
) -> Elementwise:
    """A method of this family.

    Args:
        weigh: how the contributors are put together; with one contributor it is not asked.
        needs: of the method; with a base, the inner products are those of task vectors.
        options: of the method.
        vectors: what a tensor is taken for, by the options.
        words: name, title, summary, formula and reference.
    """

    def reduce(whole: Whole, coefficients: Sequence[float], options: Any) -> Combination | None:
        taken = _taken(vectors(options), len(whole.shape))
        if taken == "rows" or len(coefficients) < 2:
            return None
        return weigh(_gram_of_whole(whole, columns=taken == "columns"), coefficients, options)

    def function(
        base: Tensor | None, tensors: Iterator[Tensor], coefficients: Sequence[float], options: Any, position: Position
    ) -> Tensor:
        given = list(tensors)
        if len(given) < 2:
            return given[0]
        taken, combination = _taken(vectors(options), given[0].dim()), position.whole
        if combination is None:
            combination = weigh(_gram_of_rows(given, base), coefficients, options)
        if combination.note:
            position.notes.append(combination.note)
        return combined(given, base, combination, taken)

    # A tensor of one dimension is one row; other rows are as many as come.
    return Elementwise(
        **words, needs=needs, options=options, function=function, reduce=reduce, by_rows=True, differences=False
    )


def combined(tensors: Sequence[Tensor], base: Tensor | None, combination: Combination, vectors: Vectors) -> Tensor:
    """A weighted sum of tensors, which are used up."""
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    given = [tensor.to(dtype) for tensor in tensors]
    shape, device = given[0].shape, given[0].device

    def factor(numbers: Numbers) -> float | Tensor:
        if np.ndim(numbers) == 0:
            return float(numbers)
        along = (-1, *[1] * (len(shape) - 1)) if vectors == "rows" else (1, *shape[1:])
        return torch.from_numpy(np.asarray(numbers)).to(device, dtype).reshape(along)

    reference = given[combination.reference]
    shift: Tensor | None = None
    for number, (tensor, weight) in enumerate(zip(given, combination.weights, strict=True)):
        if number != combination.reference:
            difference = tensor.sub_(reference)
            shift = difference.mul_(factor(weight)) if shift is None else _add(shift, difference, factor(weight))
    if shift is None:
        raise ValueError("a combination is of two contributors or more")
    if np.any(combination.excess):
        _add(shift, reference if base is None else reference - base, factor(combination.excess))
    total = reference.add_(shift)
    if base is not None and np.any(combination.pull):
        pull = factor(combination.pull)
        total = torch.lerp(total, base.to(dtype), pull)
    return total


def _add(total: Tensor, tensor: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, float):
        return total.add_(tensor, alpha=factor)
    return total.addcmul_(tensor, factor)


def _taken(vectors: Vectors, dimensions: int) -> Vectors:
    """What a tensor of so many dimensions is taken for: of less than two, it is one vector."""
    return vectors if dimensions > 1 else "whole"


def _gram_of_whole(whole: Whole, *, columns: bool) -> np.ndarray:
    """Inner products of whole tensors (T, T), or of each of their columns (T, T, columns), in float64.

    They are summed piece by piece, in an order that depends on nothing but the tensor's shape.
    """
    total: Tensor | float = 0.0
    for start, stop in whole.pieces():
        base = whole.base(start, stop) if whole.with_base else None
        basis = _basis(whole.deltas(start, stop), base)
        total = total + (_products(basis.flatten(2), 1) if columns else _blocked(basis.reshape(len(basis), -1)))
    return torch.as_tensor(total).cpu().numpy()


def _gram_of_rows(tensors: Sequence[Tensor], base: Tensor | None) -> np.ndarray:
    """Inner products of each row (T, T, rows) in float64."""
    return _products(_basis(tensors, base).flatten(2), 2).cpu().numpy()


def _basis(tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """The first tensor, less the base, and what the others are more than the first: (T, …)."""
    first, *others = tensors
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    basis = torch.empty((len(tensors), *first.shape), dtype=dtype, device=first.device)
    if base is None:
        basis[0] = first
    else:
        torch.sub(first, base, out=basis[0])
    for number, other in enumerate(others, start=1):
        torch.sub(other, first, out=basis[number])
    return basis


def _blocked(basis: Tensor) -> Tensor:
    """basis @ basis.T of (T, n), summed in float32 over blocks and in float64 over these."""
    count, size = basis.shape
    even = size // _BLOCK * _BLOCK
    blocks = basis[:, :even].reshape(count, -1, _BLOCK).transpose(0, 1)
    found = torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64)
    rest = basis[:, even:]
    found += rest @ rest.T
    squares = found.diagonal()
    doubtful = ~((squares > _TINY) & (squares < _HUGE))
    if basis.dtype == torch.float32 and bool(basis[doubtful].any()):
        return _blocked(basis.to(torch.float64))
    return found


def _products(basis: Tensor, axis: int) -> Tensor:
    """Inner products of the vectors that lie along an axis of (T, rows, columns): (T, T, the other axis)."""
    count = len(basis)
    found = basis.new_empty((count, count, basis.shape[3 - axis]), dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1):
            found[i, j] = found[j, i] = (basis[i].to(torch.float64) * basis[j]).sum(axis - 1)
    return found
