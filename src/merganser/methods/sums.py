"""The sums that a least-squares merge is solved from: all that has to be kept of the contributors so far.

θ* = argmin Σᵢ cᵢ‖W − Wᵢ‖²_Gᵢ depends on the contributors through Σcᵢ, ΣcᵢGᵢ and two sums of weights. So a merge of
n + 1 models can go on from the sums of n, at the cost of one. Differences are kept from a fixed reference R, the first
contributor's weights, because the average that the solution is written about moves with every contributor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: A pivot of the equilibrated matrix below this multiple of √d·eps(float32) is rounding noise: Grams are stored so.
_NOISE = 4.0


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
        self.total += coefficient
        if self.reference is None or self.system is None or self.right is None or self.offset is None:
            self.reference = weights.to(torch.float64, copy=True).contiguous()
            self.system = gram.to(torch.float64) * coefficient
            self.right = torch.zeros_like(self.reference)
            self.offset = torch.zeros_like(self.reference)
        elif coefficient != 0:
            difference = weights.to(torch.float64) - self.reference
            wide = gram.to(torch.float64)
            self.system.add_(wide, alpha=coefficient)
            self.right.addmm_(difference, wide, alpha=coefficient)
            self.offset.add_(difference, alpha=coefficient)

    def solve(self, ridge: float) -> Solution:
        """W̄ + (Σcᵢ(Wᵢ − W̄)Gᵢ)(ΣcᵢGᵢ + λI)⁻¹ with λ = ridge · tr(ΣcᵢGᵢ)/d; the sums stay as they are.

        The system is equilibrated by its diagonal and factored by Cholesky. Where a pivot is no larger than the
        rounding of Grams kept in float32, the directions below it carry no information; a ridge of that size on the
        equilibrated diagonal sends them to the average, and the note states it.

        Raises:
            ValueError: nothing was added, or the summed Gram matrix is not positive semi-definite.
        """
        if self.reference is None or self.system is None or self.right is None or self.offset is None:
            raise ValueError("there is no contributor to solve for")
        shift = self.offset / self.total  # W̄ − R
        diagonal = self.system.diagonal()
        if not bool((diagonal > 0).any()):
            return Solution(shift.add_(self.reference), "every Gram matrix is zero: the average")
        right = torch.addmm(self.right, shift, self.system, alpha=-1)
        diagonal = diagonal + ridge * diagonal.mean()
        # An input that is always zero constrains nothing: unit diagonal, zero right-hand side, hence the average.
        used = diagonal > 0
        scale = torch.where(used, diagonal, 1.0).rsqrt()
        system = (self.system * scale[:, None]).mul_(scale[None, :])
        system.diagonal().copy_(torch.where(used, diagonal * scale * scale, 1.0))
        factor, note = _factor(system)
        del system
        correction = torch.cholesky_solve(right.mul_(scale).T, factor).T
        return Solution(shift.addcmul_(correction, scale.expand_as(shift)).add_(self.reference), note)

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
