"""The sign-flip test against brute force, Holm against numbers worked by hand."""

import itertools

import numpy as np
import pytest

from merganser.lab.report.significance import EXACT, Paired, holm, sign_flip
from merganser.lab.report.ties import PairCounts


def brute_force(differences: list[float]) -> float:
    seen = abs(np.mean(differences))
    means = [
        abs(np.mean([sign * d for sign, d in zip(signs, differences, strict=True)]))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return float(np.mean([mean >= seen - 1e-12 for mean in means]))


@pytest.mark.parametrize("seed", range(6))
def test_p_is_the_share_of_sign_assignments_as_extreme(seed: int) -> None:
    generator = np.random.default_rng(seed)
    differences = list(generator.normal(0.3, 1.0, 3 + seed))
    found = sign_flip(differences)
    assert found.p == pytest.approx(brute_force(differences))
    assert (found.n, found.difference) == (len(differences), pytest.approx(np.mean(differences)))
    above, below = sum(d >= 0.05 for d in differences), sum(d <= -0.05 for d in differences)
    assert found.counts == PairCounts(above, below, sum(abs(d) < 0.05 for d in differences))


def test_ties_and_zeros_count() -> None:
    for differences in ([1.0, 1.0, 1.0, -1.0], [0.0, 0.0, 2.0, 1.0], [0.1, 0.2, -0.3]):
        assert sign_flip(differences).p == pytest.approx(brute_force(differences))
    assert sign_flip([0.0, 0.0]).p == 1.0
    found = sign_flip([1e-7, -0.02, 0.0, 0.04, 2.0])
    assert found.p == pytest.approx(brute_force([1e-7, -0.02, 0.0, 0.04, 2.0])), "what is tied counts as it is"
    assert (found.n, found.counts) == (5, PairCounts(above=1, below=0, tied=4))


def test_five_of_five_cannot_be_below_a_sixteenth() -> None:
    assert sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]).p == 2 / 2**5


def test_many_differences_are_sampled_near_the_exact_value_and_always_the_same() -> None:
    generator = np.random.default_rng(7)
    differences = list(generator.normal(0.4, 1.0, EXACT + 2))
    sampled = sign_flip(differences)
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    exact = float((np.abs(sums) >= abs(sum(differences)) - 1e-9).mean())
    assert sampled.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 100_000) + 2e-5)
    assert sign_flip(differences) == sampled
    assert sign_flip([1.0] * 40).p > 0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_markers_go_by_the_adjusted_value() -> None:
    kept = {"n": 9, "difference": 1.0, "counts": PairCounts(9, 0, 0), "p": 0.001}
    assert [Paired(**kept, adjusted=p).marker for p in (0.005, 0.03, 0.05)] == ["**", "*", ""]
    assert not Paired(**{**kept, "difference": 0.04}, adjusted=0.001).marker
