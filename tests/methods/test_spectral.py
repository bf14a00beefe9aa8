"""TSV-M, shared dual bases, Iso-C and Iso-CTS against their formulas with full SVDs in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from merganser.errors import UserError
from merganser.merging import merge
from merganser.methods import METHODS
from merganser.methods.matrix import Matrix
from merganser.methods.spectral.isotropic import shares
from merging.test_bytes import write_family
from methods.matrices import Array, distance, drawn, fine_tuned, flat, polar, svd

SPECTRAL = ("tsv_m", "dual_basis", "iso_c", "iso_cts")


def tsv_m(tasks: Sequence[Array], keep: float = 1.0) -> Array:
    """Gargiulo et al. 2025, algorithm 1."""
    count = int(keep * (min(tasks[0].shape) // len(tasks)))
    parts = [svd(task) for task in tasks]
    left = polar(np.hstack([u[:, :count] for u, _, _ in parts]))
    right = polar(np.vstack([v[:count] for _, _, v in parts]))
    return left @ np.diag(np.concatenate([s[:count] for _, s, _ in parts])) @ right


def dual_basis(tasks: Sequence[Array], keep: float = 0.25, sharing: float = 10.0, ridge: float = 0.1) -> Array:
    """Block by block what every task asks of the others' directions; then the dual bases, by inverses."""
    count = max(1, int(keep * (min(tasks[0].shape) // len(tasks))))
    parts = [(u[:, :count], s[:count], v[:count].T) for u, s, v in map(svd, tasks)]
    kept = [u * s @ v.T for u, s, v in parts]

    def block(i: int, k: int) -> Array:
        if i == k:
            return np.diag(parts[i][1])
        cosine = np.vdot(tasks[i], tasks[k]) / (np.linalg.norm(tasks[i]) * np.linalg.norm(tasks[k]))
        answer: Array = parts[i][0].T @ (kept[i] + kept[k]) / 2 @ parts[k][2]
        return float(np.clip(sharing * cosine, 0, 1)) * answer

    wanted = np.block([[block(i, k) for k in range(len(tasks))] for i in range(len(tasks))])
    left, right = np.hstack([u for u, _, _ in parts]), np.hstack([v for _, _, v in parts])
    identity = np.eye(left.shape[1])
    inverses = [np.linalg.inv((side.T @ side + ridge * identity) / (1 + ridge)) for side in (left, right)]
    return left @ inverses[0] @ wanted @ inverses[1] @ right.T


def iso_c(tasks: Sequence[Array]) -> Array:
    """Marczak et al. 2025, section 4.1."""
    left, values, right = svd(np.sum(tasks, axis=0))
    return values.mean() * left @ right


def iso_cts(tasks: Sequence[Array], common: float = 0.8) -> Array:
    """Marczak et al. 2025, algorithm 2."""
    rank = min(tasks[0].shape)
    own = round((rank - int(rank * common)) / len(tasks))
    together = rank - own * len(tasks)
    left, values, right = svd(np.sum(tasks, axis=0))
    lefts, rights, all_values = [left[:, :together]], [right[:together]], [values[:together]]
    for task in tasks:
        beside = task - lefts[0] @ lefts[0].T @ task
        u, s, v = svd(beside)
        lefts, rights, all_values = [*lefts, u[:, :own]], [*rights, v[:own]], [*all_values, s[:own]]
    return np.concatenate(all_values).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights))


ORACLES = {"tsv_m": tsv_m, "dual_basis": dual_basis, "iso_c": iso_c, "iso_cts": iso_cts}


class Anew(list[torch.Tensor]):
    """Weights that are a function's own each time they are asked for."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index).clone()


def change(
    method: str,
    tasks: Sequence[Array],
    coefficients: Sequence[float] | None = None,
    dtype: Any = torch.float64,
    **options: Any,
) -> Array:
    """What a method adds to a base model of zeros, whose contributors then are the task matrices."""
    chosen = METHODS[method]
    assert isinstance(chosen, Matrix)
    weights = Anew(torch.from_numpy(task).to(dtype) for task in tasks)
    settings_ = chosen.options_type.model_validate(options)
    base = torch.zeros_like(weights[0])
    return chosen.function(base, weights, coefficients or [1.0] * len(tasks), settings_).double().numpy()


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize(
    ("shape", "tasks"), [((12, 12), 3), ((30, 9), 2), ((7, 40), 3), ((16, 16), 1), ((150, 160), 4)]
)
def test_it_is_what_full_svds_give(method: str, shape: tuple[int, int], tasks: int) -> None:
    given = drawn(shape, tasks)
    assert distance(change(method, given), ORACLES[method](given)) < 1e-9


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_weights_in_float32_are_within_the_bound_of_float64(method: str, decay: float) -> None:
    given = [task.astype(np.float32).astype(np.float64) for task in drawn((200, 220), 3, 1, decay)]
    assert distance(change(method, given, dtype=torch.float32), ORACLES[method](given)) < 1e-4


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("shape", [(200, 200), (300, 160), (150, 400)])
def test_fine_tuned_weights_in_float32_are_within_the_bound_of_float64(method: str, shape: tuple[int, int]) -> None:
    given = fine_tuned(shape, 3, 11)
    assert distance(change(method, given, dtype=torch.float32), ORACLES[method](given)) < 1e-4


def test_directions_that_hardly_stand_out_are_as_accurate() -> None:
    """Subspace iteration comes near them slowly; those that it has not reached are left to the rest."""
    given = fine_tuned((256, 900), 3, 11, rank=32, share=0.001)
    assert distance(change("tsv_m", given, dtype=torch.float32), tsv_m(given)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(150, 150), (140, 300), (300, 140)])
def test_an_exactly_low_rank_leaves_no_other_direction(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Whole numbers, so that they are exact in float32; the vectors of zeros could be any, and are left out."""
    draw = np.random.default_rng(13)
    given = [draw.integers(-4, 5, (shape[0], 3)) @ draw.integers(-4, 5, (3, shape[1])) * 1.0 for _ in range(2)]
    left, values, right = svd(np.sum(given, axis=0))
    expected = values.sum() / min(shape) * left[:, :6] @ right[:6]
    assert distance(change("iso_c", given, dtype=dtype), expected) < 1e-4
    parts = [svd(task) for task in given]
    lefts, rights = np.hstack([u[:, :3] for u, _, _ in parts]), np.vstack([v[:3] for _, _, v in parts])
    expected = polar(lefts) * np.concatenate([s[:3] for _, s, _ in parts]) @ polar(rights)
    assert distance(change("tsv_m", given, dtype=dtype), expected) < 1e-4


def lengthening(tasks: Sequence[Array]) -> float:
    """How much shorter task matrices become by their sum; at most the square root of their number."""
    k = sum(np.linalg.norm(task) for task in tasks) / np.linalg.norm(np.sum(tasks, axis=0))
    return float(min(k, len(tasks) ** 0.5))


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize(("shape", "spectrum"), [((12, 12), 0.7), ((30, 9), 3.0), ((7, 40), 0.1), ((150, 160), 1.5)])
@pytest.mark.parametrize("alike", [0.5, -0.5])
def test_a_flatter_spectrum_is_what_full_svds_give(
    method: str, shape: tuple[int, int], spectrum: float, alike: float
) -> None:
    given = drawn(shape, 2)
    given[1] += alike * given[0]  # so that k is below √2, or at it
    expected = 1.5 * flat(ORACLES[method](given), lengthening(given) ** -spectrum)
    assert distance(change(method, given, spectrum=spectrum, scale=1.5), expected) < 1e-8


@pytest.mark.parametrize("method", ["tsv_m", "dual_basis"])
def test_a_flatter_spectrum_leaves_what_contributors_agree_on(method: str) -> None:
    (task,) = drawn((9, 12), 1)
    plain, flat = (change(method, [task, 2 * task], spectrum=spectrum) for spectrum in (0.0, 1.0))
    assert distance(flat, plain) < 1e-12


@pytest.mark.parametrize("exponent", [-140, -60, 60, 120])
def test_neither_large_nor_tiny_numbers_are_lost(exponent: int) -> None:
    """Their squares overflow or vanish; a power of two changes no digit."""
    given = drawn((20, 20), 2, 4)
    scaled = [task * 2.0**exponent for task in given]
    for method in SPECTRAL:
        np.testing.assert_array_equal(change(method, scaled), change(method, given) * 2.0**exponent)


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(SPECTRAL), height=st.integers(2, 24), width=st.integers(2, 24),
    tasks=st.integers(1, 4), seed=st.integers(0, 1000),
)  # fmt: skip
def test_turned_models_give_a_turned_merge(method: str, height: int, width: int, tasks: int, seed: int) -> None:
    given = drawn((height, width), tasks, seed)
    draw = np.random.default_rng(seed + 1)
    left, right = polar(draw.standard_normal((height, height))), polar(draw.standard_normal((width, width)))
    plain = change(method, given)
    assert distance(change(method, [left @ task @ right for task in given]), left @ plain @ right) < 1e-6


@settings(max_examples=25, deadline=None)
@given(method=st.sampled_from(SPECTRAL), tasks=st.integers(2, 4), seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_order_does_not_matter_and_scale_is_kept(method: str, tasks: int, seed: int, scale: float) -> None:
    given = drawn((13, 18), tasks, seed)
    plain = change(method, given)
    assert distance(change(method, given[::-1]), plain) < 1e-6
    assert distance(change(method, [task * -scale for task in given]), plain * -scale) < 1e-6
    assert distance(change(method, given, scale=scale), plain * scale) < 1e-12
    doubled = change(method, given, coefficients=[2.0] * tasks)
    assert distance(doubled, 2 * plain) < 1e-6
    negated = [1.0] * (tasks - 1) + [-1.0]
    assert distance(change(method, given, negated), change(method, [*given[:-1], -given[-1]])) < 1e-9


def test_tsv_m_of_one_model_and_of_the_same_model_is_that_model() -> None:
    (task,) = drawn((10, 14), 1, 5)
    assert distance(change("tsv_m", [task]), task) < 1e-9
    left, values, right = svd(task)
    half = left[:, :5] * values[:5] @ right[:5]  # what r/T triples hold
    assert distance(change("tsv_m", [task, task]), half) < 1e-6
    assert distance(change("tsv_m", [task, 3 * task]), 2 * half) < 1e-6  # the same vectors, the mean of the values


@pytest.mark.parametrize(("keep", "count"), [(0.5, 2), (0.25, 1), (0.01, 1), (1.0, 4)])
def test_tsv_m_of_fewer_triples(keep: float, count: int) -> None:
    given = drawn((12, 20), 3, 11)
    found = change("tsv_m", given, keep=keep)
    assert distance(found, tsv_m(given, count / 4)) < 1e-9
    assert np.linalg.matrix_rank(found, tol=1e-9) == 3 * count


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"sharing": 0.0, "ridge": 0.01}, {"sharing": 2.0, "keep": 0.5}])
def test_dual_bases_with_other_options(options: dict[str, Any]) -> None:
    common, *own = drawn((30, 24), 4, 12)
    given = [0.7 * common + one for one in own]  # alike enough that sharing matters
    assert distance(change("dual_basis", given, **options), dual_basis(given, **options)) < 1e-9


def test_dual_bases_of_tasks_that_differ_keep_what_each_does_and_of_like_ones_their_mean() -> None:
    """Directions that cross, without a ridge to speak of: each task's own action is exact and no other answers."""
    one, two = drawn((40, 40), 2, 13)
    found = change("dual_basis", [one, two], keep=0.5, sharing=0.0, ridge=1e-12)
    (u, s, v), (other, _, _) = svd(one), svd(two)
    np.testing.assert_allclose(u[:, :10].T @ found @ v[:10].T, np.diag(s[:10]), atol=1e-7)
    assert np.abs(other[:, :10].T @ found @ v[:10].T).max() < 1e-7
    low = u[:, :5] * s[:5] @ v[:5]
    alike = change("dual_basis", [low, 3 * low], keep=0.5, ridge=1e-9)
    assert distance(alike, 2 * low) < 1e-6


def test_a_contributor_of_coefficient_zero_is_as_if_not_there() -> None:
    one, two, three = drawn((9, 9), 3, 6)
    for method in SPECTRAL:
        with_it = change(method, [one, two, three], [1.0, 0.0, 1.0])
        np.testing.assert_array_equal(with_it, change(method, [one, three]))


@pytest.mark.parametrize("method", SPECTRAL)
def test_nothing_is_made_of_nothing(method: str) -> None:
    zero = np.zeros((6, 8))
    (task,) = drawn((6, 8), 1, 7)
    assert not change(method, [zero, zero]).any()
    assert not change(method, [task, task], [0.0, 0.0]).any()
    assert np.isfinite(change(method, [task, -task])).all()
    assert not change("iso_c", [task, -task]).any()


def test_of_a_low_rank_only_the_directions_there_are_count() -> None:
    """The vectors of singular values of zero could be any: full SVDs give what LAPACK happens to choose."""
    draw = np.random.default_rng(8)
    thin = [draw.standard_normal((12, 2)) @ draw.standard_normal((2, 15)) for _ in range(3)]
    left, values, right = svd(np.sum(thin, axis=0))
    expected = values.sum() / 12 * left[:, :6] @ right[:6]
    assert distance(change("iso_c", thin), expected) < 1e-6
    for method in ("tsv_m", "iso_cts"):
        assert np.linalg.matrix_rank(change(method, thin), tol=1e-6) == 6


def test_more_tasks_than_directions_keep_one_each() -> None:
    given = drawn((2, 9), 5, 9)
    parts = [svd(task) for task in given]
    left, right = polar(np.hstack([u[:, :1] for u, _, _ in parts])), polar(np.vstack([v[:1] for _, _, v in parts]))
    values = np.concatenate([s[:1] for _, s, _ in parts])
    assert distance(change("tsv_m", given), left * values @ right) < 1e-9
    assert np.isfinite(change("iso_cts", given)).all()
    row = drawn((1, 9), 3, 9)
    assert distance(change("iso_c", row), np.sum(row, axis=0)) < 1e-9
    assert distance(change("tsv_m", [row[0], row[0]]), row[0]) < 1e-9


@pytest.mark.parametrize(
    ("rank", "tasks", "common", "expected"),
    [
        (768, 8, 0.8, (616, 19)),
        (768, 4, 0.8, (616, 38)),
        (10, 3, 1.0, (10, 0)),
        (10, 3, 0.0, (1, 3)),
        (3, 5, 0.0, (3, 0)),
    ],
)
def test_directions_are_divided_as_in_the_authors_code(
    rank: int, tasks: int, common: float, expected: tuple[int, int]
) -> None:
    assert shares(rank, tasks, common) == expected


def numbers(folder: Path) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("method", SPECTRAL)
def test_the_rest_is_averaged_or_as_far_from_the_base_model_as_is_said(method: str, tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")
    origin, tuned = numbers(base), [numbers(model) for model in models]
    norm = next(name for name in origin if "LayerNorm.weight" in name)
    weight = next(name for name in origin if "query.weight" in name)
    mean = np.mean([one[norm] for one in tuned], axis=0)
    for rest, expected in ((1.0, mean), (0.0, origin[norm]), (1.5, 1.5 * mean - 0.5 * origin[norm])):
        out = Path(merge(models, tmp_path / f"out{rest}", method=method, base=base, options={"rest": rest}))
        found = numbers(out)
        np.testing.assert_allclose(found[norm], expected, rtol=1e-6, atol=1e-6)
        change_ = ORACLES[method]([one[weight] - origin[weight] for one in tuned])
        np.testing.assert_allclose(found[weight] - origin[weight], change_, atol=1e-5)


def test_coefficients_without_a_sum_have_no_part_of_an_average(tmp_path: Path) -> None:
    base, models = write_family(tmp_path, "bert", "F32")
    with pytest.raises(UserError, match="sum to zero"):
        merge(models[:2], tmp_path / "out", method="iso_c", base=base, coefficients=[1, -1], options={"rest": 0.5})
    assert not (tmp_path / "out").exists()
    merge(models[:2], tmp_path / "out", method="iso_c", base=base, coefficients=[1, -1], options={"rest": 0})
