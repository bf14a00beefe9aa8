"""Compiled loops against plain numpy and Python, and masks that do not depend on how they are computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merganser.methods import kernels
from merganser.methods.averages import span
from merganser.methods.elementwise import Position, difference
from merganser.methods.task_vectors import sce, sparsified

_FULL = 2**32 - 1
_TURNS = (13, 15, 26, 6, 17, 29, 16, 24)


def threefry(counter: int, key: tuple[int, int], rounds: int) -> tuple[int, int]:
    """Threefry-2x32 as Salmon et al. 2011 write it down, in Python's own integers."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    one, two = (counter + key[0]) & _FULL, ((counter >> 32) + key[1]) & _FULL
    for number in range(rounds):
        one = (one + two) & _FULL
        turn = _TURNS[number % 8]
        two = ((two << turn | two >> (32 - turn)) & _FULL) ^ one
        if number % 4 == 3:
            injection = number // 4 + 1
            one = (one + keys[injection % 3]) & _FULL
            two = (two + keys[(injection + 1) % 3] + injection) & _FULL
    return one, two


def test_the_reference_gives_the_published_answers() -> None:
    assert threefry(0, (0, 0), 20) == (0x6B200159, 0x99BA4EFE)
    assert threefry(0x85A308D3243F6A88, (0x13198A2E, 0x03707344), 20) == (0xC4923A9C, 0x483DF7A0)


@pytest.mark.parametrize("start", [0, 1, 1023, 2048, 70_001, 2**45 + 777])
def test_random_words_are_those_of_the_published_generator(start: int) -> None:
    """Pairs of 1,024 counters come one after the other: first words, then second ones."""
    key = (0xDEADBEEF, 0x01234567)
    found = np.empty(5000, dtype=np.uint32)
    kernels.draw(found, np.uint32(key[0]), np.uint32(key[1]), start)
    for place in (0, 1, 1022, 1025, 2047, 2049, 4999):
        tile, within = divmod(start + place, 2048)
        assert found[place] == threefry(tile * 1024 + within % 1024, key, 13)[within // 1024]


def test_random_numbers_are_even_and_not_alike() -> None:
    """Means, and correlations between contributors, seeds, tensors and neighbours, within five standard deviations."""
    count = 400_000
    like = torch.empty(count)
    places = [Position(name, range(count), [0, 1]) for name in ("a", "b")]
    streams = [places[0].uniform(like, 0, 7), places[0].uniform(like, 1, 7), places[1].uniform(like, 0, 7)]
    streams += [places[0].uniform(like, 0, 8), streams[0].roll(1), streams[0].roll(1024)]
    values = torch.stack(streams).double().numpy()
    assert (values >= 0).all() and (values < 1).all()
    assert abs(values.mean(1) - 0.5).max() < 5 * (1 / 12 / count) ** 0.5
    assert abs(np.corrcoef(values) - np.eye(len(values))).max() < 5 / count**0.5
    counts = np.bincount((values[0] * 1000).astype(int), minlength=1000)
    assert abs(((counts - count / 1000) ** 2 / (count / 1000)).sum() - 999) < 5 * (2 * 999) ** 0.5


@pytest.mark.parametrize("chance", [0.0, 1e-9, 2.0**-24, 0.3, 0.999999, 1 - 2.0**-24, 1 - 2.0**-40, 1.0])
@pytest.mark.parametrize("rows", [range(3, 40), [0, 1, 2, 17, 30, 31]])
def test_what_is_drawn_is_what_is_below_the_chance_wherever_it_is_computed(chance: float, rows: list[int]) -> None:
    rng = np.random.default_rng(0)
    place = Position("w", rows, [2, 5])
    delta = torch.from_numpy(rng.normal(size=(len(rows), 700)).astype(np.float32))
    below = place.uniform(delta, 1, 3).numpy() < np.float32(chance)
    expected = np.where(below, delta.numpy() / np.float32(0.7), 0)
    found = place.drawn(delta.clone(), 1, 3, chance, 0.7)
    assert np.array_equal(found.numpy(), expected)
    wide = place.drawn(delta.double(), 1, 3, chance, 0.7)  # which no kernel takes
    assert np.allclose(wide.numpy(), expected, rtol=1e-6, atol=0)


def test_differences_of_halves_are_those_of_wide_numbers() -> None:
    rng = np.random.default_rng(1)
    stored = torch.from_numpy(rng.normal(size=(5, 300))).to(torch.bfloat16)
    stored[0, :4] = torch.tensor([0.0, -0.0, 1e-40, -3e38], dtype=torch.bfloat16)
    base = torch.from_numpy(rng.normal(size=(5, 300)).astype(np.float32))
    assert torch.equal(difference(stored, base), stored.float() - base)
    assert torch.equal(difference(stored.T[7:], base.T[7:]), (stored.float() - base).T[7:])
    assert torch.equal(difference(stored.half(), base), stored.half().float() - base)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_election_is_the_same_with_and_without_kernels(normalize: bool) -> None:
    """In float64, by torch, it is also what the definition says."""
    rng = np.random.default_rng(2)
    deltas = rng.normal(size=(4, 3000)).astype(np.float32) * rng.integers(0, 2, size=(4, 3000))
    deltas[:, :5] = 0
    deltas[:, 5] = [1, -1, 0, 0]  # which cancel out: positive
    coefficients, weights = [1.0, 1.0, -0.5, 2.0], [0.5, 1.0, 0.25, 3.0]
    expected = np.zeros(3000)
    for place in range(3000):
        numbers = deltas[:, place].astype(np.float64)
        sign = 1 if float(np.dot(coefficients, numbers)) >= 0 else -1
        own = [n * np.sign(c) for n, c in zip(numbers, coefficients, strict=True)]
        agreeing = [(w, n) for w, n in zip(weights, own, strict=True) if n * sign > 0]
        total = sum(w * n for w, n in agreeing)
        expected[place] = total / sum(w for w, _ in agreeing) if normalize and agreeing else total
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        tensors = [torch.from_numpy(delta).to(dtype) for delta in deltas]
        found = sparsified.elect(iter(tensors), tensors[0], coefficients, normalize, weights)
        assert np.allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_the_spread_is_the_variance_times_the_number() -> None:
    deltas = [torch.from_numpy(one) for one in np.random.default_rng(3).normal(size=(5, 3000))]
    expected = np.var(torch.stack(deltas).numpy(), axis=0) * 5
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        found = sce._spread([delta.to(dtype).reshape(30, 100) for delta in deltas])
        assert found.shape == (30, 100)
        assert np.allclose(found.flatten().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 2, 7, 255, 256, 257, 5000])
@pytest.mark.parametrize("digits", [0, 2, 7])  # few of them make many magnitudes equal
def test_ranks_are_those_of_a_stable_sort(width: int, digits: int) -> None:
    draw = np.random.default_rng(width)
    rows = np.round(draw.normal(size=(5, width)), digits).astype(np.float32)
    rows[1] *= np.float32(10.0) ** draw.integers(-45, 38, width).astype(np.float32)  # with zeros and subnormal numbers
    rows[2, ::3], rows[2, 1::3] = -0.0, np.inf
    given, found = np.arange(width, dtype=np.float32), np.empty_like(rows)
    kernels.give_by_rank(rows, given, found)
    order = np.abs(rows).argsort(axis=1, kind="stable")
    assert (np.take_along_axis(found, order, axis=1) == given).all()


def test_kernels_work_where_nothing_can_be_written(tmp_path: Path) -> None:
    """What is compiled is then compiled for each process."""
    lines = (
        "import numba.core.caching as caching",
        "caching.CacheImpl._locator_classes = []",
        "import numpy as np",
        "from merganser.methods import kernels",
        "delta = np.array([1, -2, 3], dtype=np.float32)",
        "kernels.keep_between(delta, np.float32(1.5), np.float32(2.5))",
        "assert delta.tolist() == [0, -2, 0]",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pull", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("vectors", ["whole", "rows"])
def test_a_combination_is_the_same_with_and_without_kernels(dtype: torch.dtype, pull: float, vectors: Any) -> None:
    rng = np.random.default_rng(4)
    base = torch.from_numpy(rng.normal(size=(7, 1500)).astype(np.float32))
    tensors = [(base + torch.from_numpy(rng.normal(size=(7, 1500)) / 10)).to(dtype) for _ in range(3)]
    weights = [rng.normal(size=7 if vectors == "rows" else ()) for _ in range(3)]
    for origin in (base, None):
        chosen = span.Combination(1, weights, 0.25, pull)
        columns = [np.reshape(weight, (-1, 1)) for weight in weights]
        theirs = [tensor.double().numpy() for tensor in tensors]
        start = 0 if origin is None else base.double().numpy()
        expected = theirs[1] + sum(columns[i] * (theirs[i] - theirs[1]) for i in (0, 2)) + 0.25 * (theirs[1] - start)
        if origin is not None:
            expected = (1 - pull) * expected + pull * start
        found = span.combined([tensor.clone() for tensor in tensors], origin, chosen, vectors)
        assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
        wide = span.combined([tensor.double() for tensor in tensors], origin, chosen, vectors)  # no kernel takes it
        assert np.allclose(wide.numpy(), expected, rtol=1e-7, atol=1e-7)


def test_tensors_of_any_layout_and_dtype_have_the_same_inner_products() -> None:
    """Kernels are told where numbers lie: rows that are not in a row, float16 and a mixture are put in order before."""
    rng = np.random.default_rng(5)
    shape = (6, 5000)
    first = torch.from_numpy(rng.normal(size=shape)).to(torch.bfloat16)
    second = torch.from_numpy(rng.normal(size=shape[::-1])).to(torch.bfloat16).T
    third = torch.from_numpy(rng.normal(size=(6, 10_000))).to(torch.float16)[:, ::2]
    for tensors in ([first, second], [first, second, third], [second, first.float()], [third, third.clone()]):
        theirs = [tensor.double().numpy() for tensor in tensors]
        basis = [theirs[0], *(other - theirs[0] for other in theirs[1:])]
        expected = np.array([[(one * two).sum(1) for two in basis] for one in basis])
        found = span._gram_of_rows(tensors, None, shape[0])
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-2)
        mean = span.combined(tensors, None, span.Combination(0, [1 / len(tensors)] * len(tensors)), "whole")
        assert np.allclose(mean.numpy(), np.mean(theirs, 0), rtol=1e-5, atol=1e-5)
