"""The weighted average where rounding decides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from merganser.methods.base import average


@dataclass
class Held:
    """A share of one tensor."""

    value: Tensor
    coefficient: float = 1.0

    def stored(self, name: str) -> Tensor:
        return self.value.clone()


def neighbours(number: int, dtype: torch.dtype) -> list[Tensor]:
    """Tensors a few units in the last place apart, as fine-tunes in low precision are."""
    generator = torch.Generator().manual_seed(number)
    base = torch.randn(20_000, generator=generator).to(dtype).view(torch.int16)
    steps = torch.randint(-3, 4, (number, 20_000), generator=generator).to(torch.int16)
    return [(base + step).view(dtype) for step in steps]


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_a_mean_of_stored_numbers_is_rounded_as_the_exact_one(
    number: int, dtype: torch.dtype, coefficient: float
) -> None:
    stored = neighbours(number, dtype)
    exact = torch.stack([one.double() for one in stored]).sum(0) / number
    found = average("w", [Held(one, coefficient) for one in stored])  # type: ignore[arg-type]
    assert torch.equal(found.to(dtype), exact.to(dtype))


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
def test_halves_and_wider_numbers_are_averaged_together(other: torch.dtype) -> None:
    one, two = neighbours(2, torch.bfloat16)
    three = torch.randn(20_000, generator=torch.Generator().manual_seed(9)).to(other)
    expected = (one.double() + three.double() + two.double()) / 3
    found = average("w", [Held(one), Held(three), Held(two)])  # type: ignore[arg-type]
    assert found.dtype == other
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (0.3, 0.1, 2.5), (2.0, -1.0, 0.5)])
def test_a_model_averaged_with_itself_is_the_same(coefficients: tuple[float, ...]) -> None:
    stored = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(average("w", [Held(stored, c) for c in coefficients]), stored)  # type: ignore[arg-type]


def test_coefficients_and_wider_storage_count() -> None:
    one, two, three = torch.ones(4), torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), 5.0)
    found = average("w", [Held(one, 0.5), Held(two, 1.5), Held(three, 2.0)])  # type: ignore[arg-type]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.full((4,), (0.5 + 3.0 + 10.0) / 4, dtype=torch.float64))
