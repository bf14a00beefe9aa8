"""What a contributor adds to the sums of one part of the model, and what the sums are solved to.

Every metric of the ledger's methods gives sums over contributors: a Gram matrix G, a diagonal m, or nothing (the
average). All differences are from the base model R, which every site has, so that sites need nothing of each other:

    gram      Σ cG (packed upper triangle)    Σ c(W − R)G    Σ c(W − R)
    diagonal  Σ cm                            Σ cm(θ − R)    Σ c(θ − R)
    average                                                  Σ c(θ − R)
"""

from __future__ import annotations

import torch
from torch import Tensor

from merganser.merging.ledger.record import LedgerPart, Treatment
from merganser.methods import GramSums, Merged, Share, Unit
from merganser.methods.base import input_width
from merganser.methods.least_squares import LeastSquares
from merganser.methods.metrics import Diagonal, Gram, Identity, Metric
from merganser.tensors import pack_upper, unpack_upper

Terms = dict[str, Tensor]

_TREATMENTS: dict[type[Metric], Treatment] = {Gram: "gram", Diagonal: "diagonal", Identity: "average"}


def treatment(method: LeastSquares, unit: Unit) -> Treatment:
    """Which sums are kept of a unit."""
    return _TREATMENTS[method.form(unit)]


def contribution(method: LeastSquares, part: LedgerPart, unit: Unit, share: Share) -> Terms:
    """The terms of one contributor, float64.

    The same files give the same bits, but for products with Gram matrices, whose last bits depend on the machine.
    """
    if part.treatment == "gram":
        sums = GramSums()
        method.add(unit, BaseShare(share, unit), sums)
        method.add(unit, share, sums)
        terms = sums.tensors()
        return {"system": pack_upper(terms["system"]), "right": terms["right"], "offset": terms["offset"]}
    if part.treatment == "copy":
        return {}
    (name,) = unit.names
    difference = share.tensor(name).to(torch.float64) - share.base(name)
    if part.treatment == "average":
        return {"offset": difference * share.coefficient}
    metric = method.diagonal(unit, share).to(torch.float64) * share.coefficient
    return {"metric": metric, "right": metric * difference, "offset": difference * share.coefficient}


def solve(method: LeastSquares, part: LedgerPart, unit: Unit, sums: Terms, total: float, base: Share) -> Merged:
    """The merged tensors of a part, float64.

    Args:
        method: with its options.
        part: how the part is treated.
        unit: its tensors.
        sums: over all contributors, see the module; may be used up.
        total: the sum of the coefficients.
        base: a share whose tensors are the base model's.
    """
    if part.treatment == "gram":
        gram = GramSums()
        method.add(unit, BaseShare(base, unit), gram)
        gram.system, gram.right, gram.offset = unpack_upper(sums["system"]), sums["right"], sums["offset"]
        gram.total = total
        return method.solve(unit, gram)
    (name,) = unit.names
    merged = sums["offset"].div_(total)
    if part.treatment == "diagonal":
        if method.toward_base:
            merged.zero_()
        metric = sums["metric"]
        correction = sums["right"] - metric * merged
        weight = metric + method.ridge * metric.mean()
        merged += torch.where(weight > 0, correction / weight.clamp_min(1e-300), 0.0)
    return Merged({name: merged.add_(base.base(name))})


def shapes(method: LeastSquares, part: LedgerPart) -> dict[str, tuple[int, ...]]:
    """The shape of each term of a part, from shapes alone."""
    share = ShapesOnly(part)
    terms = contribution(method, part, part.unit(), share)
    return {name: tuple(tensor.shape) for name, tensor in terms.items()}


class _Whole:
    """Tensors that are there at once."""

    def tensor(self, name: str) -> Tensor:
        """The tensor."""
        raise NotImplementedError

    def stored(self, name: str) -> Tensor:
        """The same."""
        return self.tensor(name)

    def base(self, name: str) -> Tensor:
        """The base model's is the same."""
        return self.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it."""
        return self.tensor(name)[start:stop]

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it."""
        return self.tensor(name)[start:stop]

    def activations(self, weight: str) -> Tensor:
        """None: no ledger keeps sums of them."""
        raise NotImplementedError


class BaseShare(_Whole):
    """The base model as a contributor without weight or statistics: what differences are taken from.

    Args:
        share: of a contributor, for its base.
        unit: the tensors.
    """

    number, coefficient = 0, 0.0

    def __init__(self, share: Share, unit: Unit) -> None:
        self._share = share
        self._widths = {fact.name: input_width(fact) for fact in unit.facts if fact.layer}

    def tensor(self, name: str) -> Tensor:
        """The base model's."""
        return self._share.base(name)

    def gram(self, weight: str) -> Tensor:
        """Zeros."""
        width = self._widths[weight]
        return self._share.base(weight).new_zeros(width, width)

    def mean(self, weight: str) -> Tensor:
        """Zeros."""
        return self._share.base(weight).new_zeros(self._widths[weight])

    def gradients(self, weight: str) -> Tensor:
        """No ledger keeps what needs it."""
        raise NotImplementedError

    def count(self, weight: str) -> Tensor:
        """Zeros."""
        return self._share.base(weight).new_zeros(len(self._share.base(weight)))

    def fisher(self, name: str) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self._share.base(name))


class ShapesOnly(_Whole):
    """A share of tensors that have shapes but no numbers.

    Args:
        part: the tensors.
    """

    number, coefficient = 0, 1.0

    def __init__(self, part: LedgerPart) -> None:
        self._shapes = dict(zip(part.names, part.shapes, strict=True))
        self._kinds = {layer.weight: layer.kind for layer in part.layers}

    def tensor(self, name: str) -> Tensor:
        """Of its shape."""
        return torch.empty(self._shapes[name], dtype=torch.float32, device="meta")

    fisher = tensor

    def gram(self, weight: str) -> Tensor:
        """Square."""
        return self.mean(weight).new_empty(*self.mean(weight).shape, *self.mean(weight).shape)

    def mean(self, weight: str) -> Tensor:
        """One number an input."""
        return self.tensor(weight)[:, 0] if self._kinds[weight] == "conv1d" else self.tensor(weight)[0]

    def gradients(self, weight: str) -> Tensor:
        """No ledger keeps what needs it."""
        raise NotImplementedError

    def count(self, weight: str) -> Tensor:
        """One number a row."""
        return self.tensor(weight)[:, 0].to(torch.float64)
