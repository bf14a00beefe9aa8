"""Merging methods: pure functions of tensors, one file a family. A new one is registered in :data:`METHODS`."""

from __future__ import annotations

from merganser.methods.alignment.activations import ACTIVATIONS
from merganser.methods.alignment.optimal_transport import OPTIMAL_TRANSPORT
from merganser.methods.alignment.rebasin import REBASIN
from merganser.methods.averages.karcher import KARCHER, MULTISLERP
from merganser.methods.averages.model_stock import MODEL_STOCK
from merganser.methods.averages.nearswap import NEARSWAP
from merganser.methods.averages.passthrough import PASSTHROUGH
from merganser.methods.averages.simple import SIMPLE
from merganser.methods.averages.slerp import NUSLERP, SLERP
from merganser.methods.averages.weighted_sum import WEIGHTED_SUM
from merganser.methods.base import UNSEEN, Facts, Merged, Method, Needs, Options, Share, Unit, average, average_unit
from merganser.methods.least_squares import LeastSquares
from merganser.methods.metrics import Diagonal, Gram, Identity
from merganser.methods.regression.ace import ACE
from merganser.methods.regression.actmat import ACTMAT
from merganser.methods.regression.balanced import BALANCED
from merganser.methods.regression.fisher import FISHER
from merganser.methods.regression.kfac import KFAC
from merganser.methods.regression.lot import LOT
from merganser.methods.regression.mats import MATS
from merganser.methods.regression.regmean import REGMEAN
from merganser.methods.regression.regmean_pp import REGMEAN_PP
from merganser.methods.regression.tact import TACT
from merganser.methods.regression.wudi import WUDI
from merganser.methods.spectral.core_space import CORE_SPACE
from merganser.methods.spectral.dual_basis import DUAL_BASIS
from merganser.methods.spectral.isotropic import ISO_C, ISO_CTS
from merganser.methods.spectral.knots import KNOTS
from merganser.methods.spectral.tsv_m import TSV_M
from merganser.methods.sums import GramSums
from merganser.methods.task_vectors.arcee_fusion import ARCEE_FUSION
from merganser.methods.task_vectors.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from merganser.methods.task_vectors.consensus import CONSENSUS, MAGMAX
from merganser.methods.task_vectors.dare import DARE_LINEAR, DARE_TIES
from merganser.methods.task_vectors.della import DELLA, DELLA_LINEAR
from merganser.methods.task_vectors.pcb import PCB
from merganser.methods.task_vectors.ram import RAM, RAM_PLUS
from merganser.methods.task_vectors.sce import SCE
from merganser.methods.task_vectors.task_arithmetic import TASK_ARITHMETIC
from merganser.methods.task_vectors.ties import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(SIMPLE, WEIGHTED_SUM, SLERP, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK, NEARSWAP, PASSTHROUGH),
        *(FISHER, REGMEAN, LOT, MATS, KFAC, ACTMAT, TACT, ACE, WUDI, BALANCED),
        *(TSV_M, DUAL_BASIS, ISO_C, ISO_CTS, KNOTS, CORE_SPACE),
        *(OPTIMAL_TRANSPORT, REBASIN, ACTIVATIONS),
        *(TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES, DELLA, DELLA_LINEAR, BREADCRUMBS, BREADCRUMBS_TIES),
        *(SCE, MAGMAX, CONSENSUS, PCB, RAM, RAM_PLUS, ARCEE_FUSION),
    )
}

#: Methods that learn what they need while they merge: merganser.sequential carries them out, and no plan has them.
IN_TURN: dict[str, Method] = {REGMEAN_PP.name: REGMEAN_PP}

#: Methods whose merge is a function of sums over contributors, so that each can be added without the others.
SUMMED: dict[str, LeastSquares] = {
    name: method
    for name, method in METHODS.items()
    if isinstance(method, LeastSquares)
    and all(rule.form in (Identity, Diagonal, Gram) for rule in method.rules.values())
}


__all__ = [
    "IN_TURN",
    "METHODS",
    "SUMMED",
    "UNSEEN",
    "Facts",
    "GramSums",
    "Merged",
    "Method",
    "Needs",
    "Options",
    "Share",
    "Unit",
    "average",
    "average_unit",
]
