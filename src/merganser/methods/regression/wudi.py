"""WUDI: the task vector that disturbs the others least (Cheng et al., ICML 2025, arXiv 2503.08099).

Rows of δᵢ stand in for a layer's inputs, so Σcᵢ‖(τ − δᵢ)δᵢᵀ‖² / ‖δᵢ‖² is what a merged task vector τ disturbs. The
paper descends from the sum of all δᵢ by a few steps of Adam and stops early: directions in which the loss hardly falls
keep the sum. The loss has a minimum in closed form, too, ACTMat's with Gram matrices divided by ‖δᵢ‖².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from merganser.blas import add_gram_
from merganser.methods.base import Needs, Options
from merganser.methods.matrix import Matrix
from merganser.methods.sums import GramSums
from merganser.tensors import mirror_upper

_MEAN, _SQUARE, _LITTLE = 0.9, 0.999, 1e-8  # Adam's decays and what it adds to denominators


class WUDIOptions(Options):
    """Options of :data:`WUDI`."""

    solution: Literal["adam", "exact"] = Field("adam", description="a few steps from the sum, or the minimum")
    steps: int = Field(300, ge=0, le=1_000_000, description="of Adam")
    lr: float = Field(1e-5, ge=0, description="learning rate of Adam; the authors take 2e-5 for RoBERTa")
    ridge: float = Field(0.01, ge=0, description="pull of the exact solution toward the average, relative to tr(G)/d")
    rest: float = Field(0.0, description="multiplier of the averaged task vectors of everything but linear layers")


def _merged(base: Tensor, weights: Sequence[Tensor], coefficients: Sequence[float], options: WUDIOptions) -> Tensor:
    if options.solution == "adam":
        return base + _descended(base, weights, coefficients, options.steps, options.lr)
    sums = GramSums()
    for number, coefficient in enumerate(coefficients):
        weight = weights[number]
        sums.add(weight, unit_gram(weight - base), coefficient)
    return sums.solve(options.ridge).value


def unit_gram(delta: Tensor) -> Tensor:
    """δᵀδ / ‖δ‖² (in, in); zero where δ is."""
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    scaled = delta / largest if largest else delta  # so that no square overflows or vanishes
    gram = add_gram_(delta.new_zeros(delta.shape[1], delta.shape[1]), scaled.contiguous().T)
    mirror_upper(gram.T)
    return gram.div_(gram.trace()) if largest else gram


def _descended(base: Tensor, weights: Sequence[Tensor], coefficients: Sequence[float], steps: int, lr: float) -> Tensor:
    """τ after so many steps of Adam (Kingma & Ba 2015) from Σcᵢδᵢ; the gradient is 2(τ·ΣcᵢGᵢ − ΣcᵢδᵢGᵢ)."""
    wide = torch.promote_types(base.dtype, weights[0].dtype)
    task, right = (torch.zeros(base.shape, dtype=wide, device=base.device) for _ in range(2))
    system = task.new_zeros(base.shape[1], base.shape[1])
    for number, coefficient in enumerate(coefficients):
        delta = weights[number].to(wide) - base
        gram = unit_gram(delta).mul_(coefficient)
        task.add_(delta, alpha=coefficient)
        right.addmm_(delta, gram)
        system += gram
    mean, square = torch.zeros_like(task), torch.zeros_like(task)
    for step in range(1, steps + 1):
        gradient = (task @ system).sub_(right).mul_(2)
        mean.lerp_(gradient, 1 - _MEAN)
        square.mul_(_SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
        root = (square / (1 - _SQUARE**step)).sqrt_().add_(_LITTLE)
        task.addcdiv_(mean, root, value=-lr / (1 - _MEAN**step))
    return task


def _room(height: int, width: int, contributors: int) -> int:
    """Adam's: τ, gradient, its mean, that of its square, what is divided by; the exact solution's sums in float64."""
    return 8 * (4 * height * width + 4 * width**2)


WUDI = Matrix(
    name="wudi",
    title="WUDI",
    summary="base model plus the change that disturbs every contributor's least; needs the base model",
    formula="W₀ + argmin Σcᵢ‖(τ − δᵢ)δᵢᵀ‖² / ‖δᵢ‖², early-stopped from τ = Σcᵢδᵢ",
    reference="Cheng et al. 2025, arXiv 2503.08099",
    needs=Needs(base=True, layers=True, normalised=False),
    options=WUDIOptions.model_validate({}),
    function=_merged,
    room=_room,
)
