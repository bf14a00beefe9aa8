"""Products, Cholesky and eigenvalue factors, triangular systems, in place and without holding the interpreter.

On the CPU by an OpenBLAS of merganser's own (the package ``scipy-openblas32``), called through ctypes: on Zen 4,
products take four fifths of the time of torch's (MKL). It is apart from those that NumPy and
SciPy bring: it runs every call on the thread that makes it, with one choice of kernels, so that bytes depend neither on
what else a program has loaded nor on how many cores there are. Elsewhere by torch.

BLAS reads columns first, so a matrix here, read rows first, is its transpose there. It is given addresses, so what it
would read or write is checked before.
"""

from __future__ import annotations

import ctypes
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NUMBERS: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("s", ctypes.c_float),
    torch.float64: ("d", ctypes.c_double),
}
_SUFFIXES = (".so", ".dylib", ".dll")


def add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``out`` + ``scale`` · ``left @ right``, in place, and returned.

    Args:
        out: (m, n), which shares no memory with the others.
        left: (m, k).
        right: (k, n).
        scale: multiplier of the product.

    Raises:
        ValueError: shapes that do not fit, numbers of a row that do not follow each other, or another dtype than one
            of float32 and float64.
    """
    (m, k), n = left.shape, right.shape[1]
    _check(out, (m, n))
    _check(right, (k, n), out.dtype)
    _check(left, (m, k), out.dtype)
    if out.device.type != "cpu":
        return out.addmm_(left, right, alpha=scale)
    if m and n and k:
        matrices = (*_matrix(right), *_matrix(left), _number(out, 1.0), *_matrix(out))
        _call("gemm", out, b"N", b"N", n, m, k, _number(out, scale), *matrices)
    return out


def cholesky_(matrix: Tensor, *, upper: bool = False) -> bool:
    """Factor a symmetric matrix A (d, d) in place: then its lower triangle holds L with L Lᵀ = A.

    Args:
        matrix: only the lower triangle is read.
        upper: the upper triangle is read instead, and then holds Lᵀ.

    Returns:
        whether it is positive definite, and so was factored.

    Raises:
        ValueError: as :func:`add_product_`.
    """
    _check(matrix, (len(matrix), len(matrix)))
    if matrix.device.type == "cpu":
        failed = ctypes.c_int()
        _call("potrf", matrix, b"L" if upper else b"U", len(matrix), *_matrix(matrix), failed)
        done = not failed.value
    else:
        factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
        matrix.copy_(factor)
        done = not int(info)
    return done and bool(matrix.diagonal().isfinite().all())


def add_gram_(out: Tensor, matrix: Tensor) -> Tensor:
    """The lower triangle of ``out`` + ``matrix @ matrix.T``, in place, and returned; half the work of a product.

    Args:
        out: (d, d); on the CPU, what is above its diagonal stays as it is.
        matrix: (d, n), which shares no memory with ``out``, or the transpose of what could be given.

    Raises:
        ValueError: as :func:`add_product_`.
    """
    d, n = matrix.shape
    turned = matrix.stride(0) == 1 and d > 1
    _check(out, (d, d))
    _check(matrix.T if turned else matrix, (n, d) if turned else (d, n), out.dtype)
    if out.device.type != "cpu":
        return out.addmm_(matrix, matrix.T)
    if d and n:
        one, flag = _number(out, 1.0), b"N" if turned else b"T"
        _call("syrk", out, b"U", flag, d, n, one, *_matrix(matrix.T if turned else matrix), one, *_matrix(out))
    return out


def eigh_(matrix: Tensor, wanted: int | None = None) -> Tensor:
    """Eigenvalues (d,) of a symmetric matrix (d, d), the smallest first; the matrix then holds eigenvectors as rows.

    By divide and conquer (Cuppen 1981). Beside the matrix, this takes room for two more of them, and one more for a
    part of the vectors.

    Args:
        matrix: only the lower triangle is read.
        wanted: how many eigenvectors, those of the largest eigenvalues, are in the last rows, which saves up to
            a quarter of the time; other rows are of no meaning then. Squares of the numbers have to be neither too
            large nor too small for the dtype. All by default.

    Raises:
        ValueError: as :func:`add_product_`, or it does not converge.
    """
    width = len(matrix)
    _check(matrix, (width, width))
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix, UPLO="L")
        matrix.copy_(vectors.T)
        return values
    values, failed = matrix.new_empty(width), ctypes.c_int()
    if not width:
        return values
    work, whole = matrix.new_empty(1 + 6 * width + 2 * width**2), torch.empty(3 + 5 * width, dtype=torch.int32)
    at, room = _address(values), (_address(work), len(work))
    more = (*room, _address(whole), len(whole))
    if wanted is None or wanted >= width:
        _call("syevd", matrix, b"V", b"U", width, *_matrix(matrix), at, *more, failed)
    else:  # the same in its three steps: a tridiagonal matrix, its eigenvectors, and those that are wanted turned back
        beside, reflectors, vectors = matrix.new_empty(width), matrix.new_empty(width), torch.empty_like(matrix)
        _call("sytrd", matrix, b"U", width, *_matrix(matrix), at, _address(beside), _address(reflectors), *room, failed)
        _call("stedc", matrix, b"I", width, at, _address(beside), *_matrix(vectors), *more, failed)
        last = vectors[width - wanted :]
        given = (*_matrix(matrix), _address(reflectors), *_matrix(last), *room, failed)
        if wanted and not failed.value:
            _call("ormtr", matrix, b"L", b"U", b"N", width, wanted, *given)
        matrix[width - wanted :] = last
    if failed.value:
        raise ValueError("the eigenvalues of a symmetric matrix were not found")
    return values


def solve_cholesky_(right: Tensor, lower: Tensor) -> Tensor:
    """X with X A = ``right``, in place, and returned.

    Args:
        right: (rows, d).
        lower: (d, d), L with L Lᵀ = A in its lower triangle; what is above is of no meaning.

    Raises:
        ValueError: as :func:`add_product_`.
    """
    rows, width = right.shape
    _check(right, (rows, width))
    _check(lower, (width, width), right.dtype)
    if right.device.type != "cpu":
        lower = lower.tril()
        half = torch.linalg.solve_triangular(lower.T, right, upper=True, left=False)
        return right.copy_(torch.linalg.solve_triangular(lower, half, upper=False, left=False))
    if rows and width:
        for transposed in (b"T", b"N"):
            matrices = (_number(right, 1.0), *_matrix(lower), *_matrix(right))
            _call("trsm", right, b"L", b"U", transposed, b"N", width, rows, *matrices)
    return right


def _check(matrix: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless BLAS can be given the address of this matrix as one of this shape and dtype."""
    if tuple(matrix.shape) != shape:
        raise ValueError(f"a matrix of {list(matrix.shape)} where one of {list(shape)} fits")
    if matrix.dtype not in _NUMBERS or matrix.dtype != (dtype or matrix.dtype):
        raise ValueError(f"{matrix.dtype} where all have to be float32, or all float64")
    rows, columns = shape
    if (columns > 1 and matrix.stride(1) != 1) or (rows > 1 and matrix.stride(0) < columns):
        raise ValueError("the numbers of a row have to follow each other, and the rows, too")


def _matrix(matrix: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int]:
    """Where a matrix begins, and by how many numbers the next row does later."""
    step = matrix.stride(0) if len(matrix) > 1 else 0
    return ctypes.c_void_p(matrix.data_ptr()), ctypes.c_int(max(step, matrix.shape[1], 1))


def _address(vector: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(vector.data_ptr())


def _number(like: Tensor, value: float) -> Any:
    return _NUMBERS[like.dtype][1](value)


def _call(routine: str, like: Tensor, *arguments: Any) -> None:
    """Call a routine in the precision of ``like``; Fortran takes every argument by its address."""
    if _LIBRARY is None:
        raise ModuleNotFoundError("no OpenBLAS: pip install scipy-openblas32", name="scipy_openblas32")
    function = _LIBRARY[f"scipy_{_NUMBERS[like.dtype][0]}{routine}_"]
    held = [ctypes.c_int(argument) if isinstance(argument, int) else argument for argument in arguments]
    function(*(arg if isinstance(arg, (bytes, ctypes.c_void_p)) else ctypes.byref(arg) for arg in held))


def _load() -> ctypes.CDLL | None:
    """The library, loaded without importing its package, which would offer it to SciPy; None where it is absent."""
    package = find_spec("scipy_openblas32")
    if package is None or package.origin is None:
        return None
    files = [f for f in (Path(package.origin).parent / "lib").iterdir() if f.suffix in _SUFFIXES]
    wanted = {"OPENBLAS_NUM_THREADS": "1"}
    if _zen() and "OPENBLAS_CORETYPE" not in os.environ:
        # On Zen 4 it would take kernels for AVX-512, which that processor does in two halves: triangular systems take
        # up to half as long again.
        wanted["OPENBLAS_CORETYPE"] = "ZEN"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)  # read while the library is loaded, by it alone
    try:
        library = ctypes.CDLL(str(min(files)))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    library.scipy_openblas_set_num_threads(1)
    return library


def _zen() -> bool:
    """Whether the processor is a Zen 3 or Zen 4 (family 25)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        return False
    return "AuthenticAMD" in text and re.search(r"^cpu family\s*: 25$", text, re.MULTILINE) is not None


#: Loaded with this module: for that moment the environment is another, which no thread should read meanwhile.
_LIBRARY = _load()
