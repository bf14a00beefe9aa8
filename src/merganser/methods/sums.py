"""The sums that a least-squares merge is solved from: all that has to be kept of the contributors so far.

θ* = argmin Σᵢ cᵢ‖W − Wᵢ‖²_Gᵢ depends on the contributors through Σcᵢ, ΣcᵢGᵢ and two sums of weights. So a merge of
n + 1 models can go on from the sums of n, at the cost of one. Differences are kept from a fixed reference R, the first
contributor's weights, because the average that the solution is written about moves with every contributor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.blas import add_product_, cholesky_, eigh_, solve_cholesky_
from merganser.tensors import mirror_upper, roomy_empty

#: A pivot, relative to the diagonal, below this multiple of √d·eps(float32) is rounding noise: Grams are stored so.
NOISE = 4.0
#: Rows of weights in one product: fixed, so that the bytes do not depend on how a tall tensor is cut for memory.
BLOCK = 1024
_STRIP = 128  # rows of a triangle that are added up together
#: With every such pivot above this, float32 loses at most about three of its seven digits, of a correction that is
#: small beside the weights. Otherwise the system is factored in float64.
_SAFE = 1e-3
_NARROW = 512  # inputs up to which float64 costs nothing that matters


@dataclass(frozen=True)
class Solution:
    """A merged tensor and what had to be done to get it.

    Attributes:
        value: float32 or float64, shaped like the contributors' tensors.
        note: a stated ridge that a nearly singular system needed; None where none was.
    """

    value: Tensor
    note: str | None = None


@dataclass
class GramSums:
    """Sums over contributors with weights Wᵢ (out, in), Gram matrices Gᵢ (in, in) and coefficients cᵢ.

    In float64 sums can be added to and taken from for long. Those that are solved at once may be in float32 where they
    are wide: twice as fast, and since only differences are summed, as good as Grams that are stored so. Weights in
    float64 make them float64.
    The same contributors in the same order give the same bytes, wherever the sums were put down on the way.

    Attributes:
        reference: R, the first contributor's weights (out, in); None before the first.
        system: Σ cᵢGᵢ (in, in), its lower triangle; :meth:`tensors` gives the other one meaning, too.
        right: Σ cᵢ(Wᵢ − R)Gᵢ (out, in).
        offset: Σ cᵢ(Wᵢ − R) (out, in).
        total: Σ cᵢ.
        dtype: of the sums; None: float64 where that is cheap, by the first Gram matrix's width.
    """

    reference: Tensor | None = None
    system: Tensor | None = None
    right: Tensor | None = None
    offset: Tensor | None = None
    total: float = 0.0
    dtype: torch.dtype | None = torch.float64

    def add(self, weights: Tensor, gram: Tensor, coefficient: float, alpha: float = 1.0) -> None:
        """Count one more contributor.

        Args:
            weights: (out, in); the first contributor's may be kept, and stay as they are.
            gram: (in, in), symmetric positive semi-definite; stays as it is.
            coefficient: at least 0.
            alpha: multiplier of the Gram matrix's off-diagonals (RegMean, Jin et al. 2023, section 3.3).
        """
        gram = gram.to(self._settled(weights, gram)).contiguous()
        first, scale = self.system is None, coefficient * alpha
        if self.system is None:
            self.system = roomy_empty(len(gram), len(gram), gram)
        for rows, columns in _lower(len(gram)):
            if first:
                torch.mul(gram[rows, columns], scale, out=self.system[rows, columns])
            else:
                self.system[rows, columns].add_(gram[rows, columns], alpha=scale)
        if alpha != 1:
            self.system.diagonal().add_(gram.diagonal(), alpha=coefficient * (1 - alpha))
        self.add_right(weights, gram, coefficient, alpha)

    def add_right(self, weights: Tensor, gram: Tensor, coefficient: float, alpha: float = 1.0) -> None:
        """Count a contributor on the right-hand side alone, where the system is already known.

        Args:
            weights: (out, in).
            gram: (in, in), symmetric; stays as it is.
            coefficient: at least 0.
            alpha: multiplier of the Gram matrix's off-diagonals.
        """
        gram = gram.to(self._settled(weights, gram)).contiguous()
        self.total += coefficient
        if self.reference is None or self.right is None or self.offset is None:
            height, width = weights.shape
            self.reference = weights.to(self.dtype).contiguous()
            self.right, self.offset = (roomy_empty(height, width, gram).zero_() for _ in range(2))
        elif coefficient != 0:
            difference = roomy_empty(min(BLOCK, len(weights)), len(gram), gram)
            diagonal = gram.diagonal().clone()  # contiguous: many times as fast as a column of cache misses
            for rows in blocks(len(weights)):
                own = weights[rows].to(self.dtype)
                delta = torch.sub(own, self.reference[rows], out=difference[: len(own)])
                right = add_product_(self.right[rows], delta, gram, coefficient * alpha)
                if alpha != 1:
                    right.addcmul_(delta, diagonal.expand_as(delta), value=coefficient * (1 - alpha))
                self.offset[rows].add_(delta, alpha=coefficient)

    def _settled(self, weights: Tensor, gram: Tensor) -> torch.dtype:
        """The dtype to go on in: float64 from the first weights on that are stored so."""
        if self.dtype is None:
            self.dtype = torch.float64 if gram.shape[0] <= _NARROW else torch.float32
        if weights.dtype == torch.float64 != self.dtype:
            self.dtype = torch.float64
            for name in ("reference", "system", "right", "offset"):
                held = getattr(self, name)
                setattr(self, name, None if held is None else held.to(torch.float64))
        return self.dtype

    def solve(self, ridge: float, *, toward_reference: bool = False) -> Solution:
        """W̄ + (Σcᵢ(Wᵢ − W̄)Gᵢ)(ΣcᵢGᵢ + λI)⁻¹ with λ = ridge · tr(ΣcᵢGᵢ)/d; the sums stay as they are.

        Toward the reference, it is R + (Σcᵢ(Wᵢ − R)Gᵢ)(ΣcᵢGᵢ + λI)⁻¹.

        Raises:
            ValueError: nothing was added, or the summed Gram matrix is not positive semi-definite.
        """
        factored = self.factor(ridge, toward_reference=toward_reference)
        return Solution(factored.solve(self), factored.note)

    def factor(self, ridge: float, *, toward_reference: bool = False) -> FactoredSystem:
        """The system ΣcᵢGᵢ + λI, factored once for any number of right-hand sides.

        What says nothing, and the ridge, is drawn to the average, or to R where that is asked for. Without a ridge that
        is the pseudo-inverse: where the system is nearly singular, eigenvalues that are rounding are left out.

        Where a pivot of the Cholesky factor is, beside its entry of the diagonal, no larger than the rounding of Grams
        kept in float32, the directions below it carry no information; a ridge of that size, relative to the diagonal,
        sends them to the average, and the note states it. Nothing is equilibrated before: Cholesky factors are as
        accurate without (Demmel 1989; Higham 2002, theorem 10.6).

        Raises:
            ValueError: nothing was added, or the summed Gram matrix is not positive semi-definite.
        """
        if self.system is None:
            raise ValueError("there is no contributor to solve for")
        diagonal = self.system.diagonal().to(torch.float64)
        if not bool((diagonal > 0).any()):
            zero = f"every Gram matrix is zero: the {'base model' if toward_reference else 'average'}"
            return FactoredSystem(None, None, zero, toward_reference)
        pull = torch.full_like(diagonal, float(ridge * diagonal.mean()))
        diagonal = diagonal + pull
        # An input that is always zero constrains nothing: unit diagonal and the average's right-hand side.
        unused = diagonal <= 0
        pull[unused] = diagonal[unused] = 1.0
        factor, extra, note = _factor(self.system, diagonal)
        if toward_reference and not ridge and extra:
            inverse, kept = _pseudo_inverse(self.system)
            note = f"nearly singular: the pseudo-inverse, of rank {kept} of {len(inverse)}"
            return FactoredSystem(inverse, None, note, toward_reference)
        return FactoredSystem(factor, (pull + extra * diagonal).to(factor.dtype), note, toward_reference)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as they go into a file: whole and contiguous; a contributor must have been added."""
        if self.system is not None:
            mirror_upper(self.system.T)
        found = {"reference": self.reference, "system": self.system, "right": self.right}
        found |= {"offset": self.offset, "total": torch.tensor([self.total], dtype=torch.float64)}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GramSums:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: these are not the tensors of such sums.
        """
        names = ("reference", "system", "right", "offset", "total")
        if set(tensors) != set(names):
            raise ValueError(f"sums are the tensors {', '.join(names)}")
        reference, system, right, offset, total = (tensors[name] for name in names)
        dtype = system.dtype
        alike = all(tensor.dtype == dtype for tensor in (reference, system, right, offset))
        if dtype not in (torch.float32, torch.float64) or not alike or total.dtype != torch.float64:
            raise ValueError("sums are all float64, or all float32 but for the total")
        width = system.shape[0]
        square = system.shape == (width, width) and total.shape == (1,)
        if not square or reference.dim() != 2 or reference.shape[1] != width:
            raise ValueError(f"weights {list(reference.shape)} do not fit a system of {list(system.shape)}")
        if not reference.shape == right.shape == offset.shape:
            raise ValueError("the sums of weights differ in shape")
        return cls(reference, system, right, offset, float(total), dtype)


@dataclass(frozen=True)
class FactoredSystem:
    """Σ cᵢGᵢ + λI, factored.

    Attributes:
        factor: L (in, in) with L Lᵀ the system, in its lower triangle; None where every Gram matrix is zero.
        pull: (in,), how strongly each input's weights are drawn to the average: λ and what the factor needed; None
            likewise, and where ``factor`` is the pseudo-inverse of the system instead.
        note: what had to be done to factor it.
        toward_reference: they are drawn to R instead.
    """

    factor: Tensor | None
    pull: Tensor | None
    note: str | None
    toward_reference: bool = False

    def solve(self, sums: GramSums) -> Tensor:
        """The merged weights (out, in) for these sums' right-hand side; the sums stay as they are.

        R + X with X(ΣcᵢGᵢ + diag(pull)) = Σcᵢ(Wᵢ − R)Gᵢ + (W̄ − R) diag(pull), without the last term toward R.
        """
        if sums.reference is None or sums.right is None or sums.offset is None:
            raise ValueError("there is no contributor to solve for")
        if self.factor is None:
            return sums.reference.clone() if self.toward_reference else sums.reference + sums.offset / sums.total
        height, width = sums.reference.shape
        merged = roomy_empty(height, width, self.factor)
        drawn = self.pull is not None and bool(self.pull.any()) and not self.toward_reference
        for rows in blocks(len(merged)):
            part = merged[rows].copy_(sums.right[rows])
            if self.pull is None:
                part.copy_(part @ self.factor).add_(sums.reference[rows])
                continue
            if drawn:
                part.addcmul_((sums.offset[rows] / sums.total).to(part.dtype), self.pull.expand_as(part))
            solve_cholesky_(part, self.factor).add_(sums.reference[rows])
        return merged


def blocks(rows: int) -> Iterator[slice]:
    """Ranges of :data:`BLOCK` rows."""
    return (slice(start, start + BLOCK) for start in range(0, rows, BLOCK))


def _lower(width: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows and columns that cover the lower triangle of a square matrix, and little more."""
    return ((slice(at, at + _STRIP), slice(0, min(at + _STRIP, width))) for at in range(0, width, _STRIP))


def _factor(system: Tensor, diagonal: Tensor) -> tuple[Tensor, float, str | None]:
    """Cholesky factor L of a system with this diagonal, the relative ridge that it needed, and a note that states it.

    Raises:
        ValueError: it is not positive semi-definite.
    """
    width = system.shape[0]
    floor = NOISE * width**0.5 * torch.finfo(torch.float32).eps
    if system.dtype == torch.float32:
        factor = _lower_copy(system, diagonal)
        if cholesky_(factor) and _smallest_pivot(factor, diagonal) > max(_SAFE, floor):
            return factor, 0.0, None
        system = system.to(torch.float64)
    factor = _lower_copy(system, diagonal)
    if cholesky_(factor) and _smallest_pivot(factor, diagonal) > floor:
        return factor, 0.0, None
    added = 0.0
    for ridge in (floor, 100 * floor):
        added += ridge
        factor = _lower_copy(system, diagonal * (1 + added))
        if cholesky_(factor):
            return factor, added, f"nearly singular: ridge of {added:.1e} relative to the diagonal"
    raise ValueError("the sum of the Gram matrices is not positive semi-definite")


def _pseudo_inverse(system: Tensor) -> tuple[Tensor, int]:
    """The pseudo-inverse (in, in) of a system in float64, of which the lower triangle is read, and its rank."""
    vectors = system.to(torch.float64, copy=True)
    values = eigh_(vectors)
    kept = values > NOISE * len(values) ** 0.5 * torch.finfo(torch.float32).eps * values[-1]
    return (vectors[kept].T / values[kept]) @ vectors[kept], int(kept.sum())


def _smallest_pivot(factor: Tensor, diagonal: Tensor) -> float:
    """The smallest square on the factor's diagonal, relative to what was there before: at most 1."""
    return float((factor.diagonal().to(diagonal.dtype).square() / diagonal).min())


def _lower_copy(system: Tensor, diagonal: Tensor) -> Tensor:
    """A copy of a system's lower triangle, with this diagonal."""
    copied = roomy_empty(len(system), len(system), system)
    for rows, columns in _lower(len(system)):
        copied[rows, columns] = system[rows, columns]
    copied.diagonal().copy_(diagonal)
    return copied


def augment(gram: Tensor, mean: Tensor) -> Tensor:
    """The Gram matrix (d+1, d+1) of inputs with one more component that is always 1: it solves for the bias.

    Of no inputs at all, as an expert has that no token reached, it is zero, too.

    Args:
        gram: (d, d), the mean of x xᵀ.
        mean: (d,), the mean of x.
    """
    width = gram.shape[0]
    augmented = roomy_empty(width + 1, width + 1, gram)
    augmented[:width, :width] = gram
    augmented[:width, width] = augmented[width, :width] = mean
    augmented[width, width] = gram.diagonal().any()
    return augmented
