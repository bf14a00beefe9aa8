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

#: A pivot of the equilibrated matrix below this multiple of √d·eps(float32) is rounding noise: Grams are stored so.
_NOISE = 4.0
#: Rows of weights in one product: fixed, so that the bytes do not depend on how a tall tensor is cut for memory.
BLOCK = 1024


@dataclass(frozen=True)
class Solution:
    """A merged tensor and what had to be done to get it.

    Attributes:
        value: float64, shaped like the contributors' tensors.
        note: a stated ridge that a nearly singular system needed; None where none was.
    """

    value: Tensor
    note: str | None = None


@dataclass
class GramSums:
    """Sums over contributors with weights Wᵢ (out, in), Gram matrices Gᵢ (in, in) and coefficients cᵢ; all float64.

    The same contributors in the same order give the same bytes, wherever the sums were put down on the way.

    Attributes:
        reference: R, the first contributor's weights (out, in); None before the first.
        system: Σ cᵢGᵢ (in, in).
        right: Σ cᵢ(Wᵢ − R)Gᵢ (out, in).
        offset: Σ cᵢ(Wᵢ − R) (out, in).
        total: Σ cᵢ.
    """

    reference: Tensor | None = None
    system: Tensor | None = None
    right: Tensor | None = None
    offset: Tensor | None = None
    total: float = 0.0

    def add(self, weights: Tensor, gram: Tensor, coefficient: float) -> None:
        """Count one more contributor.

        Args:
            weights: (out, in).
            gram: (in, in), symmetric positive semi-definite.
            coefficient: at least 0.
        """
        wide = gram.to(torch.float64)
        if self.system is None:
            self.system = wide * coefficient
        else:
            self.system.add_(wide, alpha=coefficient)
        self.add_right(weights, wide, coefficient)

    def add_right(self, weights: Tensor, gram: Tensor, coefficient: float) -> None:
        """Count a contributor on the right-hand side alone, where the system is already known.

        Args:
            weights: (out, in).
            gram: (in, in), float64.
            coefficient: at least 0.
        """
        self.total += coefficient
        if self.reference is None or self.right is None or self.offset is None:
            self.reference = weights.to(torch.float64, copy=True).contiguous()
            self.right = torch.zeros_like(self.reference)
            self.offset = torch.zeros_like(self.reference)
        elif coefficient != 0:
            for rows in blocks(len(weights)):
                difference = weights[rows].to(torch.float64) - self.reference[rows]
                # A product of its own: BLAS may round differently where rows begin at another alignment.
                self.right[rows].add_(difference @ gram, alpha=coefficient)
                self.offset[rows].add_(difference, alpha=coefficient)

    def solve(self, ridge: float) -> Solution:
        """W̄ + (Σcᵢ(Wᵢ − W̄)Gᵢ)(ΣcᵢGᵢ + λI)⁻¹ with λ = ridge · tr(ΣcᵢGᵢ)/d; the sums stay as they are.

        Raises:
            ValueError: nothing was added, or the summed Gram matrix is not positive semi-definite.
        """
        factored = self.factor(ridge)
        return Solution(factored.solve(self), factored.note)

    def factor(self, ridge: float) -> FactoredSystem:
        """The system ΣcᵢGᵢ + λI, factored once for any number of right-hand sides.

        The system is equilibrated by its diagonal and factored by Cholesky. Where a pivot is no larger than the
        rounding of Grams kept in float32, the directions below it carry no information; a ridge of that size on the
        equilibrated diagonal sends them to the average, and the note states it.

        Raises:
            ValueError: nothing was added, or the summed Gram matrix is not positive semi-definite.
        """
        if self.system is None:
            raise ValueError("there is no contributor to solve for")
        diagonal = self.system.diagonal()
        if not bool((diagonal > 0).any()):
            return FactoredSystem(self.system, None, None, "every Gram matrix is zero: the average")
        diagonal = diagonal + ridge * diagonal.mean()
        # An input that is always zero constrains nothing: unit diagonal, zero right-hand side, hence the average.
        used = diagonal > 0
        scale = torch.where(used, diagonal, 1.0).rsqrt()
        system = (self.system * scale[:, None]).mul_(scale[None, :])
        system.diagonal().copy_(torch.where(used, diagonal * scale * scale, 1.0))
        factor, note = _factor(system)
        return FactoredSystem(self.system, factor, scale, note)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as they go into a file; at least one contributor must have been added."""
        found = {"reference": self.reference, "system": self.system, "right": self.right}
        found |= {"offset": self.offset, "total": torch.tensor([self.total], dtype=torch.float64)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GramSums:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: these are not the tensors of such sums.
        """
        names = ("reference", "system", "right", "offset", "total")
        if set(tensors) != set(names) or any(t.dtype != torch.float64 for t in tensors.values()):
            raise ValueError(f"sums are the float64 tensors {', '.join(names)}")
        reference, system, right, offset, total = (tensors[name] for name in names)
        width = system.shape[0]
        square = system.shape == (width, width) and total.shape == (1,)
        if not square or reference.dim() != 2 or reference.shape[1] != width:
            raise ValueError(f"weights {list(reference.shape)} do not fit a system of {list(system.shape)}")
        if not reference.shape == right.shape == offset.shape:
            raise ValueError("the sums of weights differ in shape")
        return cls(reference, system, right, offset, float(total))


@dataclass(frozen=True)
class FactoredSystem:
    """Σ cᵢGᵢ + λI, equilibrated and factored.

    Attributes:
        system: Σ cᵢGᵢ (in, in).
        factor: the Cholesky factor of the equilibrated system; None where every Gram matrix is zero.
        scale: (in,), what rows and columns were multiplied with; None likewise.
        note: what had to be done to factor it.
    """

    system: Tensor
    factor: Tensor | None
    scale: Tensor | None
    note: str | None

    def solve(self, sums: GramSums) -> Tensor:
        """The merged weights (out, in), float64, for these sums' right-hand side; the sums stay as they are."""
        if sums.reference is None or sums.right is None or sums.offset is None:
            raise ValueError("there is no contributor to solve for")
        merged = torch.empty_like(sums.reference)
        for rows in blocks(len(merged)):
            shift = sums.offset[rows] / sums.total  # W̄ − R
            if self.factor is not None and self.scale is not None:
                right = torch.addmm(sums.right[rows], shift, self.system, alpha=-1).mul_(self.scale)
                correction = torch.cholesky_solve(right.T, self.factor).T
                shift.addcmul_(correction, self.scale.expand_as(shift))
            torch.add(shift, sums.reference[rows], out=merged[rows])
        return merged


def blocks(rows: int) -> Iterator[slice]:
    """Ranges of :data:`BLOCK` rows."""
    return (slice(start, start + BLOCK) for start in range(0, rows, BLOCK))


def _factor(system: Tensor) -> tuple[Tensor, str | None]:
    """Cholesky factor of an equilibrated matrix (unit diagonal), with a stated ridge where it is nearly singular."""
    width = system.shape[0]
    floor = _NOISE * width**0.5 * torch.finfo(torch.float32).eps
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed) == 0 and float(factor.diagonal().min()) ** 2 > floor:
        return factor, None
    for ridge in (floor, 100 * floor):
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed) == 0:
            return factor, f"nearly singular: ridge of {ridge:.1e} on the equilibrated diagonal"
    raise ValueError("the sum of the Gram matrices is not positive semi-definite")
