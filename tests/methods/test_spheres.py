"""Averages on spheres, Model Stock, NearSwap and passthrough against float64 oracles, and what holds for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from merganser.errors import MerganserError
from merganser.merging import merge
from merganser.methods import METHODS, Facts, Merged, Unit
from merganser.methods.averages.span import _gram_of_rows
from merging.test_bytes import write_family
from methods.in_memory import InMemory

Array = np.ndarray
TWO = ("slerp", "nuslerp")
ON_SPHERES = (*TWO, "multislerp", "karcher")
TO_THE_END: dict[str, Any] = {name: {"tolerance": 0.0} for name in ("multislerp", "karcher")}
#: Every way in which a method of these takes a tensor, and how many models it takes.
WAYS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "slerp": ("slerp", 2, {}),
    "nuslerp": ("nuslerp", 2, {}),
    "nuslerp rows": ("nuslerp", 2, {"flatten": False}),
    "nuslerp columns": ("nuslerp", 2, {"flatten": False, "row_wise": True}),
    "nuslerp of task vectors": ("nuslerp", 2, {"task_vectors": True}),
    "nuslerp of task vectors, rows": ("nuslerp", 2, {"task_vectors": True, "flatten": False}),
    "multislerp": ("multislerp", 3, {}),
    "multislerp of task vectors": ("multislerp", 3, {"task_vectors": True}),
    "karcher": ("karcher", 4, {}),
    "model_stock": ("model_stock", 3, {}),
    "model_stock rows": ("model_stock", 3, {"row_wise": True}),
    "nearswap": ("nearswap", 2, {"t": 0.5}),
    "passthrough": ("passthrough", 1, {"scale": 0.5}),
    "arcee_fusion": ("arcee_fusion", 1, {}),
}


def shares_of(base: Tensor, tuned: Sequence[Tensor], c: Sequence[float], rows: slice = slice(None)) -> list[Any]:
    cut = [one[rows] if one.dim() else one for one in (base, *tuned)]
    return [InMemory(n, one, tensor, cut[0]) for n, (tensor, one) in enumerate(zip(cut[1:], c, strict=True))]


def whole(base: Tensor, tuned: Sequence[Tensor], c: Sequence[float], method: str, **options: Any) -> Merged:
    chosen = METHODS[method].configured(METHODS[method].options_type(**options))
    unit = Unit(("w",), method, (Facts("w", tuple(base.shape), in_base=True),))
    return chosen.merge(unit, shares_of(base, tuned, c))


def merged(base: Tensor, tuned: Sequence[Tensor], c: Sequence[float], method: str, **options: Any) -> Tensor:
    return whole(base, tuned, c, method, **options).tensors["w"]


def family(shape: tuple[int, ...], count: int, change: float = 1.0, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    return base, [base + change * torch.randn(shape, generator=draw) for _ in range(count)]


def arrays(tensors: Sequence[Tensor]) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def close(found: Tensor, expected: Array, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def oracle_of_slerp(one: Array, two: Array, t: float) -> Array:
    cosine = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)


def log_map(mean: Array, point: Array) -> Array:
    """The direction and distance in which a point of the unit sphere lies, seen from another."""
    cosine = np.clip((mean * point).sum(), -1, 1)
    across = point - cosine * mean
    return np.arccos(cosine) * across / max(np.linalg.norm(across), 1e-300)


def oracle_of_means(points: Sequence[Array], c: Sequence[float], steps: int) -> Array:
    weights = np.array(c) / sum(c)
    lengths = np.array([np.linalg.norm(point) for point in points])
    units = [point / length for point, length in zip(points, lengths, strict=True)]
    mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        step = sum(w * log_map(mean, unit) for w, unit in zip(weights, units, strict=True))
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
    return mean * (weights @ lengths)


@pytest.mark.parametrize("method", TWO)
@pytest.mark.parametrize("c", [(1.0, 1.0), (3.0, 1.0), (0.2, 5.0)])
@pytest.mark.parametrize("change", [0.3, 3.0])
def test_slerp_equals_the_formula(method: str, c: tuple[float, float], change: float) -> None:
    base, tuned = family((23, 7), 2, change)
    one, two = arrays(tuned)
    close(merged(base, tuned, c, method), oracle_of_slerp(one, two, c[1] / sum(c)), 2e-6)


def test_slerp_takes_t_from_its_options_and_ends_at_the_models_exactly() -> None:
    base, tuned = family((23, 7), 2)
    close(merged(base, tuned, (1, 1), "slerp", t=0.3), oracle_of_slerp(*arrays(tuned), 0.3), 2e-6)
    for t in (0.0, 1.0):
        assert torch.equal(merged(base, tuned, (1, 1), "slerp", t=t), tuned[int(t)])


def test_slerp_is_linear_above_a_cosine_where_that_is_asked_for() -> None:
    base, tuned = family((40, 30), 2, 0.02)
    one, two = arrays(tuned)
    line, circle = 0.7 * one + 0.3 * two, oracle_of_slerp(one, two, 0.3)
    assert np.abs(line - circle).max() > 1e-5
    tuned = [tensor.double() for tensor in tuned]
    close(merged(base, tuned, (7, 3), "slerp"), circle, 1e-11)
    close(merged(base, tuned, (7, 3), "slerp", linear_above=0.9995), line, 1e-13)


@pytest.mark.parametrize("change", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("method", ON_SPHERES)
def test_the_angle_of_nearly_parallel_tensors_is_right(method: str, change: float) -> None:
    """The result is longer than the line's by t(1 − t)φ²/2, as two fine-tunes' cosine does not tell."""
    draw = torch.Generator().manual_seed(1)
    one, across = torch.randn(2, 60_000, generator=draw, dtype=torch.float64).unbind()
    across -= one * (one @ across) / (one @ one)
    across *= np.tan(change) * one.norm() / across.norm()
    two = (one + across) * np.cos(change)  # of the same length, turned by the angle
    found = merged(one, [one, two], (3.0, 1.0), method, **TO_THE_END.get(method, {}))
    longer = float((found - one.lerp(two, 0.25)) @ one / (one @ one))
    assert longer == pytest.approx(0.25 * 0.75 * change**2 / 2, rel=0.02)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("task_vectors", [False, True])
def test_nuslerp_of_rows_and_columns(columns: bool, task_vectors: bool) -> None:
    base, tuned = family((9, 14), 2)
    origin = base.double().numpy() * task_vectors
    pairs = zip(*((array - origin).T if columns else array - origin for array in arrays(tuned)), strict=True)
    expected = np.stack([oracle_of_slerp(one, two, 0.75) for one, two in pairs])
    options = {"flatten": False, "row_wise": columns, "task_vectors": task_vectors}
    close(merged(base, tuned, (1, 3), "nuslerp", **options), origin + (expected.T if columns else expected), 3e-6)


def test_nuslerp_goes_on_beyond_its_ends_with_a_negative_coefficient() -> None:
    base, tuned = family((9, 14), 2)
    close(merged(base, tuned, (1.0, -0.5), "nuslerp"), oracle_of_slerp(*arrays(tuned), -1.0), 3e-6)


@pytest.mark.parametrize(("method", "steps"), [("karcher", 200), ("multislerp", 0), ("multislerp", 1)])
@pytest.mark.parametrize("change", [0.05, 1.0, 5.0])
def test_means_on_the_sphere_equal_the_formula(method: str, steps: int, change: float) -> None:
    base, tuned = family((13, 11), 4, change)
    c = [1.0, 2.0, 0.5, 1.5]
    expected = oracle_of_means(arrays(tuned), c, steps)
    found = merged(base, [tensor.double() for tensor in tuned], c, method, steps=steps, tolerance=0)
    close(found, expected, 1e-9)
    close(merged(base, tuned, c, method, steps=steps, tolerance=0), expected, 4e-6)


def test_the_karcher_mean_has_no_direction_left() -> None:
    base, tuned = family((13, 11), 5)
    c = np.array([1.0, 2.0, 0.5, 1.5, 0.0])
    found = merged(base, [tensor.double() for tensor in tuned], list(c), "karcher", steps=100, tolerance=0).numpy()
    mean = found / np.linalg.norm(found)
    left = sum(w * log_map(mean, one / np.linalg.norm(one)) for w, one in zip(c, arrays(tuned), strict=True))
    assert np.linalg.norm(left) < 1e-9


def test_multislerp_of_task_vectors() -> None:
    base, tuned = family((13, 11), 3, 0.1)
    origin = base.double().numpy()
    expected = origin + oracle_of_means([one - origin for one in arrays(tuned)], [1, 2, 3], 1)
    close(merged(base, tuned, (1, 2, 3), "multislerp", task_vectors=True), expected, 2e-6)


@pytest.mark.parametrize("c", [(1.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_of_two_models_of_one_length_means_are_slerp(method: str, c: tuple[float, float]) -> None:
    base, (one, two) = family((13, 11), 2)
    tuned = [one, two * (one.norm() / two.norm())]
    close(merged(base, tuned, c, method), merged(base, tuned, c, "slerp").double().numpy(), 2e-6)


def oracle_of_model_stock(base: Array, tuned: Sequence[Array], c: Sequence[float]) -> Array:
    p = np.array(c) / sum(c)
    deltas = [one - base for one in tuned]
    pairs = [(i, j) for i in range(len(p)) for j in range(i)]
    cosines = [
        (deltas[i] * deltas[j]).sum() / (np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])) for i, j in pairs
    ]
    cosine = np.average(cosines, weights=[p[i] * p[j] for i, j in pairs])
    many = 1 / (p**2).sum()
    t = np.clip(many * cosine / (1 + (many - 1) * cosine), 0, 1)
    return t * sum(w * one for w, one in zip(p, tuned, strict=True)) + (1 - t) * base


@pytest.mark.parametrize("c", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
@pytest.mark.parametrize("row_wise", [False, True])
def test_model_stock_equals_the_formula(c: tuple[float, ...], row_wise: bool) -> None:
    base, tuned = family((9, 40), 3)
    tuned = [tensor + 0.7 for tensor in tuned]  # what they have in common
    origin, points = base.double().numpy(), arrays(tuned)
    expected = (
        np.stack([oracle_of_model_stock(origin[n], [one[n] for one in points], c) for n in range(9)])
        if row_wise
        else oracle_of_model_stock(origin, points, c)
    )
    found = merged(base, tuned, c, "model_stock", row_wise=row_wise)
    close(found, expected, 2e-6)
    assert not np.allclose(expected, np.average(points, axis=0, weights=c), atol=0.01)


@pytest.mark.parametrize("c", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
def test_model_stock_is_nearest_to_the_centre_of_models_that_lie_about_it(c: tuple[float, ...]) -> None:
    """The derivation of the paper: a centre, and models at equal distances from it, at right angles to each other."""
    base = torch.zeros(6, dtype=torch.float64)
    centre = torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    tuned = [centre + 3 * torch.eye(6, dtype=torch.float64)[n + 1] for n in range(3)]
    average = sum(w * one for w, one in zip(c, tuned, strict=True)) / sum(c)
    nearest = average * (average @ centre) / (average @ average)
    close(merged(base, tuned, c, "model_stock"), nearest.numpy(), 1e-12)


def test_model_stock_stays_at_the_base_where_models_point_apart_and_says_so() -> None:
    base, (one, *_) = family((5, 6), 1)
    apart = [one, 2 * base - one + 0.01]
    found = whole(base, apart, (1, 1), "model_stock")
    assert torch.equal(found.tensors["w"], base) and "point apart" in str(found.note)
    beyond = whole(base, apart, (1, 1), "model_stock", clamp=False)
    assert (beyond.tensors["w"] - base).norm() > 1e-3 and torch.isfinite(beyond.tensors["w"]).all()
    exactly = whole(base, [base + 1, base - 1], (1, 1), "model_stock", clamp=False)
    assert torch.equal(exactly.tensors["w"], base) and exactly.note
    together = whole(base, [one, one + 0.01], (1, 1), "model_stock")
    assert together.note is None
    rows = whole(base, [one, torch.cat([one[:3], apart[1][3:]])], (1, 1), "model_stock", row_wise=True)
    assert torch.equal(rows.tensors["w"], torch.cat([one[:3], base[3:]])) and "some rows" in str(rows.note)


def test_nearswap_equals_the_formula() -> None:
    base, tuned = family((50, 20), 2, 0.01)
    one, two = arrays(tuned)
    distance = np.abs(one - two)
    weight = np.clip(0.01 / np.maximum(distance, 1e-6), 0, 1)
    found = merged(base, tuned, (1, 1), "nearswap", t=0.01)
    close(found, weight * two + (1 - weight) * one)
    near = torch.from_numpy(distance < 0.0099)
    assert torch.equal(found[near], tuned[1][near]) and 100 < int(near.sum()) < 900
    assert torch.equal(merged(base, tuned, (1, 1), "nearswap", t=0), tuned[0])


def test_passthrough_is_the_model_or_a_multiple() -> None:
    base, tuned = family((5, 4), 1)
    assert torch.equal(merged(base, tuned, (1,), "passthrough"), tuned[0])
    assert torch.equal(merged(base, tuned, (1,), "passthrough", scale=(0.5,)), tuned[0] * 0.5)
    assert torch.equal(merged(base, tuned, (1,), "passthrough", scale=0), tuned[0] * 0)


# What holds for all of them.


@pytest.mark.parametrize("width", [17, 5000])
@pytest.mark.parametrize("way", WAYS)
def test_slices_are_parts_of_the_whole(way: str, width: int) -> None:
    """With rows of any numbers: every slice, and slices of a part of the tensor."""
    method, count, options = WAYS[way]
    base, tuned = family((29, width), count, 0.1)
    c = [1.0, 2.0, 0.5, 1.5][:count] if METHODS[method].needs.weighted else [1.0] * count
    chosen = METHODS[method].configured(METHODS[method].options_type(**options))
    for labels in (range(100, 129), tuple(range(0, 87, 3))):
        unit = Unit(("w",), method, (Facts("w", (29, width), in_base=True, rows=labels),))
        expected = chosen.merge(unit, shares_of(base, tuned, c)).tensors["w"]
        for height in (1, 4, 13):
            prepared = chosen.prepare(unit, shares_of(base, tuned, c))
            parts = []
            for start in range(0, 29, height):
                part, _ = unit.cut(start, start + height)
                assert list(part.facts[0].rows or ()) == list(labels[start : start + height])
                shares = shares_of(base, tuned, c, slice(start, start + height))
                parts.append(prepared(part, shares).tensors["w"])
            assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "passthrough"])
def test_a_model_merged_with_itself_is_the_same(way: str, dtype: torch.dtype) -> None:
    method, count, options = WAYS[way]
    for shape in ((9, 14), (700, 900), (8,), (1, 5), ()):
        base, (tuned,) = family(shape, 1)
        base, tuned = base.to(dtype), tuned.to(dtype)
        if method == "arcee_fusion":
            assert torch.equal(merged(base, [base], (1,), method), base)
            continue
        c = [1.0, 2.0, 0.3, 1.5][:count] if METHODS[method].needs.weighted else [1.0] * count
        assert torch.equal(merged(base, [tuned] * count, c, method, **options), tuned)


@pytest.mark.parametrize("way", [way for way, (method, count, _) in WAYS.items() if count > 1 and method != "nearswap"])
def test_the_order_of_contributors_does_not_matter(way: str) -> None:
    method, count, options = WAYS[way]
    base, tuned = family((9, 14), count)
    c = [1.0, 2.0, 0.5, 1.5][:count]
    found, turned = merged(base, tuned, c, method, **options), merged(base, tuned[::-1], c[::-1], method, **options)
    close(found, turned.double().numpy(), 3e-6)


numbers = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=2, max_size=5),
    st.lists(st.floats(0.0625, 8, width=32), min_size=5, max_size=5),
    st.sampled_from(["multislerp", "karcher"]),
)
def test_means_lie_on_the_sphere_of_the_mean_length(rows: list[list[float]], c: list[float], method: str) -> None:
    tuned = [torch.tensor(row, dtype=torch.float64).reshape(2, 3) for row in rows]
    weights = torch.tensor(c[: len(tuned)], dtype=torch.float64) / sum(c[: len(tuned)])
    lengths = torch.stack([one.norm() for one in tuned])
    found = merged(torch.zeros(2, 3), tuned, weights.tolist(), method)
    assert torch.isfinite(found).all()
    units = [one / length for one, length in zip(tuned, lengths, strict=True) if length > 0]
    kept = [weight for weight, length in zip(weights, lengths, strict=True) if length > 0]
    together = sum((weight * unit for weight, unit in zip(kept, units, strict=True)), torch.zeros(2, 3))
    if float(together.norm()) > 1e-6:
        assert float(found.norm()) == pytest.approx(float(weights @ lengths), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=2, max_size=2), st.floats(0, 1))
def test_slerp_of_models_of_one_length_keeps_it(rows: list[list[float]], t: float) -> None:
    one, two = (torch.tensor(row, dtype=torch.float64).reshape(2, 3) for row in rows)
    found = merged(torch.zeros(2, 3), [one, two], (1, 1), "slerp", t=t)
    assert torch.isfinite(found).all()
    if not one.any() or not two.any():
        torch.testing.assert_close(found, one.lerp(two, t))  # no angle: linear
        return
    two = two * (one.norm() / two.norm())
    if float((one + two).norm()) > 1e-3 * float(one.norm()):
        found = merged(torch.zeros(2, 3), [one, two], (1, 1), "slerp", t=t)
        assert float(found.norm()) == pytest.approx(float(one.norm()), rel=1e-9)


@pytest.mark.parametrize("method", ON_SPHERES)
def test_opposites_and_zeros_have_the_average(method: str) -> None:
    base, (one,) = family((4, 6), 1)
    zero = torch.zeros(4, 6)
    close(merged(base, [one, -one], (3, 1), "slerp"), 0.5 * one.double().numpy())
    for c in ((1.0, 1.0), (3.0, 1.0)):
        share = c[0] / sum(c)
        close(merged(base, [one, zero], c, method), share * one.double().numpy())
        close(merged(base, [zero, one], c[::-1], method), share * one.double().numpy())
        assert torch.equal(merged(base, [zero, zero], c, method), zero)
    assert float(merged(base, [one, -one], (1, 1), method).abs().max()) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e15, 1e30])
@pytest.mark.parametrize("method", [*ON_SPHERES, "model_stock"])
def test_numbers_whose_squares_leave_float32(method: str, size: float) -> None:
    _, tuned = family((4, 6), 2)
    ones, zero = [tensor * size for tensor in tuned], torch.zeros(4, 6)
    found, expected = (merged(zero, tensors, (1, 3), method) for tensors in (ones, tuned))
    close(found.double() / size, expected.double().numpy(), 3e-6)


def test_both_storage_widths_together() -> None:
    base, (one, two, three) = family((4, 6), 3)
    for method, tuned in (("slerp", [one, two.double()]), ("karcher", [one.double(), two, three])):
        found = merged(base, tuned, [1.0] * len(tuned), method)
        assert found.dtype == torch.float64
        close(found, merged(base, [x.double() for x in tuned], [1.0] * len(tuned), method).numpy(), 1e-12)
    assert merged(base.double(), [one, two], (1, 1), "model_stock").dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 600_001), (300, 4097), (1_200_000, 1)])
def test_inner_products_of_rows_wider_than_what_is_looked_at_at_once(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    tensors = [(base + torch.randn(shape, generator=generator) / 10).to(dtype) for _ in range(3)]
    for origin in (base, None):
        found = _gram_of_rows(tensors, origin, shape[0])
        theirs = [tensor.double().numpy() for tensor in tensors]
        start = 0 if origin is None else origin.double().numpy()
        basis = np.array([theirs[0] - start, *(other - theirs[0] for other in theirs[1:])])
        assert np.allclose(found, np.einsum("irn,jrn->ijr", basis, basis), rtol=1e-4, atol=1e-4 * shape[1] ** 0.5)


def test_a_contributor_alone_is_as_it_is() -> None:
    """As rows of a vocabulary are that only one model has."""
    base, (one,) = family((4, 6), 1)
    for method in (*ON_SPHERES, "model_stock", "nearswap"):
        assert torch.equal(merged(base, [one], (2.0,), method), one)


def test_impossible_options_and_models_are_refused(tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")

    def refused(count: int, words: str, method: str, **given: Any) -> None:
        with pytest.raises(MerganserError, match=words):
            merge(models[:count], tmp_path / "out", method=method, base=base, **given)

    refused(2, "less than or equal to 1|at most 1|≤ 1", "slerp", options={"t": 1.5})
    refused(3, "exactly 2 models", "slerp")
    refused(2, "negative", "slerp", coefficients=[1, -0.5])
    refused(2, "sum to zero", "nuslerp", coefficients=[1, -1])
    refused(1, "2 models or more", "model_stock")
    refused(2, "does not weigh", "nearswap", coefficients=[1, 2])
    refused(2, "exactly 1 model", "passthrough")
    assert not (tmp_path / "out").exists()


def test_provenance_says_where_models_point_apart(tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")
    origin, one = (load_file(folder / "model.safetensors") for folder in (base, models[0]))
    apart = "bert.pooler.dense.weight"
    two = {name: 2 * origin[name] - tensor if name == apart else tensor for name, tensor in one.items()}
    save_file(two, models[1] / "model.safetensors", metadata={"format": "pt"})
    out = Path(merge(models[:2], tmp_path / "out", method="model_stock", base=base))
    tensors = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["tensors"]
    assert {name for name, entry in tensors.items() if "point apart" in str(entry.get("note"))} == {apart}
    found = load_file(out / "model.safetensors")
    assert torch.equal(found[apart], origin[apart])
    assert all(torch.equal(found[name], one[name]) for name in found if name != apart)
