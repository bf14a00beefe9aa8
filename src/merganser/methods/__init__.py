"""Merging methods: pure functions of tensors, one file a family. A new one is registered in :data:`METHODS`."""

from __future__ import annotations

from merganser.methods.actmat import ACTMat
from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, average, average_unit
from merganser.methods.fisher import Fisher
from merganser.methods.optimal_transport import OptimalTransport
from merganser.methods.regmean import RegMean
from merganser.methods.simple import Simple
from merganser.methods.sums import GramSums
from merganser.methods.task_vectors import TIES, TaskArithmetic

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Simple, Fisher, RegMean, ACTMat, OptimalTransport, TaskArithmetic, TIES)
}

__all__ = [
    "METHODS",
    "Facts",
    "GramSums",
    "Merged",
    "Method",
    "Options",
    "Share",
    "Unit",
    "average",
    "average_unit",
]
