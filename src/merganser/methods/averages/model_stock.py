"""Model Stock (Jang et al. 2024, arXiv 2403.19522): the average, drawn to the base as far as the models disagree.

Fine-tunes lie about a centre at equal distances and angles, so that their cosine c, seen from the base, tells where
on the line from the base to their average the point nearest to the centre is: at N·c / (1 + (N − 1)·c).
With unequal coefficients N is (Σcᵢ)² / Σcᵢ², and pairs count by the product of theirs: the same derivation gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from pydantic import Field

from merganser.methods.averages.span import Combination, Numbers, Vectors, lengths, spanned
from merganser.methods.base import Needs, Options

_SINGULAR = 1e-6  # of 1 + (N − 1)·c
_NOTHING = 1e-12  # of the largest coefficient: a model with less does not take part


class ModelStockOptions(Options):
    """Options of :data:`MODEL_STOCK`."""

    row_wise: bool = Field(False, description="an angle, and so a ratio, for each row of a tensor")
    clamp: bool = Field(
        True, description="stay at the base where the models point apart, instead of going to the other side of it"
    )


def _stock(gram: np.ndarray, coefficients: Sequence[float], options: ModelStockOptions) -> Combination:
    shares = np.array(coefficients) / sum(coefficients)
    reference = int(np.argmax(shares))
    taken = [number for number, share in enumerate(shares) if share > _NOTHING * shares[reference]]
    if len(taken) < 2:
        return Combination(reference, list(shares), note="a model alone has no angle to another, and stays as it is")
    cosine = _mean_cosine(gram, taken, shares)
    many = 1 / float(shares @ shares)
    divisor = 1 + (many - 1) * cosine
    defined = np.abs(divisor) > _SINGULAR
    ratio = np.where(defined, many * cosine / np.where(defined, divisor, 1.0), 0.0)
    note = None
    if np.any(ratio < 0) or not np.all(defined):
        if options.clamp:
            ratio = np.maximum(ratio, 0.0)
        what = "those of the base" if options.clamp else "beyond the base"
        note = f"the models' changes point apart: {'some rows' if options.row_wise else 'all numbers'} are {what}"
    return Combination(reference, list(shares), pull=1 - ratio, note=note)


def _mean_cosine(gram: np.ndarray, taken: Sequence[int], shares: np.ndarray) -> Numbers:
    """The weighted mean cosine of all pairs of task vectors; of one that is zero, 0.

    Args:
        gram: (T, T) or (T, T, rows), inner products of δ₁ and of δᵢ − δ₁.
        taken: which contributors count.
        shares: of all of them.
    """

    def inner(i: int, j: int) -> Numbers:
        found = gram[0, 0]
        found = found + gram[0, i] if i else found
        found = found + gram[0, j] if j else found
        return found + gram[i, j] if i and j else found

    sizes = lengths(gram)
    total, weight = 0.0, 0.0
    for i, j in combinations(taken, 2):
        product = sizes[i] * sizes[j]
        some = product > 0
        cosine = np.where(some, inner(i, j) / np.where(some, product, 1.0), 0.0)
        total = total + shares[i] * shares[j] * np.clip(cosine, -1.0, 1.0)
        weight += shares[i] * shares[j]
    return total / weight


def _vectors(options: ModelStockOptions) -> Vectors:
    return "rows" if options.row_wise else "whole"


MODEL_STOCK = spanned(
    name="model_stock",
    title="Model Stock",
    summary="the average, drawn to the base model as far as the models disagree",
    formula="t·Σcᵢθᵢ/Σcᵢ + (1−t)·θ₀, t = N·c/(1+(N−1)·c), c the mean cosine of two δᵢ, N = (Σcᵢ)²/Σcᵢ²",
    reference="Jang et al. 2024, arXiv 2403.19522",
    needs=Needs(base=True, at_least=2),
    options=ModelStockOptions.model_validate({}),
    weigh=_stock,
    vectors=_vectors,
)
