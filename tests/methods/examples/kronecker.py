"""A Kronecker-factored metric: errors cost what they do on a layer's inputs, and on outputs that training moved."""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Needs, Options, as_matrix
from merganser.methods.least_squares import LeastSquares, Rule
from merganser.methods.metrics import Operator


class KroneckerOptions(Options):
    ridge: float = Field(0.0, ge=0, description="pull toward the average")


@dataclass(frozen=True)
class Kronecker(Operator):
    outputs: Tensor
    inputs: Tensor

    def apply(self, difference: Tensor) -> Tensor:
        return self.outputs @ difference @ self.inputs


def _treat(fact, options):  # type: ignore[no-untyped-def]
    return "kronecker" if fact.in_base and fact.grams and all(fact.grams) else "no Gram matrix in the statistics"


def _metric(unit, share, options):  # type: ignore[no-untyped-def]
    (name,), (fact,) = unit.names, unit.facts
    change = as_matrix(share.tensor(name).double() - share.base(name), fact)
    outputs = change @ change.T / len(change) + torch.eye(len(change), dtype=torch.float64)
    return Kronecker(outputs, share.gram(name).double())


KRONECKER = LeastSquares(
    name="kronecker",
    title="Kronecker",
    summary="least squares on inputs and outputs; needs statistics and the base model",
    needs=Needs(base=True, statistics="gram"),
    options=KroneckerOptions.model_validate({}),
    treat=_treat,
    rules={"kronecker": Rule(Kronecker, _metric)},
)
