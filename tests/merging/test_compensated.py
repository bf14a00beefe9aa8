"""Sums of two float64 numbers each."""

from __future__ import annotations

from fractions import Fraction

import torch

from merganser.merging.ledger.compensated import accumulate


def test_compensated_sums_hold_twice_the_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [
        torch.randn(70_000, dtype=torch.float64, generator=generator) * 10.0**exponent for exponent in (0, 9, -7, 3)
    ]
    high, low = torch.zeros(70_000, dtype=torch.float64), torch.zeros(70_000, dtype=torch.float64)
    for term in terms:
        accumulate(high, low, term)
    for entry in (0, 1, 40_000, 69_999):
        exact = sum(Fraction(float(term[entry])) for term in terms)
        found = Fraction(float(high[entry])) + Fraction(float(low[entry]))
        assert abs(found - exact) <= abs(exact) * Fraction(2) ** -100
        assert float(exact) == float(high[entry])
    other_high, other_low = high.clone(), low.clone()
    accumulate(high, low, other_high, other_low)
    assert torch.equal(high, 2 * other_high) and torch.equal(low, 2 * other_low)
    accumulate(high, low, -other_high, -other_low)
    for term in terms:
        accumulate(high, low, -term)
    assert float(high.abs().max()) < 1e9 * 2.0**-100
