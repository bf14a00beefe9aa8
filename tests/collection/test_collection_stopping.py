"""The error of Gram matrices, estimated from two halves: against dense float64, and against the true error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.collection.shards import ShardSums
from merganser.collection.stopping import StoppingRule, check_points, estimated_error
from merganser.errors import UserError
from merganser.statistics import LayerStatistics, Statistics, StatisticsHeader
from merganser.tensors import pack_upper, unpack_upper
from statistics_examples import batched, make_examples


def statistics_of(inputs: dict[str, Tensor]) -> Statistics:
    """Statistics of layers with these inputs, rows × width."""
    layers = tuple(
        LayerStatistics(module=name, kind="linear", weight=f"{name}.weight", input=name, rows=len(x))
        for name, x in inputs.items()
    )
    header = StatisticsHeader(
        layers=layers,
        manifest_sha256="0" * 64,
        tensor_sha256={layer.weight: "1" * 64 for layer in layers},
        examples=1,
        tokens=1,
        masking="attention_mask",
    )
    tensors = {f"gram.{name}": pack_upper((x.T @ x / len(x)).float()) for name, x in inputs.items()}
    return Statistics.in_memory(header, tensors | {f"mean.{name}": x.mean(0).float() for name, x in inputs.items()})


def sums_of(*parts: dict[str, Tensor]) -> ShardSums:
    sums = ShardSums()
    for part in parts:
        sums.add(statistics_of(part))
    return sums


def test_the_estimate_is_what_it_says() -> None:
    torch.manual_seed(0)
    one = {"a": torch.randn(30, 5).double() + 1, "b": torch.randn(30, 3).double()}
    two = {"a": torch.randn(50, 5).double() + 1, "b": torch.randn(50, 3).double()}
    more = {"a": torch.randn(10, 5).double() + 1, "b": torch.randn(10, 3).double()}
    squares = []
    for name in one:
        first = torch.cat([one[name], more[name]])
        a, b = first.T @ first / 40, two[name].T @ two[name] / 50
        whole = (40 * a + 50 * b) / 90
        squares.append(40 / 90 * 50 / 90 * float((a - b).norm() ** 2 / whole.norm() ** 2))
    estimate = estimated_error(sums_of(one, more), sums_of(two))
    assert estimate == pytest.approx(math.sqrt(sum(squares) / 2), rel=1e-5)


def test_the_estimate_is_the_error_on_average() -> None:
    torch.manual_seed(1)
    mixing = torch.randn(6, 6).double()
    truth = mixing @ mixing.T
    estimates, errors = [], []
    for _ in range(200):
        halves = [torch.randn(n, 6).double() @ mixing.T for n in (150, 250)]
        whole = torch.cat(halves)
        errors.append(float((whole.T @ whole / 400 - truth).norm() / truth.norm()) ** 2)
        estimates.append(estimated_error(*(sums_of({"x": half}) for half in halves)) ** 2)
    assert sum(estimates) / sum(errors) == pytest.approx(1, abs=0.1)


def test_the_estimate_of_a_model_falls_with_the_examples(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    checkpoint, errors = open_checkpoint(tmp_path), []
    for count in (40, 640):
        halves = []
        for seed in (1, 2):
            sums = ShardSums()
            batches = batched(model, make_examples(model, count, seed), 16)
            sums.add(Statistics.in_memory(*collect_statistics(model, checkpoint, batches)))
            halves.append(sums)
        errors.append(estimated_error(*halves))
    assert 0.1 < errors[1] / errors[0] < 0.6  # a quarter: one over the root of 16


def test_an_empty_half_says_nothing_and_equal_halves_agree() -> None:
    x = {"x": torch.randn(20, 4).double()}
    assert estimated_error(sums_of(x), ShardSums()) == math.inf
    assert estimated_error(sums_of(x), sums_of(x)) == 0
    zero = {"x": torch.zeros(20, 4).double()}
    assert estimated_error(sums_of(zero), sums_of(zero)) == 0


def test_halves_together_are_the_whole() -> None:
    torch.manual_seed(2)
    one, two = {"x": torch.randn(20, 4).double()}, {"x": torch.randn(31, 4).double()}
    sums = sums_of(one)
    sums.absorb(sums_of(two))
    sums.absorb(ShardSums())
    header, tensors = sums.result()
    x = torch.cat([one["x"], two["x"]])
    assert header.layers[0].rows == 51 and header.examples == 2
    torch.testing.assert_close(unpack_upper(tensors["gram.x"]), (x.T @ x / 51).float())


def test_checks_come_at_growing_points() -> None:
    points = check_points(1000)
    assert points == [128, 192, 288, 432, 648, 972, 1000]
    assert check_points(128) == [128] and check_points(5) == [5]
    assert len(check_points(10**6)) < 25  # few, however many the examples


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, 5.0, float("nan"), float("inf")])
def test_tolerances_that_are_none(tolerance: float) -> None:
    with pytest.raises(UserError, match=r"--until-converged: a tolerance of"):
        StoppingRule(tolerance, 0, 1, None)
