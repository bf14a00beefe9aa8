"""The factorisation in blocks against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch

from merganser.methods.cholesky import cholesky_


def positive(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    half = torch.randn(width, width + 3, generator=generator, dtype=torch.float64)
    return (half @ half.T / width + 0.1 * torch.eye(width)).to(dtype)


@pytest.mark.parametrize("width", [1, 5, 191, 192, 193, 384, 500])
def test_it_solves_what_lapack_solves(width: int) -> None:
    matrix = positive(width)
    right = torch.randn(7, width, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right.T).T
    factor = cholesky_(matrix.clone())
    assert factor is not None
    torch.testing.assert_close(factor.lower.tril(), torch.linalg.cholesky(matrix))
    torch.testing.assert_close(factor.solve_(right.clone()), expected)
    assert factor.smallest_pivot == pytest.approx(float(torch.linalg.cholesky(matrix).diagonal().min()) ** 2)


def test_float32_is_as_near_as_lapack_in_float32() -> None:
    matrix, right = positive(500), torch.randn(9, 500, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right.T).T
    factor = cholesky_(matrix.float())
    assert factor is not None
    lapack = torch.cholesky_solve(right.float().T, torch.linalg.cholesky(matrix.float())).T
    ours, theirs = ((found.double() - expected).norm() for found in (factor.solve_(right.float()), lapack))
    assert ours < 2 * theirs


def test_what_is_above_the_diagonal_is_not_read() -> None:
    matrix = positive(300)
    other = matrix.tril() + torch.full_like(matrix, torch.nan).triu(1)
    one, two = cholesky_(matrix.clone()), cholesky_(other)
    assert one is not None and two is not None
    assert torch.equal(one.lower.tril(), two.lower.tril())


@pytest.mark.parametrize("place", [0, 150, 250, 299])
def test_what_is_not_positive_definite_has_no_factor(place: int) -> None:
    matrix = positive(300)
    matrix[place, place] = -1.0
    assert cholesky_(matrix) is None
    broken = positive(300)
    broken[place, place] = torch.nan
    assert cholesky_(broken) is None
