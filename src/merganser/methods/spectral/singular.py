"""Singular vectors and polar factors through the Gram matrix of the smaller side, at a fraction of a full SVD's cost.

The eigenvalues of M Mᵀ are squares of singular values, so one below √eps of the largest is lost in its rounding. What
is found of the large ones is therefore taken out of M, and the small ones are found again in what is left, whose
largest singular value is small: they are as accurate as a full SVD's in the same precision. Where rounding in float32
would show, which an estimate tells, a matrix is decomposed in float64; where its numbers themselves are rounded too
much for that, :class:`Imprecise` says so, and the caller begins again in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import frexp, inf

import torch
from torch import Tensor

from merganser.blas import add_gram_, eigh_

#: Singular values below this share of the largest are found again in what the larger ones leave.
_SHARE = {torch.float32: 2.0**-4, torch.float64: 2.0**-12}
#: Singular values that are no more than rounding in float64, relative to the largest; and those of singular vectors
#: side by side, which are themselves known less well where singular values lie close.
_ZERO, _ZERO_OF_VECTORS = 2.0**-40, 1e-8
#: The estimated relative error from which on float32 does not do: where all singular vectors count, where they are cut
#: after some, and where vectors are made orthonormal, of which a quarter shows in what they make with singular values.
#: Measured errors were as large at most.
_ALLOWED, _ALLOWED_CUT, _ALLOWED_OF_VECTORS = 4e-5, 6e-5, 1e-4
_FAR = 4.0  # times as much error, beyond which the rounding of float32 numbers would show, too
_FAR_OFF = 24  # powers of two from 1
_NARROW = 128  # of the smaller side: up to here float64 costs nothing that matters


class Imprecise(ArithmeticError):
    """Float32 is too narrow for a matrix whose singular values differ so much, or lie so close where they are cut."""


@dataclass(frozen=True)
class Triples:
    """Singular triples of a matrix (m, n): left diag(values) rightᵀ is what they make of it.

    Attributes:
        left: (m, k), orthonormal columns.
        values: (k,), positive.
        right: (n, k), orthonormal columns.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def singular_triples(matrix: Tensor, count: int, whole: float = 0.0) -> Triples:
    """The largest singular values of a matrix and their vectors; no more than there are above zero.

    Args:
        matrix: (m, n), float32 or float64.
        count: how many.
        whole: the norm of what this matrix is a rest of, whose rounding is in it.

    Raises:
        Imprecise: see there; never for float64.
    """
    if not matrix.numel() or not count:
        return Triples(matrix.new_empty(matrix.shape[0], 0), matrix.new_empty(0), matrix.new_empty(matrix.shape[1], 0))
    if matrix.shape[0] > matrix.shape[1]:
        found = singular_triples(matrix.T, count, whole)
        return Triples(found.right, found.values, found.left)
    rows, unit = _scaled(matrix)
    basis, values, turned = _precisely_turned(rows, min(count, len(rows)), _ALLOWED)
    basis = basis[:count]
    turned = basis @ rows.to(basis.dtype) if turned is None else turned[:count]
    lengths = turned.norm(dim=1)
    kept = lengths > _ZERO * max(float(values[0]), whole / unit)
    lengths = lengths[kept]
    left, right = basis[kept].T, (turned[kept] / lengths[:, None]).T
    return Triples(left.to(matrix.dtype), lengths.to(matrix.dtype) * unit, right.to(matrix.dtype))


def polar_factor(matrix: Tensor, *, of_vectors: bool = False) -> tuple[Tensor, Tensor]:
    """U Vᵀ of the singular value decomposition U S Vᵀ, and S: the matrix with all singular values set to 1.

    It is the nearest matrix with orthonormal columns (or rows, whatever is shorter). Where singular values are zero,
    their vectors could be any; they are left out, so that nothing arbitrary is in the result.

    Args:
        matrix: (m, n), float32 or float64.
        of_vectors: its columns are singular vectors of several matrices, which were computed.

    Returns:
        the factor (m, n) and all min(m, n) singular values.

    Raises:
        Imprecise: see there; never for float64.
    """
    if not matrix.numel():
        return torch.zeros_like(matrix), matrix.new_zeros(min(matrix.shape))
    if matrix.shape[0] > matrix.shape[1]:
        factor, values = polar_factor(matrix.T, of_vectors=of_vectors)
        return factor.T, values
    rows, unit = _scaled(matrix)
    allowed, zero = (_ALLOWED_OF_VECTORS, _ZERO_OF_VECTORS) if of_vectors else (_ALLOWED, _ZERO)
    basis, values, turned = _precisely_turned(rows, len(rows), allowed)
    kept = values > zero * values[0]
    basis, scaled = basis[kept], basis[kept] / values[kept, None]
    if turned is None:  # one product with the long side less than below, its numbers in the order of the matrix's
        root, rows = scaled.T @ basis, rows.to(basis.dtype)
        factor = root @ rows if rows.is_contiguous() else (rows.T @ root).T
    else:
        factor = scaled.T @ turned[kept]
    return factor.to(matrix.dtype), values.to(matrix.dtype) * unit


def in_enough_precision(
    compute: Callable[[torch.dtype], Tensor], shape: tuple[int, ...], stored: torch.dtype
) -> Tensor:
    """A result in float32 where that does, else in float64.

    Args:
        compute: of the precision.
        shape: of the matrices.
        stored: their dtype, float32 or float64.
    """
    if stored == torch.float32 and min(shape) > _NARROW:
        try:
            return compute(torch.float32)
        except Imprecise:
            pass
    return compute(torch.float64)


def _precisely_turned(rows: Tensor, wanted: int, allowed: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :func:`_turned` says, in float64 where float32 does not do.

    Raises:
        Imprecise: it does not, and for rows in float64 something else would come out.
    """
    found = _turned(rows, wanted)
    if rows.dtype == torch.float64 or not found[1][0]:
        return found
    error = max(_rounding(found[1][:wanted]) / allowed, _cut_error(found[1], wanted) / _ALLOWED_CUT)
    if error <= 1:
        return found
    if error > _FAR:
        raise Imprecise
    return _turned(rows.to(torch.float64), wanted)


def _turned(rows: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A rotation that makes the rows of a matrix orthogonal, the longest first.

    Args:
        rows: (d, n) with d ≤ n.
        wanted: how many have to be accurate.

    Returns:
        the rotation R (d, d); the lengths (d,), which are singular values; R @ rows, where it was needed on the way.
    """
    basis = rows.new_zeros(len(rows), len(rows))
    add_gram_(basis, rows)
    squares = eigh_(basis).flip(0).clamp_min_(0)
    basis, values = basis.flip(0), squares.sqrt()
    large = int((values > _SHARE[rows.dtype] * values[:1]).sum())
    if large >= wanted or not large:
        return basis, values, None
    turned = basis @ rows
    first, left = turned[:large], turned[large:]
    # What rounding left of the large ones in the small ones, to first order.
    mixed = (left @ first.T) / squares[:large]
    basis[large:] -= mixed @ basis[:large]
    left -= mixed @ first
    inner, values[large:], again = _turned(left, wanted - large)
    basis[large:] = inner @ basis[large:]
    turned[large:] = inner @ left if again is None else again
    return basis, values.copy_(turned.norm(dim=1)), turned


def _scaled(matrix: Tensor) -> tuple[Tensor, float]:
    """A matrix divided by a power of two where squares of its numbers could overflow or vanish; and that power."""
    largest = max(abs(float(one)) for one in torch.aminmax(matrix))
    exponent = frexp(largest)[1]
    unit = 1.0 if abs(exponent) < _FAR_OFF else 2.0**exponent
    return (matrix if unit == 1 else matrix / unit), unit


def _cut_error(values: Tensor, count: int) -> float:
    """How far rounding turns the last of so many singular vectors toward the next one, relative to the whole."""
    if count >= len(values):
        return 0.0
    largest, last, after = (float(values[place]) for place in (0, count - 1, count))
    local = min(largest, last / _SHARE[values.dtype])
    gap = last**2 - after**2
    turn = torch.finfo(values.dtype).eps * (local**2 + largest * last) / gap if gap > 0 else inf
    return turn * last / float(values[:count].norm())


def _rounding(values: Tensor) -> float:
    """The rounding of a matrix relative to its singular values, as it shows where all of their vectors count alike."""
    ratios = values[0] / values
    return 0.5 * torch.finfo(values.dtype).eps * float(ratios.square().mean().sqrt())
