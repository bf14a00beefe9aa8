"""K-FAC, damped: least squares in the Kronecker-factored Fisher information of each layer, the same size for all.

The metric is that of MaTS (:mod:`merganser.methods.regression.mats`): an error Δ of a layer's weight costs ⟨Δ, BΔA⟩,
A = E[x xᵀ] of its inputs, B = E[g gᵀ] of the gradients of its outputs. Three things are other than there.

Each factor of each contributor has a mean diagonal of 1. The gradients of a model that is sure of its answers are tiny,
and its task is no smaller for that: with Fisher information as it is, models of much loss decide.

What B leaves out is not free. B is known from few examples, and only near the contributor's own weights, so a multiple
of the identity is added, as K-FAC as an optimiser does (Martens & Grosse 2015, arXiv 1503.05671, section 6).

The regularisation is a ridge, and not where conjugate gradients are stopped: preconditioned in the joint eigenbases of
the factors, they are near the solution after a few steps.
"""

from __future__ import annotations

from pydantic import Field

from merganser.methods.base import Needs, Options, Share, Unit
from merganser.methods.kronecker import Kronecker, joint_eigenbases, kronecker, normalised
from merganser.methods.least_squares import LeastSquares, Rule
from merganser.methods.regression.mats import MATS, inputs_of


class KfacOptions(Options):
    """Options of :data:`KFAC`."""

    damping: float = Field(
        0.3, ge=0, description="added to the diagonal of each output factor B, relative to the mean of its diagonal"
    )
    ridge: float = Field(0.01, ge=0, description="pull toward the average, relative to the metric's mean diagonal")
    alpha: float = Field(1.0, ge=0, le=1, description="multiplier of the off-diagonals of both factors")
    steps: int = Field(10, ge=1, le=100_000, description="of preconditioned conjugate gradients, at most")
    scale: float = Field(1.0, gt=0, description="multiplier of what layers change; other than 1 it needs the base")
    spectrum: float = Field(
        0.0,
        ge=0,
        description="its singular values to the power k^-spectrum, as in balanced; other than 0 it needs the base",
    )
    augment_bias: bool = Field(True, description="solve a layer's bias with its weight, as an input that is always 1")
    embeddings: bool = Field(True, description="merge embeddings row by row, by token counts")


def _metric(unit: Unit, share: Share, options: KfacOptions) -> Kronecker:
    outputs, outer = normalised(share.gradients(unit.facts[0].name), options.alpha, options.damping)
    inputs, inner = normalised(inputs_of(unit, share), options.alpha)
    return kronecker(outputs, inputs, 1.0 if outer and inner else 0.0)


KFAC = LeastSquares(
    name="kfac",
    title="K-FAC",
    summary="least squares on inputs and output gradients, each of one size; needs statistics collected with --kfac",
    formula="the W with Σcᵢ(Bᵢ + μI)(W − Wᵢ)Aᵢ + λ(W − W̄) = 0, Aᵢ and Bᵢ as in mats, each with a mean diagonal of 1",
    reference="merganser; after Tam et al. 2023, arXiv 2312.04339, and Martens & Grosse 2015, arXiv 1503.05671",
    needs=Needs(statistics="kfac"),
    options=KfacOptions.model_validate({}),
    treat=MATS.treat,
    join=MATS.join,
    rules={**MATS.rules, "kronecker": Rule(Kronecker, _metric, local=False)},
    alpha=MATS.alpha,
    precondition=joint_eigenbases,
)
