"""What no data could have given is found in published statistics, at every scale; what honest data give is let be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from merganser.statistics import LayerStatistics, Statistics, StatisticsHeader
from merganser.statistics.judging import judge, judged_names
from merganser.statistics.storage import compress, parse_storage
from merganser.statistics.writing import infos_of
from merganser.tensors import pack_upper, unpack_upper
from statistics_examples import make_inputs, make_statistics


def published(x: Tensor) -> Statistics:
    """Statistics of a layer with these inputs (rows, d) float64, summed in float32 as collecting does."""
    narrow = x.to(torch.float32)
    header = StatisticsHeader(
        layers=(LayerStatistics(module="a", kind="linear", weight="a.weight", input="a", rows=len(x)),),
        manifest_sha256="0" * 64,
        tensor_sha256={"a.weight": "1" * 64},
        examples=1,
        tokens=len(x),
        masking="none",
    )
    gram = pack_upper(narrow.T @ narrow / len(x))
    return Statistics.in_memory(header, {"gram.a": gram, "mean.a": narrow.double().mean(0).float()})


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ill_conditioned(rows: int = 3000, width: int = 96) -> Tensor:
    """Inputs of very different sizes, correlated, as those of deep layers are."""
    x = make_inputs(width, rows, 5)
    return x * torch.logspace(-5, 3, width, dtype=torch.float64)


HONEST: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: gaussian(500, 40),
    "one input": lambda: gaussian(500, 1),
    "one row": lambda: gaussian(1, 300),
    "fewer rows than inputs": lambda: gaussian(20, 400),
    "correlated, one dead, one constant": lambda: make_inputs(64, 400, 3),
    "of many sizes": ill_conditioned,
    "nearly constant": lambda: 5 + 1e-4 * gaussian(300, 200),
    "constant": lambda: torch.full((50, 30), 0.3, dtype=torch.float64),
    "zero": lambda: torch.zeros(50, 30, dtype=torch.float64),
    "after a GELU that is nearly dead": lambda: torch.cat([gaussian(90, 5), -1e-23 * gaussian(90, 5).abs()], 1),
    "huge": lambda: 1e15 * gaussian(90, 30),
    "tiny": lambda: 1e-15 * gaussian(90, 30),
    "a few outliers": lambda: gaussian(900, 50) * (1 + 1e4 * (gaussian(900, 50, 1) > 3)),
    "wide, by its mean alone": lambda: 1 + gaussian(40, 1500) * 1e-3,
}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "lowrank:4"])
@pytest.mark.parametrize("kind", HONEST)
def test_honest_data_are_let_be(kind: str, storage: str) -> None:
    statistics = published(HONEST[kind]())
    if storage == "lowrank:4" and statistics.width("a") <= 4:
        pytest.skip("no rank below the width")
    if storage != "float32":
        statistics = Statistics.in_memory(*compress(statistics, parse_storage(storage)))
    statistics.validate()


def spoilt(statistics: Statistics, change: Callable[[Tensor, Tensor], Any]) -> list[str]:
    """The problems of a file whose Gram matrix (d, d) and mean a change was made to, in place."""
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
    gram, mean = unpack_upper(tensors["gram.a"]).double(), tensors["mean.a"].double()
    change(gram, mean)
    tensors |= {"gram.a": pack_upper(gram.float()), "mean.a": mean.float()}
    infos = infos_of(tensors)
    return [text for name in judged_names(infos) for text in judge(name, infos, tensors.__getitem__).problems]


def stretch(gram: Tensor, mean: Tensor) -> None:
    diagonal = gram.diagonal().clone()
    gram.mul_(1.1).diagonal().copy_(diagonal)


def against_the_smallest(gram: Tensor, mean: Tensor) -> None:
    """A negative eigenvalue among the smallest inputs, which a tolerance beside the trace does not see."""
    block = gram[:8, :8]
    values, vectors = torch.linalg.eigh(block)
    block.sub_(2 * float(values[-1]) * torch.outer(vectors[:, -1], vectors[:, -1]))


def small_and_large(gram: Tensor, mean: Tensor) -> None:
    gram[0, -1] = gram[-1, 0] = 2 * (gram[0, 0] * gram[-1, -1]).sqrt()


ATTACKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "off-diagonals x 1.1": stretch,
    "one negative direction": lambda g, m: g.sub_(torch.eye(len(g)) * 0.01 * g.diagonal()),
    "a negative direction of small inputs": against_the_smallest,
    "one entry that the diagonal does not allow": small_and_large,
    "the mean x 2": lambda g, m: m.mul_(2),
    "the mean of the smallest input": lambda g, m: m[:1].fill_(3 * float(g[0, 0].sqrt())),
    "a negative diagonal": lambda g, m: g[3, 3:4].mul_(-1),
    "negated": lambda g, m: g.mul_(-1),
    "zeroed, the mean left": lambda g, m: g.zero_(),
    "one row zeroed on the diagonal alone": lambda g, m: g[5, 5:6].zero_(),
    "x 1e-30, the mean left": lambda g, m: g.mul_(1e-30),
    "NaN": lambda g, m: g[0, :1].fill_(float("nan")),
    "infinite": lambda g, m: m[:1].fill_(float("inf")),
}


@pytest.mark.parametrize("kind", ["correlated, one dead, one constant", "of many sizes", "fewer rows than inputs"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_found_at_every_scale(kind: str, attack: str) -> None:
    statistics = published(HONEST[kind]())
    assert spoilt(statistics, lambda g, m: None) == []
    found = spoilt(statistics, ATTACKS[attack])
    assert len(found) == 1 and ("gram.a" in found[0] or "mean.a" in found[0])
    for size in (1e-6, 1e6):  # the same of inputs that are all as much smaller or larger
        scaled = published(HONEST[kind]() * size)
        assert spoilt(scaled, ATTACKS[attack]), (attack, size)


def test_a_mean_and_a_matrix_are_told_apart() -> None:
    statistics = published(HONEST["of many sizes"]())
    assert "square of its mean" in spoilt(statistics, ATTACKS["the mean x 2"])[0]
    assert "positive semi-definite" in spoilt(statistics, stretch)[0]


def test_a_covariance_in_bfloat16_is_held_against_its_own_diagonal() -> None:
    small = Statistics.in_memory(*compress(published(ill_conditioned()), parse_storage("bfloat16")))
    tensors: Mapping[str, Tensor] = {name: small.packed(name).clone() for name in small.tensors}
    infos = infos_of(tensors)
    assert not judge("gram.a", infos, tensors.__getitem__).problems
    tensors["diagonal.a"][:4] *= 0.5  # less than the square of what varies there
    assert judge("gram.a", infos, tensors.__getitem__).problems


def test_counts_and_fisher_information() -> None:
    statistics = make_statistics()
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
    names = judged_names(statistics.tensors)
    assert [judge(name, statistics.tensors, tensors.__getitem__).problems for name in names] == [()] * len(names)
    tensors["count.emb"].zero_()
    assert "counts nothing" in str(judge("count.emb", statistics.tensors, tensors.__getitem__).problems)
    tensors["fisher.layer.0.weight"][0, 0] = -1
    assert "negative" in str(judge("fisher.layer.0.weight", statistics.tensors, tensors.__getitem__).problems)
