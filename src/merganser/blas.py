"""Products, Cholesky factors and triangular systems, in place, without copies and without holding the interpreter.

On the CPU by the BLAS and LAPACK that SciPy publishes for Cython (OpenBLAS in its wheels): on Zen 4 products and
triangular systems take four fifths of the time of torch's (MKL). They are called through ctypes, since SciPy's own
wrappers keep other threads from running. Elsewhere by torch.

BLAS reads columns first, so a matrix here, read rows first, is its transpose there. It is given addresses, so what it
would read or write is checked before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_NUMBERS: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("s", ctypes.c_float),
    torch.float64: ("d", ctypes.c_double),
}


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
        _call("blas", "gemm", out, b"N", b"N", n, m, k, _number(out, scale), *matrices)
    return out


def cholesky_(matrix: Tensor) -> bool:
    """Factor a symmetric matrix A (d, d) in place: then its lower triangle holds L with L Lᵀ = A.

    Args:
        matrix: only the lower triangle is read.

    Returns:
        whether it is positive definite, and so was factored.

    Raises:
        ValueError: as :func:`add_product_`.
    """
    _check(matrix, (len(matrix), len(matrix)))
    if matrix.device.type == "cpu":
        failed = ctypes.c_int()
        _call("lapack", "potrf", matrix, b"U", len(matrix), *_matrix(matrix), failed)
        done = not failed.value
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        done = not int(info)
    return done and bool(matrix.diagonal().isfinite().all())


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
            _call("blas", "trsm", right, b"L", b"U", transposed, b"N", width, rows, *matrices)
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


def _number(like: Tensor, value: float) -> Any:
    return _NUMBERS[like.dtype][1](value)


def _call(library: str, routine: str, like: Tensor, *arguments: Any) -> None:
    """Call a routine in the precision of ``like``; Fortran takes every argument by its address."""
    function = _function(library, _NUMBERS[like.dtype][0] + routine)
    held = [ctypes.c_int(argument) if isinstance(argument, int) else argument for argument in arguments]
    function(*(arg if isinstance(arg, (bytes, ctypes.c_void_p)) else ctypes.byref(arg) for arg in held))


@cache
def _function(library: str, name: str) -> Callable[..., None]:
    """A routine of ``scipy.linalg.cython_blas`` or ``cython_lapack``, from the table meant for compiled code."""
    from scipy.linalg import cython_blas, cython_lapack

    capsule = {"blas": cython_blas, "lapack": cython_lapack}[library].__pyx_capi__[name]
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    meaning = signature(capsule)
    if b"int *" not in meaning:
        raise RuntimeError(f"SciPy's {name} counts in other integers than of 32 bits: {meaning.decode()}")
    return ctypes.CFUNCTYPE(None)(address(capsule, meaning))
