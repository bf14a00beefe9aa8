"""What runs on another device gives what compiled loops give on the processor, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.checkpoints.layers import Layer
from merganser.methods import METHODS, Facts, devices, kernels, selection
from merganser.methods.elementwise import Position, difference
from merganser.methods.selection import kth_largest
from methods.in_memory import InMemory
from other_device import DEVICE, OtherDevice

KEY = (0xDEADBEEF, 0x81234567)


@pytest.mark.parametrize("pairs", [1024, 4096, devices.PAIRS])
@pytest.mark.parametrize("start", [0, 1, 1023, 4095, 70_001, 2**33 - 3001, 2**45 + 777])
@pytest.mark.parametrize("count", [1, 1025, 9001])
def test_random_words_are_those_of_the_kernels(
    pairs: int, start: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a run starts, also where the counter's lower half is full, and however it is cut."""
    monkeypatch.setattr(devices, "PAIRS", pairs)
    expected = np.empty(count, dtype=np.uint32)
    kernels.draw(expected, np.uint32(KEY[0]), np.uint32(KEY[1]), start)
    found = np.zeros(count, dtype=np.uint32)
    for here, words in devices.draw(KEY, start, count, torch.device("cpu")):
        assert words.dtype == torch.int32
        found[here] = words.numpy().view(np.uint32)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("chance", [0.0, 2.0**-24, 0.3, 0.5, 0.7, 1 - 2.0**-24, 1.0])
@pytest.mark.parametrize("rows", [range(3, 40), [0, 1, 2, 17, 30, 31]])
def test_what_is_drawn_elsewhere_is_what_is_drawn_here(chance: float, rows: Any) -> None:
    place = Position("w", rows, [2, 5])
    delta = torch.randn(len(rows), 701, generator=torch.Generator().manual_seed(0))
    with OtherDevice():
        far = delta.to(DEVICE)
        uniform = place.uniform(far, 1, 3).cpu()
        drawn = place.drawn(far, 1, 3, chance, 0.7).cpu()
    assert torch.equal(uniform, place.uniform(delta, 1, 3))
    assert torch.equal(drawn, place.drawn(delta, 1, 3, chance, 0.7))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.lists(st.floats(0, width=32, allow_nan=False), min_size=2, max_size=2),
    st.booleans(),
)
def test_counts_are_those_of_the_kernels(numbers: list[float], ends: list[float], wide: bool) -> None:
    values, (low, high) = torch.tensor(numbers, dtype=torch.float32), sorted(ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_BINS", 1 << 20 if wide else 1 << 4)
        here, there = selection.Between(low, high), selection.Between(low, high)
    here.count(values)
    bounds = (int(np.float32(bound).view(np.int32)) for bound in (low, high))
    beside = devices.count_between(values, *bounds, there._shift, there._first, there._counts, there._mixed)
    assert torch.equal(here._beside, beside)
    assert torch.equal(here._counts, there._counts)
    assert torch.equal(here._mixed, there._mixed)


@pytest.mark.parametrize("halves", [True, False])
def test_the_kth_largest_is_found_elsewhere(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several pieces, by a sample that is too small to be right, of numbers of which many are equal."""
    for module, name, value in ((selection, "PIECE", 700), (selection, "_SAMPLE", 64), (devices, "PIECE", 1500)):
        monkeypatch.setattr(module, name, value)
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(101, 60, generator=draw)
    moved = base + torch.randn(101, 60, generator=draw) * 0.01
    numbers = moved.bfloat16().float() - base.bfloat16().float() if halves else moved - base
    descending = numbers.abs().flatten().sort(descending=True).values
    ks = [1, 2, 60, 1200, 3030, 5000, numbers.numel()]
    varying = int((numbers != 0).sum())
    with OtherDevice():
        far = numbers.to(DEVICE)
        for height in (101, 5):  # in pieces, and at once
            places = [min(k, height * 60) for k in ks]
            found = kth_largest(lambda start, stop: [far[start:stop]] * len(ks), height, 60, [0, *places[1:]])
            expected = numbers[:height].abs().flatten().sort(descending=True).values
            assert found == [float("inf"), *(float(expected[k - 1]) for k in places[1:])]
        assert kth_largest(lambda a, b: [far[a:b]], 101, 60, [lambda n: n]) == [float(descending[varying - 1])]


def test_ranks_elsewhere_are_those_of_the_kernels() -> None:
    """Of equal magnitudes the first comes first."""
    from merganser.methods.task_vectors import della

    rows = torch.randint(-3, 4, (13, 50), generator=torch.Generator().manual_seed(2)).float()
    given_ = torch.linspace(0.1, 0.9, 50)
    assert torch.equal(devices.give_by_rank(rows, given_), della._by_rank(rows, given_))


def test_a_difference_of_halves_is_taken_at_once() -> None:
    draw = torch.Generator().manual_seed(3)
    stored, base = torch.randn(7, 9, generator=draw), torch.randn(7, 9, generator=draw)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        with OtherDevice():
            found = difference(stored.to(dtype).to(DEVICE), base.to(DEVICE)).cpu()
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(found, stored.to(dtype).to(found.dtype) - base)


CASES: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.7},
    "dare_linear": {"density": 0.6, "normalize": True},
    "della": {},
    "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.4, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.05, "whole": True},
    "magmax": {},
    "sce": {"density": 0.3},
    "pcb": {},
    "consensus": {},
    "arcee_fusion": {},
}


@pytest.mark.parametrize("shape", [(40, 30), (1, 37), (37,)])
@pytest.mark.parametrize("method", [name for name in CASES if name in METHODS])
def test_a_merge_elsewhere_is_the_merge_here(
    method: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One contributor counts against its direction. What is kept is the same, so only sums may round otherwise."""
    for module, name, value in ((selection, "PIECE", 300), (selection, "_SAMPLE", 64), (devices, "PIECE", 500)):
        monkeypatch.setattr(module, name, value)
    draw = torch.Generator().manual_seed(4)
    base = torch.randn(shape, generator=draw)
    weights = [base + torch.randn(shape, generator=draw) * 0.1 for _ in range(3)]
    chosen = METHODS[method]
    chosen = chosen.configured(type(chosen.options).model_validate(CASES[method]))
    fact = Facts("w", shape, Layer("m", "linear", "w", None, False) if len(shape) > 1 else None, in_base=True)
    (unit,), _ = chosen.units([fact])
    count = 1 if method == "arcee_fusion" else 3

    def merged(move: Callable[[Tensor], Tensor]) -> Tensor:
        given_ = zip(range(count), (1.0, -0.5 if chosen.needs.signed else 0.5, 2.0), weights, strict=False)
        return chosen.merge(unit, [InMemory(n, c, move(w), move(base)) for n, c, w in given_]).tensors["w"]

    here = merged(torch.Tensor.clone)
    with OtherDevice():
        far = merged(lambda tensor: tensor.to(DEVICE))
        assert str(far.device) == DEVICE
        back = far.cpu()
    torch.testing.assert_close(here, back, rtol=1e-6, atol=1e-6)
    assert shape != (40, 30) or not torch.equal(here, base)
