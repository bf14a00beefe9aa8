"""Methods that thin task vectors or choose among them, against float64 oracles written from the papers.

What is drawn at random is checked twice: by what the papers say of the masks, and by merging again with the masks
that were drawn, which show in the merge of a single contributor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from merganser.methods import METHODS, Facts, Unit
from merganser.methods.elementwise import Position
from methods.in_memory import InMemory

Array = np.ndarray[Any, np.dtype[np.float64]]
C = [1.0, 2.0, 0.5]


def merged(method: str, base: Tensor, tuned: Sequence[Tensor], c: Sequence[float], **options: Any) -> Array:
    chosen = METHODS[method]
    unit = Unit(("w",), method, (Facts("w", tuple(base.shape), in_base=True),))
    shares = [InMemory(n, one, tensor, base) for n, (tensor, one) in enumerate(zip(tuned, c, strict=True))]
    found = chosen.configured(chosen.options_type(**options)).merge(unit, shares).tensors["w"]  # type: ignore[arg-type]
    return found.double().numpy()


def family(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    return base, [base + 0.1 * torch.randn(shape, generator=draw) for _ in range(count)]


def deltas_of(base: Tensor, tuned: Sequence[Tensor]) -> list[Array]:
    return [tensor.double().numpy() - base.double().numpy() for tensor in tuned]


def elected(kept: Sequence[Array], c: Sequence[float], *, mean: bool, weights: Sequence[float] | None = None) -> Array:
    """The mean or sum of what has the sign of the weighted sum (Yadav et al. 2023, section 3)."""
    sign = np.where(sum(ci * d for ci, d in zip(c, kept, strict=True)) >= 0, 1.0, -1.0)
    top, bottom = np.zeros_like(kept[0]), np.zeros_like(kept[0])
    for ci, delta in zip(weights or c, kept, strict=True):
        top += ci * delta * (np.sign(delta) == sign)
        bottom += ci * (np.sign(delta) == sign)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0) if mean else top


def summed(kept: Sequence[Array], c: Sequence[float]) -> Array:
    return np.sum([ci * d for ci, d in zip(c, kept, strict=True)], axis=0)


def close(found: Array, expected: Array, base: Tensor) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert not np.allclose(expected, base.double().numpy(), atol=1e-3)  # something was merged


# What is dropped by magnitude.


def largest(delta: Array, density: float) -> Array:
    order = np.argsort(-np.abs(delta), axis=None)[: int(density * delta.size)]
    kept = np.zeros(delta.size)
    kept[order] = delta.ravel()[order]
    return kept.reshape(delta.shape)


def middle(delta: Array, density: float, gamma: float) -> Array:
    """Davari & Belilovsky 2024, section 3: without the γ largest, the β next."""
    keep = int(density * delta.size)
    drop = min(int(gamma * delta.size), delta.size - keep)
    order = np.argsort(-np.abs(delta), axis=None)[drop : drop + keep]
    kept = np.zeros(delta.size)
    kept[order] = delta.ravel()[order]
    return kept.reshape(delta.shape)


def as_before(kept: Array, delta: Array) -> Array:
    """Scaled up to the sum of magnitudes that the whole had."""
    return kept * np.abs(delta).sum() / np.abs(kept).sum()


def test_ties_is_scaled_up_to_what_the_tensor_had() -> None:
    base, tuned = family((40, 30))
    densities = (0.2, 0.5, 0.9)
    kept = [as_before(largest(d, k), d) for d, k in zip(deltas_of(base, tuned), densities, strict=True)]
    found = merged("ties", base, tuned, C, density=densities, rescale="l1", scale=0.7)
    close(found, base.double().numpy() + 0.7 * elected(kept, C, mean=True), base)


def test_a_density_of_zero_leaves_a_contributor_out() -> None:
    base, tuned = family((20, 15))
    for method in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        two = merged(method, base, tuned[:2], C[:2], density=(0.4, 1.0), epsilon=0.1) if method == "della" else None
        two = merged(method, base, tuned[:2], C[:2], density=(0.4, 1.0)) if two is None else two
        more = {"epsilon": 0.1} if method == "della" else {}
        three = merged(method, base, tuned, C, density=(0.4, 1.0, 0.0), **more)
        np.testing.assert_array_equal(two, three)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.15, 0.006), (0.9, 0.3), (1.0, 0.01), (0.01, 0.0)])
def test_breadcrumbs_keeps_the_middle(method: str, whole: bool, density: float, gamma: float) -> None:
    base, tuned = family((23, 40))
    kept = []
    for delta in deltas_of(base, tuned):
        rows = [delta] if whole else list(delta)
        kept.append(np.concatenate([middle(r.reshape(1, -1), density, gamma).reshape(-1, 40) for r in rows]))
    together = summed(kept, C) if method == "breadcrumbs" else elected(kept, C, mean=True)
    found = merged(method, base, tuned, C, density=density, gamma=gamma, whole=whole, scale=0.5)
    expected = base.double().numpy() + 0.5 * together
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.count_nonzero(kept[0]) == sum(int(density * n) for n in ([920] if whole else [40] * 23))


def test_breadcrumbs_of_each_contributor_and_scaled_up() -> None:
    base, tuned = family((9, 50))
    choices = list(zip((0.2, 0.5, 0.8), (0.1, 0.02, 0.0), strict=True))
    kept = [
        as_before(np.stack([middle(row, *choice) for row in delta]), delta)
        for delta, choice in zip(deltas_of(base, tuned), choices, strict=True)
    ]
    densities, gammas = zip(*choices, strict=True)
    found = merged("breadcrumbs", base, tuned, C, density=densities, gamma=gammas, rescale="l1")
    close(found, base.double().numpy() + 0.2 * summed(kept, C), base)


def test_rows_of_a_convolution_and_of_a_vector() -> None:
    for shape, height in (((6, 3, 5), 6), ((30,), 1)):
        base, tuned = family(shape, 1)
        (delta,) = deltas_of(base, tuned)
        rows = np.stack([middle(row, 0.4, 0.2) for row in delta.reshape(height, -1)]).reshape(shape)
        found = merged("breadcrumbs", base, tuned, [1.0], density=0.4, gamma=0.2, scale=1.0)
        close(found, base.double().numpy() + rows, base)


# What is dropped at random.


def drawn(method: str, shape: tuple[int, ...], number: int, **options: Any) -> Array:
    """What a method has put in place of a δ of ones at contributor ``number``, from the merge of it alone."""
    base = torch.zeros(shape)
    unit = Unit(("w",), method, (Facts("w", shape, in_base=True),))
    chosen = METHODS[method]
    share = InMemory(number, 1.0, torch.ones(shape), base)
    found = chosen.configured(chosen.options_type(scale=1.0, **options)).merge(unit, [share])  # type: ignore[list-item]
    return found.tensors["w"].double().numpy()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_dare_keeps_a_share_and_divides_by_it(density: float) -> None:
    kept = drawn("dare_linear", (400, 500), 0, density=density)
    share = np.count_nonzero(kept) / kept.size
    assert abs(share - density) < 5 * np.sqrt(density * (1 - density) / kept.size)
    np.testing.assert_allclose(np.unique(kept), [0, 1 / density], rtol=1e-6)
    columns, rows = (np.count_nonzero(kept, axis=axis) / kept.shape[axis] for axis in (0, 1))
    for mean, size in ((columns, 400), (rows, 500)):  # no row and no column is preferred
        assert 0.5 < np.var(mean) / (density * (1 - density) / size) < 1.7


def test_dare_draws_anew_for_each_contributor_and_seed() -> None:
    masks = [drawn("dare_linear", (100, 100), n, density=0.5, seed=s) > 0 for n, s in ((0, 0), (1, 0), (0, 1))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.mean(masks[first] == masks[second]) - 0.5) < 0.03


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_dare_equals_the_formula_with_the_masks_that_were_drawn(method: str, rescale: str) -> None:
    base, tuned = family((30, 41))
    densities = (0.3, 0.8, 1.0)
    kept = []
    for number, (delta, density) in enumerate(zip(deltas_of(base, tuned), densities, strict=True)):
        left = delta * (drawn("dare_linear", (30, 41), number, density=densities) > 0)
        kept.append({"expected": left / density, "l1": as_before(left, delta), "none": left}[rescale])
    together = summed(kept, C) if method == "dare_linear" else elected(kept, C, mean=True)
    found = merged(method, base, tuned, C, density=densities, rescale=rescale, scale=0.6)
    close(found, base.double().numpy() + 0.6 * together, base)


def keep_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """Deep et al. 2024, section 3.1, with ranks from 0 for the smallest of a row."""
    ranks = np.abs(delta).argsort(axis=1).argsort(axis=1)
    return density - epsilon + 2 * epsilon * ranks / (delta.shape[1] - 1)


def test_della_keeps_large_numbers_more_often_and_divides_by_the_probability() -> None:
    """By rank in the row, not by the number itself: rows differ in scale."""
    height, width, density, epsilon = 3000, 101, 0.6, 0.3
    draw = np.random.default_rng(0)
    delta = draw.normal(size=(height, width)) * np.exp(draw.normal(size=(height, 1)))
    base = torch.zeros(height, width)
    tuned = [torch.from_numpy(delta).float()]
    found = merged("della_linear", base, tuned, [1.0], density=density, epsilon=epsilon, scale=1.0)
    wanted = keep_probabilities(tuned[0].double().numpy(), density, epsilon)
    kept = found != 0
    np.testing.assert_allclose(found[kept], (tuned[0].double().numpy() / wanted)[kept], rtol=1e-5)
    ranks = np.abs(delta).argsort(axis=1).argsort(axis=1)
    for rank in (0, 25, 50, 75, 100):
        share, expected = np.mean(kept[ranks == rank]), 0.3 + 0.6 * rank / 100
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / height)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_della_equals_the_formula_with_the_masks_that_were_drawn(method: str, rescale: str) -> None:
    base, tuned = family((30, 41))
    options = {"density": (0.3, 0.5, 1.0), "epsilon": (0.2, 0.1, 0.3)}
    kept = []
    for number, delta in enumerate(deltas_of(base, tuned)):
        alone = [b if n != number else t for n, (b, t) in enumerate(zip([base] * 3, tuned, strict=True))]
        left = delta * (merged("della_linear", base, alone, [1.0] * 3, **options) != base.double().numpy())
        density, epsilon = options["density"][number], options["epsilon"][number]
        wanted = keep_probabilities(delta, density, epsilon) if density < 1 else 1.0
        kept.append({"expected": left / wanted, "l1": as_before(left, delta), "none": left}[rescale])
    together = summed(kept, C) if method == "della_linear" else elected(kept, C, mean=True)
    found = merged(method, base, tuned, C, rescale=rescale, scale=0.6, **options)
    close(found, base.double().numpy() + 0.6 * together, base)


def test_equal_magnitudes_rank_in_the_order_of_their_columns() -> None:
    base = torch.zeros(2, 4)
    tuned = [torch.tensor([[1.0, -1.0, 2.0, 1.0], [0.5, 0.5, 0.5, -0.5]])]
    found = merged("della_linear", base, tuned, [1.0], density=0.5, epsilon=0.3, scale=1.0)
    probabilities = np.array([[0.2, 0.4, 0.8, 0.6], [0.2, 0.4, 0.6, 0.8]])
    kept = found != 0
    assert kept.any()
    np.testing.assert_allclose(found[kept], (tuned[0].double().numpy() / probabilities)[kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), (0.05, 0.2), ((0.5, 0.95), 0.1), (0.5, (0.1, 0.49, 0.5))]
)
def test_probabilities_lie_between_0_and_1(density: Any, epsilon: Any) -> None:
    with pytest.raises(ValidationError, match="epsilon"):
        METHODS["della"].options_type(density=density, epsilon=epsilon)


def test_probabilities_of_different_numbers_of_contributors_are_refused() -> None:
    with pytest.raises(ValidationError, match="different numbers"):
        METHODS["della"].options_type(density=(0.5, 0.5), epsilon=(0.1, 0.1, 0.1))


def test_random_numbers_do_not_repeat_between_contributors_tensors_and_halves() -> None:
    def numbers(name: str, contributor: int, seed: int) -> Tensor:
        return Position(name, range(64), [contributor]).uniform(torch.empty(64, 1000), 0, seed).double()

    streams = [numbers("w", 0, 0), numbers("w", 1, 0), numbers("v", 0, 0), numbers("w", 0, 1)]
    streams += [streams[0].flatten().roll(1).reshape(64, 1000), streams[0].flatten().roll(2).reshape(64, 1000)]
    found = torch.corrcoef(torch.stack([stream.flatten() for stream in streams]))
    assert float((found - torch.eye(len(streams))).abs().max()) < 0.02
    assert abs(float(streams[0].mean()) - 0.5) < 0.005 and abs(float(streams[0].var()) - 1 / 12) < 0.001


# What is chosen among contributors.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_selects_calculates_and_erases(masked: bool, density: float) -> None:
    base, tuned = family((30, 20))
    tuned = [tensor * (1 + 0.3 * n) - 0.3 * n * base for n, tensor in enumerate(tuned)]  # of different lengths
    tuned = [torch.cat([tensor[:25], base[25:] + 0.01]) for tensor in tuned]  # rows in which all agree
    deltas = deltas_of(base, tuned)
    variance = np.var(deltas, axis=0)
    varying = np.flatnonzero(variance > 1e-12)
    chosen = np.zeros(base.numel(), dtype=bool)
    order = varying[np.argsort(-variance.ravel()[varying])]
    chosen[order[: int(density * len(varying))]] = True
    chosen = chosen.reshape(base.shape) if density < 1 else np.ones(base.shape, dtype=bool)
    squares = [float((delta[chosen] ** 2).mean()) for delta in deltas]
    weights = [ci * square / sum(squares) for ci, square in zip(C, squares, strict=True)]
    kept = [delta * chosen for delta in deltas] if masked else deltas
    found = merged("sce", base, tuned, C, density=density, masked=masked, scale=0.9)
    close(found, base.double().numpy() + 0.9 * elected(kept, C, mean=True, weights=weights), base)


@pytest.mark.parametrize("count", [3, 5, 7])
def test_sce_selects_the_same_in_any_order(count: int) -> None:
    """Many numbers have one variance where weights are of few digits; the order of sums is not to choose among them."""
    draw = torch.Generator().manual_seed(count)
    values = torch.randint(-3, 4, (count, 40, 50), generator=draw) * 2.0**-7
    base = torch.randn(40, 50, generator=draw).bfloat16().float().clamp(-3, 3)
    orders = [torch.arange(count), torch.arange(count).flip(0), torch.randperm(count, generator=draw)]
    found = [merged("sce", base, list(base + values[order]), [1.0] * count, masked=True) for order in orders]
    variance = np.var((base + values - base).double().numpy() * 2**7, axis=0) * count**2  # of whole numbers
    ranked = np.sort(np.round(variance[variance > 1e-6]))[::-1]
    selected = np.round(variance) >= ranked[int(0.1 * len(ranked)) - 1]
    for one in found:
        np.testing.assert_allclose(one, found[0], atol=1e-6)
        assert not (one != base.double().numpy())[~selected].any()


def test_sce_of_small_changes_takes_equal_weights_where_asked_for() -> None:
    base, (first, second) = family((12, 10), 2)
    tuned = [base + 1e-2 * (first - base), base + 3e-2 * (second - base)]
    kept = deltas_of(base, tuned)
    limit = sum(float((delta**2).mean()) for delta in kept)
    for factor, equal in ((0.99, False), (1.01, True)):
        weights = [1.0, 1.0] if equal else [float((delta**2).sum()) for delta in kept]
        found = merged("sce", base, tuned, [1.0, 1.0], density=1.0, equal_below=factor * limit)
        expected = base.double().numpy() + elected(kept, [1.0, 1.0], mean=True, weights=weights)
        np.testing.assert_allclose(found, expected, atol=2e-7)


def test_magmax_takes_the_largest_change_and_the_later_of_equals() -> None:
    base, tuned = family((8, 9))
    deltas = np.stack([ci * delta for ci, delta in zip(C, deltas_of(base, tuned), strict=True)])
    expected = np.take_along_axis(deltas, np.abs(deltas).argmax(axis=0)[None], axis=0)[0]
    close(merged("magmax", base, tuned, C), base.double().numpy() + 0.5 * expected, base)
    found = merged("magmax", torch.zeros(1, 2), [torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])], [1.0, 1.0])
    assert found.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7])
def test_consensus_keeps_what_k_contributors_use(k: int) -> None:
    base, tuned = family((25, 20))
    deltas = [ci * delta for ci, delta in zip(C, deltas_of(base, tuned), strict=True)]
    total = sum(deltas)
    lambdas = (0.3, 0.8, 0.5)
    users = sum(np.abs(d) >= lam * np.abs(total - d) for d, lam in zip(deltas, lambdas, strict=True))
    expected = base.double().numpy() + 0.4 * total * (users >= min(k, 3))
    found = merged("consensus", base, tuned, C, k=k, tall_lambda=lambdas)
    close(found, expected, base)
    assert len(np.unique(users)) > 2


def test_ram_averages_shared_changes_and_keeps_single_ones() -> None:
    base = torch.zeros(1, 5)
    changes = [[0.5, 0.0, 0.5, 1e-6, 0.25], [0.0, 0.25, -0.5, 0.0, 0.5]]
    tuned = [torch.tensor([row]) for row in changes]
    assert merged("ram", base, tuned, [1.0, 1.0]).tolist() == [[0.5, 0.25, 0.0, 0.0, 0.375]]
    found = merged("ram", base, tuned, [3.0, 1.0])
    np.testing.assert_allclose(found, [[0.5, 0.25, 0.25, 0.0, 0.3125]], atol=1e-7)


def test_ram_plus_enlarges_single_changes() -> None:
    draw = np.random.default_rng(2)
    changes = [draw.normal(size=(20, 30)) * (draw.random((20, 30)) < share) for share in (0.05, 0.3, 0.6)]
    base = torch.zeros(20, 30)
    tuned = [torch.from_numpy(change).float() for change in changes]
    changed = np.stack([np.abs(change) > 1e-5 for change in changes])
    count = changed.sum(axis=0)
    ratios = [(mask & (count > 1)).sum() / (mask & (count == 1)).sum() for mask in changed]
    factors = [1 + 0.5 * min(ratio, 1.5) for ratio in ratios]
    assert min(ratios) < 1.5 < max(ratios)
    single = sum(factor * change * (count == 1) for factor, change in zip(factors, changes, strict=True))
    expected = np.where(count > 1, sum(changes) / np.maximum(count, 1), single)
    found = merged("ram_plus", base, tuned, [1.0] * 3, r=0.5, alpha=1.5)
    close(found, expected, base)


def test_pcb_equals_the_paper() -> None:
    """Du et al. 2024, section 3, equations 1 to 5, tensor by tensor."""
    base, tuned = family((20, 30), seed=3)
    deltas, count = deltas_of(base, tuned), 3

    def norm(x: Array) -> Array:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: Array) -> Array:
        return np.exp(x) / np.exp(x).sum()

    densities = (0.1, 0.3, 0.5)
    top, bottom = np.zeros((20, 30)), np.zeros((20, 30))
    for delta, density, ci in zip(deltas, densities, C, strict=True):
        score = softmax(count * norm(delta * delta)) * sum(softmax(norm(delta * other)) for other in deltas)
        limit = np.sort(score, axis=None)[-int(density * score.size)]
        weight = ci * norm(np.where(score >= limit, score, 0.0))
        top, bottom = top + weight * delta, bottom + weight
    change = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    found = merged("pcb", base, tuned, C, density=densities, scale=1.2)
    np.testing.assert_allclose(found, base.double().numpy() + 1.2 * change, rtol=1e-5, atol=1e-6)
    assert np.abs(change).max() > 0.1


# What holds for all of them.

SPARSE = [
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "magmax",
    "consensus",
    "pcb",
]


@pytest.mark.parametrize("method", SPARSE)
@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(5, 8), (1, 12), (9, 1), (7,), (), (4, 3, 2)]),
    count=st.integers(1, 4),
    exponent=st.integers(-6, 6),
    sign=st.sampled_from([1.0, -1.0]),
    seed=st.integers(0, 10**6),
)
def test_changes_of_another_length_or_sign_give_a_merge_of_another_length_or_sign(
    method: str, shape: tuple[int, ...], count: int, exponent: int, sign: float, seed: int
) -> None:
    """To the last bit, as a power of two changes no digit: what is kept depends on neither."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.zeros(shape)
    tuned = [torch.randn(shape, generator=draw) for _ in range(count)]
    c = [1.0, 0.5, 2.0, 1.5][:count]
    factor = sign * 2.0**exponent
    found = merged(method, base, [tensor * factor for tensor in tuned], c)
    np.testing.assert_array_equal(found, factor * merged(method, base, tuned, c))


@pytest.mark.parametrize("method", [m for m in [*SPARSE, "ram", "ram_plus"] if not m.startswith(("dare", "della"))])
def test_the_order_of_contributors_does_not_matter(method: str) -> None:
    """But for rounding, where nothing is drawn for each contributor."""
    base, tuned = family((12, 9), seed=5)
    found = merged(method, base, tuned, C)
    other = merged(method, base, tuned[::-1], C[::-1])
    np.testing.assert_allclose(found, other, atol=1e-6)
