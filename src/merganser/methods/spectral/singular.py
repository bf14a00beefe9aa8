"""Singular vectors and polar factors through the Gram matrix of the smaller side, at a fraction of a full SVD's cost.

The eigenvalues of M Mᵀ are squares of singular values, and are known as well as the rounding of the largest one allows.
In float32 that is too little for singular values below a tenth or a hundredth of it. Two things mend this. Directions
that stand far above all others, as those of a fine-tuned layer above the rounding of its weights, are found by
subspace iteration and taken out before. Of what is small beside the rest, no more than a basis is taken from the Gram
matrix, and its singular values are found in float64 from the product of that basis with M, which is a small matrix.
How much is small, and whether float32 does at all, is told by estimates of the error. Where the float32 numbers of M
themselves are rounded too much, :class:`Imprecise` says so, and the caller begins again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import frexp, inf

import torch
from torch import Tensor

from merganser.blas import add_gram_, eigh_
from merganser.tensors import mirror_upper

#: The relative error that the Gram matrix's rounding may have in what is taken from it; and the part of it that is
#: allowed where singular vectors are made orthonormal: two such factors are multiplied.
_GOAL, _GOAL_OF_VECTORS = {torch.float32: 2e-5, torch.float64: 1e-10}, 0.4
#: Singular values that are no more than rounding in float64, relative to the largest; and those of singular vectors
#: side by side, which are themselves known less well where singular values lie close.
_ZERO, _ZERO_OF_VECTORS = 2.0**-40, 1e-8
#: The estimated relative error from which on float32 does not do. Where it did, measured errors of merged task matrices
#: were below 1e-4.
_ALLOWED = 6e-5
#: An entry of the error of an eigenvalue problem, as a multiple of rounding · ‖M‖² / √d; measured.
_EIGEN = 4.0
#: Directions stand out if the mean of squared eigenvalues is so many times the square of their mean; then they are
#: sought by so small a part of all directions at once, in so many rounds. Less depends on it where singular vectors are
#: cut after some than where all count, and what is not found needs float64.
_SEARCH_FOR_SOME, _SEARCH_FOR_ALL = (32, 16, 4), (8, 8, 8)
_SIGN = 8  # times the error of an entry; a smaller singular value could be of the other sign
_EDGE = 16  # singular values on each side of a cut that are told from each other anew
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
    if matrix.shape[0] > matrix.shape[1]:
        found = singular_triples(matrix.T, count, whole)
        return Triples(found.right, found.values, found.left)
    rows, unit = _scaled(matrix)
    if not count or not unit:
        return Triples(matrix.new_empty(matrix.shape[0], 0), matrix.new_empty(0), matrix.new_empty(matrix.shape[1], 0))
    count = min(count, len(rows))
    top = _top_in_float32(rows, count) if matrix.dtype == torch.float32 else None
    basis, turned = top or _top(rows.double(), count)
    lengths = turned.norm(dim=1)
    kept = lengths > _ZERO * max(float(lengths.max()), whole / unit)
    lengths = lengths[kept]
    left, right = basis[kept].T, (turned[kept] / lengths[:, None]).T
    return Triples(left.to(matrix.dtype), lengths.to(matrix.dtype) * unit, right.to(matrix.dtype))


def polar_factor(matrix: Tensor, *, of_vectors: bool = False) -> Tensor:
    """U Vᵀ of the singular value decomposition U S Vᵀ: the matrix with all singular values set to 1.

    It is the nearest matrix with orthonormal columns (or rows, whatever is shorter). Where singular values are zero,
    their vectors could be any; they are left out, so that nothing arbitrary is in the result. The sum of all singular
    values is the sum of the products of the factor's and the matrix's numbers.

    Args:
        matrix: (m, n), float32 or float64.
        of_vectors: its columns are singular vectors of several matrices, which were computed.

    Returns:
        the factor (m, n).

    Raises:
        Imprecise: see there; never for float64.
    """
    rows, unit = _scaled(matrix)
    return _raised(rows, 0.0, of_vectors) if unit else torch.zeros_like(matrix)


def flattened(matrix: Tensor, power: float) -> Tensor:
    """c·U Sᵖ Vᵀ of U S Vᵀ, as long as the matrix is: singular values nearer to each other, directions as they are.

    Args:
        matrix: (m, n), float32 or float64.
        power: p from 0, which makes all singular values alike, to 1, which changes nothing.

    Returns:
        such a matrix of the same Frobenius norm; singular values of zero stay zero.

    Raises:
        Imprecise: see there; never for float64.
    """
    rows, unit = _scaled(matrix)
    if power == 1 or not unit:
        return matrix
    raised = _raised(rows, power)
    return raised.mul_(unit * float(rows.norm() / raised.norm()))


def _raised(matrix: Tensor, power: float, of_vectors: bool = False) -> Tensor:
    """U Sᵖ Vᵀ of a matrix that is not zero."""
    if matrix.shape[0] > matrix.shape[1]:
        return _raised(matrix.T, power, of_vectors).T
    zero, part_of_goal = (_ZERO_OF_VECTORS, _GOAL_OF_VECTORS) if of_vectors else (_ZERO, 1.0)
    gram = _gram(matrix)
    # Where all singular values become 1, those that stand out can be made shorter before.
    flat, gram = _levelled(matrix, gram) if matrix.dtype == torch.float32 and not power else (matrix, gram)
    factor, found = matrix[:0], list[Tensor]()
    for level in _levels(flat, gram, zero, part_of_goal):
        kept = int((level.values > zero * (found[0][0] if found else level.values[0])).sum())
        basis, values = level.basis[:kept], level.values[:kept]
        scaled = (basis / ((values / values[0]) ** ((1 - power) / 2))[:, None]).T
        root = add_gram_(scaled.new_zeros(len(scaled), len(scaled)), scaled)
        root = mirror_upper(root.T).div_(values[0] ** (1 - power))
        # A product with the numbers in the order of the matrix's.
        part = root @ level.rows if level.rows.is_contiguous() else (level.rows.T @ root).T
        factor = part if level.outer is None else factor.add_((level.outer.T @ part).to(factor.dtype))
        found.append(level.values.double())
    if matrix.dtype == torch.float32:
        values = torch.cat(found)
        if not _turned(values, matrix.shape[1], len(matrix), _stored_error(matrix), power) <= _ALLOWED:
            raise Imprecise
    return factor


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


@dataclass(frozen=True)
class _Level:
    """Singular directions of a matrix that are about as strong as each other.

    Attributes:
        rows: (s, n), the matrix, or what it is in a basis of what is small beside the levels before.
        outer: that basis (s, d); None for the matrix itself.
        basis: (k, s), left singular vectors of these rows.
        values: (k,), their singular values.
    """

    rows: Tensor
    outer: Tensor | None
    basis: Tensor
    values: Tensor


def _gram(rows: Tensor) -> Tensor:
    """The lower triangle of the Gram matrix (d, d) of the rows; above it are zeros."""
    gram = add_gram_(rows.new_zeros(len(rows), len(rows)), rows)
    return gram if gram.device.type == "cpu" else gram.tril_()


def _levels(rows: Tensor, gram: Tensor, zero: float, part_of_goal: float = 1.0) -> Iterator[_Level]:
    """Singular directions of a matrix (d, n), d ≤ n, that is not zero: all above ``zero`` of the largest, and some.

    The first level is in the matrix's precision, the others are in float64.

    Args:
        rows: the matrix.
        gram: see :func:`_gram`; it is overwritten.
        zero: part of the largest singular value.
        part_of_goal: how much of the error is allowed that usually is.
    """
    outer, largest = None, 0.0
    while True:
        squares = eigh_(gram).flip(0).clamp_min_(0)
        basis, values = gram.flip(0), squares.sqrt()
        largest = max(largest, float(values[0]))
        if values[0] <= zero * largest:
            return
        known = max(1, int((_gram_errors(values) <= part_of_goal * _GOAL[rows.dtype]).sum()))
        yield _Level(rows, outer, basis[:known], values[:known])
        if known == len(rows):
            return
        first, small, rows = basis[:known].double(), basis[known:].double(), rows.double()
        # What rounding left of the large ones in the small ones, to first order.
        mixed = (small @ rows @ rows.T) @ first.T / squares[:known]
        small -= mixed @ first
        rows, outer = small @ rows, small if outer is None else small @ outer
        gram = _gram(rows)


def _top(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first left singular vectors (count, d) of a matrix (d, n) with d ≤ n; and their products with the matrix."""
    bases, turned = [], []
    for level in _levels(rows, _gram(rows), 0.0):
        bases.append(level.basis if level.outer is None else level.basis @ level.outer)
        turned.append(level.basis @ level.rows)
        count -= len(level.values)
        if count <= 0:
            break
    end = count or None
    return torch.cat(bases)[:end], torch.cat(turned)[:end]


def _top_in_float32(rows: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """What :func:`_top` says, in float32; None where that does not do.

    Raises:
        Imprecise: where the rounding of the matrix itself would show.
    """
    height, width = rows.shape
    vectors = _gram(rows)
    found = _outstanding(rows, vectors, _GOAL[rows.dtype], _SEARCH_FOR_SOME)
    first, taken = (rows.new_empty(0, height), rows[:0]) if found is None else (one[:count] for one in found)
    missing = count - len(taken)
    rest = rows
    if len(taken):
        rest = rows.addmm(first.T, taken, alpha=-1)
        vectors = _gram(rest)
    edge = min(_EDGE, missing, height - len(taken) - missing)
    values = eigh_(vectors, missing + edge).flip(0).clamp_min_(0).sqrt()[: height - len(taken)]
    whole = torch.cat([taken.norm(dim=1), values])
    stored = _stored_error(rows)
    if not (_turned(whole, width, count, stored) <= _ALLOWED and _cut(whole, count, one=stored) <= _ALLOWED):
        raise Imprecise
    if missing:
        error = float(_gram_errors(values)[missing - 1])
        if not max(error, _cut(whole, count, squared=_eigen_error(values))) <= _ALLOWED:
            return None
    basis = vectors[height - missing - edge :].flip(0)
    # Those on both sides of the cut are told from each other anew where they lie close.
    if edge and _neighbours(values, missing, whole[:count].norm()) > _GOAL[rows.dtype]:
        near = torch.linalg.qr(basis[missing - edge :].T.double())[0].T
        turned = near @ rest.double()
        rotation = turned @ turned.T
        eigh_(rotation)
        basis[missing - edge : missing] = rotation.flip(0)[:edge] @ near
    basis = basis[:missing]
    turned = basis @ rest
    return torch.cat([first, basis]), torch.cat([taken, turned])


def _levelled(rows: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (d, n), d ≤ n, with the same polar factor, whose directions that stand out are as long as the rest.

    Args:
        rows: (d, n).
        gram: see :func:`_gram`.

    Returns:
        such a matrix, and its Gram matrix.
    """
    # Several tasks may have their own; the error is relative to a factor of the norm √d.
    found = _outstanding(rows, gram, _GOAL[rows.dtype] * len(rows) ** 0.5, _SEARCH_FOR_ALL)
    if found is None:
        return rows, gram
    basis, turned = found
    rest = rows.addmm(basis.T, turned, alpha=-1)
    length = float(rest.norm()) / max(1, len(rows) - len(basis)) ** 0.5
    rest.addmm_(basis.T, turned * (length / turned.norm(dim=1, keepdim=True)))
    return rest, _gram(rest)


def _outstanding(
    rows: Tensor, gram: Tensor, allowed: float, search: tuple[int, int, int]
) -> tuple[Tensor, Tensor] | None:
    """The singular directions of a matrix that are far stronger than most, if there are such.

    By subspace iteration from a random block, the same for all matrices.

    Args:
        rows: (d, n) with d ≤ n.
        gram: the lower triangle of its Gram matrix.
        allowed: how far all of them together may be turned.
        search: when and how to look for them, such as :data:`_SEARCH_FOR_ALL`.

    Returns:
        left singular vectors (k, d); their products (k, n) with the matrix.
    """
    height, (least, part, rounds) = len(rows), search
    diagonal = gram.diagonal()
    if height * (2 * gram.norm() ** 2 - diagonal.norm() ** 2) < least * diagonal.sum() ** 2:
        return None
    whole = mirror_upper(gram.clone().T)
    block = torch.randn(height, max(1, height // part), generator=torch.Generator().manual_seed(0)).to(rows)
    for _ in range(rounds):
        block = torch.linalg.qr(whole @ block)[0]
    image = whole @ block
    rotation = (block.T @ image).double()
    eigh_(rotation)
    rotation = rotation.flip(0).to(rows.dtype)
    basis, image = rotation @ block.T, rotation @ image.T
    missed = image / (basis * image).sum(dim=1, keepdim=True) - basis
    error = missed.square().sum(dim=1).cumsum(0).sqrt()
    found = int((error <= allowed).sum())
    return (basis[:found], basis[:found] @ rows) if found else None


def _stored_error(rows: Tensor) -> float:
    """Of an entry of a matrix in a basis of its singular vectors, by the rounding of its numbers and their products."""
    return torch.finfo(rows.dtype).eps / 2 * float(rows.norm()) / rows.shape[1] ** 0.5


def _eigen_error(values: Tensor) -> float:
    """Of an entry of a Gram matrix in a basis of its eigenvectors, by the rounding of the eigenvalue problem."""
    return _EIGEN * torch.finfo(values.dtype).eps / 2 * float(values[0]) ** 2 / len(values) ** 0.5


def _turns(values: Tensor, width: int, power: float = 0.0) -> Tensor:
    """Σⱼ max(σᵢ, σⱼ)^(2p − 2), j ≠ i, for each singular value of a matrix (d, width), the largest first.

    So far, squared, an error of 1 in every entry of the matrix turns σᵖ of its singular vectors to where others are.
    """
    inverse = values.double().clamp_min(1e-100) ** (2 * power - 2)
    following = torch.arange(width - 1, width - 1 - len(values), -1, device=values.device)
    return following * inverse + inverse.cumsum(0) - inverse


def _turned(values: Tensor, width: int, count: int, error: float, power: float = 0.0) -> float:
    """The relative error of U Sᵖ Vᵀ of the first singular vectors, by one of so much in the matrix's entries."""
    if len(values) < count or (not power and values[count - 1] <= _SIGN * error):
        return inf
    whole = (values[:count].double() ** (2 * power)).sum()
    return error * float((_turns(values, width, power)[:count].sum() / whole).sqrt())


def _gram_errors(values: Tensor) -> Tensor:
    """The relative error of polar factors of the first 1, 2, … singular directions by those of the Gram matrix."""
    inverse = values.double().clamp_min(1e-100).square().reciprocal()
    squares = (_turns(values, len(values)) + inverse) * inverse
    counts = torch.arange(1, len(values) + 1, device=values.device)
    return _eigen_error(values) * (squares.cumsum(0) / counts).sqrt()


def _neighbours(values: Tensor, count: int, norm: Tensor) -> float:
    """How far the last of the first eigenvectors of a Gram matrix may be turned to the next, relative to the whole.

    Divide and conquer takes eigenvalues as equal whose difference is below eight times the rounding of the largest.
    """
    last, following = values[count - 1].double(), values[count].double()
    same = 4 * torch.finfo(values.dtype).eps * values[0].double().square()
    return float(same / (last.square() - following.square()) * last / norm)


def _cut(values: Tensor, count: int, *, one: float = 0.0, squared: float = 0.0) -> float:
    """How far the first singular vectors are turned toward the others, weighted by their values, relative to the whole.

    Args:
        values: all singular values, the largest first.
        count: how many are the first.
        one: the error of an entry of the matrix.
        squared: that of an entry of its Gram matrix.
    """
    first, others = values[:count, None], values[count:]
    turns = ((one * (first + others) + squared) / ((first - others) * (first + others))).clamp_(0, 1)
    return float((turns * first).norm() / first.norm())


def _scaled(matrix: Tensor) -> tuple[Tensor, float]:
    """A matrix divided by a power of two where squares of its numbers could overflow or vanish; and that power.

    It is 0 for a matrix of zeros, or of no numbers.
    """
    largest = max(abs(float(one)) for one in torch.aminmax(matrix)) if matrix.numel() else 0.0
    exponent = frexp(largest)[1]
    unit = 1.0 if abs(exponent) < _FAR_OFF else 2.0**exponent
    return (matrix if unit == 1 else matrix / unit), unit if largest else 0.0
