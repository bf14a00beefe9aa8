"""The k-th largest of large tensors against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.methods import selection
from merganser.methods.selection import kth_largest


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32), min_size=1, max_size=60),
    st.integers(1, 4),
    st.data(),
)
def test_the_kth_largest_is_exact_however_the_sample_turns_out(
    numbers: list[float], width: int, data: st.DataObject
) -> None:
    height = -(-len(numbers) // width)
    numbers += [0.0] * (height * width - len(numbers))
    k = data.draw(st.integers(1, len(numbers)))
    first = torch.tensor(numbers, dtype=torch.float32).view(height, width)
    both = [first, torch.ones_like(first)]
    expected = [first.abs().flatten().sort(descending=True).values[k - 1].item(), 1.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PIECE", 7)
        patch.setattr(selection, "_SAMPLE", 6)
        patch.setattr(selection, "_PLACES", 3)
        found = kth_largest(lambda start, stop: [t[start:stop] for t in both], height, width, [k, k])
    assert found == expected
    assert kth_largest(lambda start, stop: both, height, width, [0, 0]) == [float("inf")] * 2


def test_a_sample_too_small_to_say_anything_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIECE", 7), ("_SAMPLE", 6), ("_PLACES", 3)):
        monkeypatch.setattr(selection, name, value)
    numbers = torch.arange(60.0).view(60, 1)
    for k in range(1, 61):
        assert kth_largest(lambda start, stop: [numbers[start:stop]], 60, 1, [k]) == [60.0 - k]


def test_large_tensors_are_bracketed_and_not_gone_through_twice() -> None:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(3000, 500, generator=generator).abs()
    seen = [0]

    def magnitudes(start: int, stop: int) -> list[Tensor]:
        seen[0] += stop - start
        return [numbers[start:stop]]

    found = kth_largest(magnitudes, 3000, 500, [300_000])
    assert found == [numbers.flatten().topk(300_000).values[-1].item()]
    assert seen[0] <= 3000 + 16 * 4 + 16


@pytest.mark.parametrize("share", [0.0005, 0.2, 0.5, 0.9, 0.9999])
def test_differences_of_bfloat16_numbers_are_gone_through_once(share: float) -> None:
    """Many are equal, and the sample's bounds are far apart."""
    generator = torch.Generator().manual_seed(5)
    base = (torch.randn(2000, 500, generator=generator) * 0.02).to(torch.bfloat16)
    noise = torch.randn(2000, 500, generator=generator) * 1e-4
    numbers = ((base + noise).to(torch.bfloat16).float() - base.float()).abs()
    seen = [0]

    def magnitudes(start: int, stop: int) -> list[Tensor]:
        seen[0] += stop - start
        return [numbers[start:stop]]

    k = round(share * numbers.numel())
    found = kth_largest(magnitudes, 2000, 500, [k])
    assert found == [numbers.flatten().topk(k).values[-1].item()]
    assert seen[0] <= 2000 + 16 * 4 + 16


@given(
    st.lists(st.floats(0, width=32, allow_nan=False), min_size=1, max_size=40),
    st.lists(st.floats(0, width=32, allow_nan=False), min_size=2, max_size=2),
    st.data(),
)
@settings(deadline=None)
def test_bounds_come_closer_and_stay_around_the_answer(
    numbers: list[float], ends: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    answer, (low, high) = sorted(numbers, reverse=True)[k - 1], sorted(ends)
    for _ in range(3):
        one = selection.Between(low, high)
        one.count(torch.tensor(numbers))
        low, high = one.closer(k)
        assert low <= answer <= high
    assert low == high


def test_a_place_may_depend_on_how_many_numbers_are_not_0(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.rand(60, 50, generator=torch.Generator().manual_seed(0))
    numbers[numbers < 0.6] = 0
    expected = numbers[numbers > 0].sort(descending=True).values
    for piece in (selection.PIECE, 500):
        monkeypatch.setattr(selection, "PIECE", piece)
        for share in (0.1, 0.5, 1.0, 0.0):
            (found,) = kth_largest(lambda a, b: [numbers[a:b]], 60, 50, [lambda n: int(share * n)])  # noqa: B023
            assert found == (float(expected[int(share * len(expected)) - 1]) if share else float("inf"))
