"""ACTMat: Gram matrices estimated from how far fine-tuning moved the weights (arXiv 2604.01329).

The rows of Δᵢ = Wᵢ − W₀ are sums of layer inputs weighted by error signals, so ΔᵢᵀΔᵢ stands in for the Gram matrix.
Only the base model is needed: no data, no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements, input_width, turned
from merganser.methods.sums import GramSums


class ACTMatOptions(Options):
    """Options of :class:`ACTMat`."""

    ridge: float = Field(0.01, ge=0, description="pull toward the average, relative to tr(G)/d")


class ACTMat(Method):
    """RegMean's solution with Gᵢ = ΔᵢᵀΔᵢ; biases, norms and embeddings are averaged."""

    name = "actmat"
    summary = "least squares on estimated inputs; needs the base model"
    Options = ACTMatOptions
    needs_base = True
    needs_layers = True

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """The weight of every linear layer that the base model holds too."""
        units, reasons = [], {}
        for fact in facts:
            if fact.layer is None or fact.layer.kind == "embedding":
                reasons[fact.name] = "bias" if fact.bias_of else "not a linear layer"
            elif fact.layer.tied:
                reasons[fact.name] = "tied: one tensor serves several layers"
            elif not fact.in_base:
                reasons[fact.name] = "not in the base model"
            else:
                units.append(Unit((fact.name,), "estimated gram", (fact,)))
        return units, reasons

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """One factorisation a weight."""
        (name,), (fact,) = unit.names, unit.facts

        def oriented(tensor: Tensor) -> Tensor:
            return tensor.T if turned(fact) else tensor

        base = oriented(shares[0].base(name)).to(torch.float64)
        sums = GramSums()
        for share in shares:
            weight = oriented(share.tensor(name))
            delta = weight.to(torch.float64) - base
            sums.add(weight, delta.T @ delta, share.coefficient)
        solution = sums.solve(self.options.ridge)
        return Merged({name: oriented(solution.value)}, solution.note)

    def memory(self, unit: Unit, contributors: int) -> int:
        """A Gram matrix, the system, and its factor; the base, three sums of weights, the merged weights."""
        (fact,) = unit.facts
        return input_width(fact) ** 2 * 3 * 8 + elements(unit) * (5 * 8 + 4)
