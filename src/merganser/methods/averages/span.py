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

from merganser.methods.base import Needs, Options, wide
from merganser.methods.elementwise import Elementwise, Position, Whole

#: What a tensor is taken for: one vector, or its rows or its columns each by itself.
Vectors = Literal["whole", "rows", "columns"]
#: A number, or one for each row or column.
Numbers: TypeAlias = Any

_BLOCK = 4096  # numbers that are multiplied and summed in float32: a larger sum would lose digits
_ROOM, _LEAST = 1 << 20, 1 << 18  # numbers of all tensors, and of each, at once: about what a core's cache holds
_TINY, _HUGE = 1e-30, 1e30  # squares outside of these leave what float32 can sum
_SHORT, _OPPOSITE = 1e-4, 0.99  # squares of lengths, relative, and cosines for which differences do not serve
_NOTHING = 1e-6  # of the longest: what is shorter has no direction that numbers tell


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
    **words: Any,
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
            return wide(given[0])
        taken, combination = _taken(vectors(options), given[0].dim()), position.whole
        if combination is None:
            combination = weigh(_gram_of_rows(given, base, len(given[0])), coefficients, options)
        if combination.note:
            position.notes.append(combination.note)
        return combined(given, base, combination, taken)

    # A tensor of one dimension is one row; other rows are as many as come.
    return Elementwise(
        **words, needs=needs, options=options, function=function, reduce=reduce, by_rows=True, differences=False
    )


def combined(tensors: Sequence[Tensor], base: Tensor | None, combination: Combination, vectors: Vectors) -> Tensor:
    """A weighted sum of tensors as they are stored, which are used up."""
    dtype = _widest(tensors)
    if vectors != "columns" and _compiles(tensors, base):
        return _combined_by_rows(tensors, base, combination, len(tensors[0]) if vectors == "rows" else 1)
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


def _compiles(tensors: Sequence[Tensor], base: Tensor | None) -> bool:
    """Whether compiled loops can work on these."""
    return tensors[0].device.type == "cpu" and _widest([*tensors, *([] if base is None else [base])]) == torch.float32


def _alike(tensors: Sequence[Tensor], height: int) -> list[np.ndarray]:
    """(rows, n) of each tensor, in place: as uint16 where all are bfloat16, else as float32."""
    if all(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return [tensor.contiguous().view(torch.uint16).numpy().reshape(height, -1) for tensor in tensors]
    return [wide(tensor).contiguous().numpy().reshape(height, -1) for tensor in tensors]


def _of_base(base: Tensor | None, height: int) -> np.ndarray:
    """(rows, n), or empty without one."""
    return np.empty((0, 0), dtype=np.float32) if base is None else base.contiguous().numpy().reshape(height, -1)


def _places(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(T,): their addresses, which hold while the arrays live."""
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


def _combined_by_rows(tensors: Sequence[Tensor], base: Tensor | None, combination: Combination, height: int) -> Tensor:
    from merganser.methods import kernels

    numbers = [np.broadcast_to(one, height) for one in (*combination.weights, combination.excess, combination.pull)]
    *weights, excess, pull = (one.astype(np.float32) for one in numbers)
    given, factors = _alike(tensors, height), (np.stack(weights, 1), excess, pull)
    total = kernels.combine(given[0], _places(given), _of_base(base, height), combination.reference, *factors)
    return torch.from_numpy(total).reshape(tensors[0].shape)


def lengths(gram: np.ndarray) -> np.ndarray:
    """The contributors' lengths (T,) or (T, vectors); 0 for those beside the longest of which there is nothing.

    Args:
        gram: (T, T) or (T, T, vectors), inner products of the first and of the differences from it.
    """
    squares = np.stack([gram[0, 0], *(gram[0, 0] + 2 * gram[0, i] + gram[i, i] for i in range(1, len(gram)))])
    found = np.sqrt(np.maximum(squares, 0.0))
    return np.where(found > _NOTHING * found.max(0), found, 0.0)


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
    total: np.ndarray | float = 0.0
    for start, stop in whole.pieces():
        base = whole.base(start, stop) if whole.with_base else None
        tensors = list(whole.stored(start, stop))
        total = total + (_gram_of_columns(tensors, base) if columns else _gram_of_rows(tensors, base, 1)[..., 0])
    return np.asarray(total)


def _gram_of_columns(tensors: Sequence[Tensor], base: Tensor | None) -> np.ndarray:
    """Inner products of each column (T, T, columns) in float64."""
    first, *others = (tensor.flatten(1).to(torch.float64) for tensor in tensors)
    basis = [first if base is None else first - base.flatten(1), *(other - first for other in others)]
    return np.array([[(one * two).sum(0).cpu().numpy() for two in basis] for one in basis])


def _gram_of_rows(tensors: Sequence[Tensor], base: Tensor | None, height: int) -> np.ndarray:
    """Inner products of each of so many rows (T, T, rows) in float64."""
    rows = [tensor.reshape(height, -1) for tensor in tensors]
    origin = None if base is None else base.reshape(height, -1)
    if _compiles(tensors, base):
        from merganser.methods import kernels

        given, products = _alike(tensors, height), np.zeros((height, len(tensors), len(tensors)))
        kernels.inner_products(given[0], _places(given), _of_base(base, height), _BLOCK, products)
        found = products.transpose(1, 2, 0)
    else:
        found = _summed(rows, origin, _widest(rows))
    if _widest(rows) == torch.float64 or not _doubtful(found, rows, origin):
        return found
    return _summed(rows, origin, torch.float64)


def _doubtful(found: np.ndarray, tensors: Sequence[Tensor], base: Tensor | None) -> bool:
    """Whether float32 sums of products tell too little of the tensors' lengths and angles.

    It is so where squares are too small or too large for it, and where the differences from the first tensor, which
    serve fine-tunes, do not serve: where another is very short beside it, or opposite to it.
    """
    squares = np.stack([found[number, number] for number in range(len(tensors))])
    if not (squares < _HUGE).all():
        return True
    for number in map(int, np.flatnonzero((squares < _TINY).any(1))):
        origin = tensors[0] if number else base
        if bool(tensors[0].any()) if origin is None else bool((tensors[number] != origin).any()):
            return True
    along = squares[0] + found[0, 1:]  # inner products of the others and the first
    own = along + found[0, 1:] + squares[1:]
    opposite = along < -_OPPOSITE * np.sqrt(np.maximum(own, 0.0) * squares[0])
    return bool((opposite | (own < _SHORT * squares[0])).any())


def _summed(tensors: Sequence[Tensor], base: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """Inner products of rows (T, T, rows), summed in ``dtype`` over blocks and in float64 over these.

    Args:
        tensors: (rows, n).
        base: (rows, n).
        dtype: float32 or float64.
    """
    tensors = [wide(tensor) for tensor in tensors]
    (height, width), count, device = tensors[0].shape, len(tensors), tensors[0].device
    room = max(_ROOM // count, _LEAST) if device.type == "cpu" else height * width
    columns = max(1, min(width, max(room // _BLOCK, 1) * _BLOCK))
    rows = max(1, min(height, room // columns))
    blocks = -(-columns // _BLOCK)  # of each row, all of one size
    size = -(-columns // blocks)
    basis = torch.empty((count, rows, blocks * size), dtype=dtype, device=device)
    found = torch.zeros((height, count, count), dtype=torch.float64, device=device)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            here = slice(top, top + rows), slice(left, left + columns)
            first = tensors[0][here]
            high, across = first.shape
            if base is None:
                basis[0, :high, :across] = first
            else:
                torch.sub(first, base[here], out=basis[0, :high, :across])
            for number, other in enumerate(tensors[1:], start=1):
                torch.sub(other[here], first, out=basis[number, :high, :across])
            if across < basis.shape[2]:
                basis[:, :, across:] = 0
            parts = basis[:, :high].reshape(count, high * blocks, size).transpose(0, 1)
            products = torch.bmm(parts, parts.mT).reshape(high, blocks, count, count)
            found[here[0]] += products.sum(1, dtype=torch.float64)
    return found.permute(1, 2, 0).cpu().numpy()


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
