"""Products, factors and triangular systems in place, against torch in float64; also inside larger matrices."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merganser import blas
from merganser.blas import add_gram_, add_product_, cholesky_, eigh_, solve_cholesky_
from merganser.tensors import one_thread


def positive(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    half = torch.randn(width, width + 3, generator=generator, dtype=torch.float64)
    return (half @ half.T / width + 0.1 * torch.eye(width)).to(dtype)


def inside(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers as part of a larger matrix, whose rows are further apart."""
    around = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 5), torch.nan, dtype=matrix.dtype)
    part = around[1:-1, 2:-3]
    return part.copy_(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 5, 7), (7, 1, 2), (0, 4, 4), (4, 0, 4), (65, 130, 33)])
def test_a_product_is_added_in_place(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((m, n), (m, k), (k, n))
    out, left, right = (torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes)
    expected = (out.double() - 2.5 * (left.double() @ right.double())).to(dtype)
    for place in (torch.clone, inside):
        found, a, b = place(out), place(left), place(right)
        assert add_product_(found, a, b, -2.5) is found
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-12)
        assert torch.equal(a, left) and torch.equal(b, right)
    around = inside(out)
    add_product_(around, left, right)
    assert around._base is not None and int(around._base.isnan().sum()) == (m + 2) * (n + 5) - m * n


@pytest.mark.parametrize("place", range(3))
def test_what_blas_would_misread_is_refused(place: int) -> None:
    for wrong, message in (
        (torch.zeros(4, 3).T, "follow each other"),
        (torch.zeros(1, 4).expand(3, 4), "follow each other"),
        (torch.zeros(3, 4, dtype=torch.float64), "all have to be"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "all have to be"),
    ):
        matrices = [torch.zeros(3, 4), torch.zeros(3, 3), torch.zeros(3, 4)]
        matrices[place] = wrong if place != 1 else wrong[:, :3]
        with pytest.raises(ValueError, match=message):
            add_product_(*matrices)
    with pytest.raises(ValueError, match="fits"):
        cholesky_(torch.eye(4)[:3])
    with pytest.raises(ValueError, match="fits"):
        solve_cholesky_(torch.zeros(2, 3), torch.eye(4))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5), (4, 4)), ((3, 4), (2, 5), (5, 4)), ((3, 3), (3, 5), (5, 4))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="fits"):
        add_product_(*(torch.zeros(*shape) for shape in shapes))


@pytest.mark.parametrize("width", [1, 5, 191, 192, 193, 384, 500])
def test_it_solves_what_lapack_solves(width: int) -> None:
    matrix = positive(width)
    right = torch.randn(7, width, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right.T).T
    for place in (torch.clone, inside):
        factor, solved = place(matrix), place(right)
        assert cholesky_(factor)
        torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(matrix))
        assert solve_cholesky_(solved, factor) is solved
        torch.testing.assert_close(solved, expected)


def test_float32_is_as_near_as_lapack_in_float32() -> None:
    matrix, right = positive(500), torch.randn(9, 500, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right.T).T
    factor = matrix.float()
    assert cholesky_(factor)
    lapack = torch.cholesky_solve(right.float().T, torch.linalg.cholesky(matrix.float())).T
    ours = solve_cholesky_(right.float(), factor)
    errors = [(found.double() - expected).norm() for found in (ours, lapack)]
    assert errors[0] < 2 * errors[1]


def test_what_is_above_the_diagonal_is_not_read() -> None:
    one = positive(300)
    two = one.tril() + torch.full_like(one, torch.nan).triu(1)
    assert cholesky_(one) and cholesky_(two)
    assert torch.equal(one.tril(), two.tril())
    right = torch.randn(2, 300, dtype=torch.float64)
    assert torch.equal(solve_cholesky_(right.clone(), one), solve_cholesky_(right.clone(), two))


@pytest.mark.parametrize("place", [0, 150, 250, 299])
def test_what_is_not_positive_definite_has_no_factor(place: int) -> None:
    matrix = positive(300)
    matrix[place, place] = -1.0
    assert not cholesky_(matrix)
    broken = positive(300)
    broken[place, place] = torch.nan
    assert not cholesky_(broken)


def test_it_is_apart_from_other_libraries() -> None:
    """One thread, whatever the others have; nothing of it stays in the environment, and SciPy is not needed."""
    code = (
        "import json, os, sys, numpy, torch\n"
        "from threadpoolctl import threadpool_info\n"
        "pools = lambda: {found['filepath']: found['num_threads'] for found in threadpool_info()}\n"
        "environment, before = dict(os.environ), pools()\n"
        "import merganser.blas as blas\n"
        "assert blas.cholesky_(torch.eye(300))\n"
        "assert dict(os.environ) == environment and 'scipy' not in sys.modules\n"
        "print(json.dumps([before, pools()]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = json.loads(run.stdout)
    (own,) = set(after) - set(before)
    assert "scipy_openblas32" in own and after.pop(own) == 1
    assert before and after == before


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "find_spec", lambda name: None)
    monkeypatch.setattr(blas, "_LIBRARY", blas._load())
    with pytest.raises(ModuleNotFoundError, match="pip install scipy-openblas32"):
        cholesky_(torch.eye(3))


def test_threads_side_by_side_get_the_bytes_of_one() -> None:
    matrices = [positive(200 + i, torch.float32) for i in range(8)]
    rights = [torch.randn(40, len(matrix)) for matrix in matrices]

    def solve(number: int) -> torch.Tensor:
        factor = matrices[number].clone()
        assert cholesky_(factor)
        return solve_cholesky_(add_product_(rights[number].clone(), rights[number], factor), factor)

    with one_thread(), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solve, range(8)))
        assert all(torch.equal(found, solve(number)) for number, found in enumerate(together))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (9, 4), (7, 1), (65, 130)])
def test_a_gram_matrix_is_added_to_the_lower_triangle(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, dtype=dtype, generator=generator)
    start = torch.randn(shape[0], shape[0], dtype=dtype, generator=generator)
    expected = start.double() + matrix.double() @ matrix.double().T
    for given in (matrix, inside(matrix), matrix.T.contiguous().T, inside(matrix.T).T):
        for place in (torch.clone, inside):
            found = place(start)
            assert add_gram_(found, given) is found
            torch.testing.assert_close(found.tril().double(), expected.tril(), rtol=1e-5, atol=1e-4)
            assert torch.equal(found.triu(1), start.triu(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 65, 200])
def test_eigenvectors_are_rows_and_only_the_lower_triangle_is_read(width: int, dtype: torch.dtype) -> None:
    matrix = positive(width, dtype) - torch.eye(width, dtype=dtype)
    exact = torch.linalg.eigvalsh(matrix.double())
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    for place in (torch.clone, inside):
        vectors = place(matrix.tril() + torch.full_like(matrix, torch.nan).triu(1))
        values = eigh_(vectors)
        torch.testing.assert_close(values.double(), exact, rtol=bound, atol=bound)
        product = (vectors.T * values) @ vectors
        torch.testing.assert_close(product.double(), matrix.double(), rtol=bound, atol=bound)
    assert eigh_(torch.empty(0, 0)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "wanted"), [(1, 0), (2, 1), (65, 20), (200, 199), (65, 65), (65, 90)])
def test_eigenvectors_of_the_largest_eigenvalues_alone(width: int, wanted: int, dtype: torch.dtype) -> None:
    matrix = positive(width, dtype)
    exact = torch.linalg.eigvalsh(matrix.double())
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    for place in (torch.clone, inside):
        vectors = place(matrix.tril() + torch.full_like(matrix, torch.nan).triu(1))
        values = eigh_(vectors, wanted)
        torch.testing.assert_close(values.double(), exact, rtol=bound, atol=bound)
        last = vectors[max(0, width - wanted) :]
        torch.testing.assert_close(
            last @ matrix, values[-len(last) :, None] * last if len(last) else last @ matrix, rtol=bound, atol=bound
        )
        torch.testing.assert_close(last @ last.T, torch.eye(len(last), dtype=dtype), rtol=bound, atol=bound)
