"""What a LoRA adapter does to one stored tensor, computed for the rows that are asked for.

The factors of a layer are those of its weight as the model has it; a box says which part of a stored tensor that is,
where experts are packed on one side and separate on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.checkpoints.layout import Box, Range
from merganser.checkpoints.reader import Checkpoint

#: Products are made in blocks of rows that start at multiples of this: the same bits however a tensor is cut.
_BLOCK = 128


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: W' = (its own whole tensor, else the base's) + scale · (BA or a vector).

    Attributes:
        whole: the adapter's tensor that takes the place of the base's.
        a: the adapter's factor (r, in), or (experts · r, in).
        b: the adapter's factor (out, r), or (out, r · experts), in which the experts of each rank lie together.
        vector: the adapter's vector that is added to a bias (``lora_bias``).
        scale: α/r, or α/√r for rank-stabilised LoRA.
        transposed: the tensor is (in, out), as in Conv1D layers and embeddings.
        experts: how many matrices are adapted at once, which lie behind each other in the tensor; None: it is one.
        rows: the rows that take the place of the base's, those of trained tokens, as a tensor of the adapter.
        tokens: which rows these are.
        box: which box of the tensor is which box of the adapted layer's weight; None: they are the same.
    """

    whole: str | None = None
    a: str | None = None
    b: str | None = None
    vector: str | None = None
    scale: float = 1.0
    transposed: bool = False
    experts: int | None = None
    rows: str | None = None
    tokens: tuple[int, ...] = ()
    box: Box | None = None

    @property
    def parts(self) -> dict[str, str]:
        """The adapter's tensors that are used, by what they are."""
        named = {"whole": self.whole, "a": self.a, "b": self.b, "vector": self.vector, "rows": self.rows}
        return {role: part for role, part in named.items() if part}

    @property
    def replaces(self) -> bool:
        """Whether nothing of the base's tensor is left."""
        return self.whole is not None and self.box is None

    @property
    def widens(self) -> bool:
        """Whether something is computed, so that the storage dtype is too narrow."""
        return self.a is not None or self.vector is not None or self.box is not None


def low_rank(changes: Sequence[Change]) -> Change | None:
    """The change of a tensor that is one low-rank product of all of it and nothing else; None: it is something else."""
    (first, *others) = changes
    extra = first.whole or first.rows or first.experts is not None or first.box is not None
    return first if first.a and first.b and not (others or extra) else None


def read_product(change: Change, adapter: Checkpoint) -> tuple[Tensor, Tensor]:
    """The factors s·B (out, r) and A (r, in) of such a change, in float64."""
    if change.a is None or change.b is None:
        raise RuntimeError("one factor without the other")
    return adapter.read(change.b).to(torch.float64).mul_(change.scale), adapter.read(change.a).to(torch.float64)


def apply(change: Change, adapter: Checkpoint, tensor: Tensor, start: int) -> None:
    """Change rows ``start:`` of a tensor in place.

    Args:
        change: what is done.
        adapter: the adapter's files.
        tensor: these rows, in float32 or wider where something is added.
        start: the first row.
    """
    if change.whole is not None and change.box is not None:
        _put_box(adapter.read(change.whole), change.box, tensor, start)
    if change.rows is not None:
        inside = [n for n, row in enumerate(change.tokens) if start <= row < start + tensor.shape[0]]
        if inside:
            tensor[[change.tokens[n] - start for n in inside]] = adapter.read(change.rows)[inside].to(tensor.dtype)
    if change.vector is not None:
        _add_vector(change, adapter, tensor, start)
    if change.a is not None:
        _add_products(change, adapter, tensor, start)


def _overlap(at: Range, start: int, tensor: Tensor) -> Range:
    """The rows of a box that are among the rows of a tensor that begin at ``start``."""
    return max(at[0], start), min(at[1], start + tensor.shape[0])


def _put_box(whole: Tensor, box: Box, tensor: Tensor, start: int) -> None:
    """Put a box of a layer's own tensor in its place."""
    part = whole[tuple(slice(*span) for span in box.part)]
    kept = [dim for dim in box.dims if dim is not None]
    fixed = [dim for dim in range(part.dim()) if dim not in kept]
    part = part.permute(*fixed, *kept).reshape([stop - first for first, stop in box.at]).to(tensor.dtype)
    low, high = _overlap(box.at[0], start, tensor)
    if low < high:
        first, columns = box.at[0][0], (slice(*span) for span in box.at[1:])
        tensor[(slice(low - start, high - start), *columns)] = part[low - first : high - first]


def _add_vector(change: Change, adapter: Checkpoint, tensor: Tensor, start: int) -> None:
    shape = adapter.tensors[str(change.vector)].shape
    at, part = ((0, shape[0]), (0, shape[0])) if change.box is None else (change.box.at[0], change.box.part[0])
    low, high = _overlap(at, start, tensor)
    if low < high:
        shift = part[0] - at[0]
        vector = adapter.read(str(change.vector), low + shift, high + shift)
        tensor[low - start : high - start] += vector.to(tensor.dtype).mul_(change.scale)


def _add_products(change: Change, adapter: Checkpoint, tensor: Tensor, start: int) -> None:
    """Add the low-rank products of a box to rows ``start:`` of a stored matrix, or of a stack of matrices."""
    factors = _Factors(change, adapter, tensor.dtype)
    box = Box.whole("", factors.shape) if change.box is None else change.box
    stacked = len(box.at) > 2
    rows, columns = box.dims[-2:]
    if rows is None or columns is None:
        raise RuntimeError("a box of no matrix")
    part = (box.part[rows], box.part[columns])
    crossed = rows > columns
    if not stacked:
        expert = None if change.experts is None else box.part[0][0]
        _add_product(factors, expert, crossed, part, tensor, (box.at[-2], box.at[-1]), start)
        return
    low, high = _overlap(box.at[0], start, tensor)
    for number in range(low, high):
        expert = None if change.experts is None else box.part[0][0] + number - box.at[0][0]
        inner = tensor[number - start]
        _add_product(factors, expert, crossed, part, inner, (box.at[-2], box.at[-1]), 0)


def _add_product(
    factors: _Factors,
    expert: int | None,
    crossed: bool,
    part: tuple[Range, Range],
    tensor: Tensor,
    at: tuple[Range, Range],
    start: int,
) -> None:
    """Add a box of one product to rows ``start:`` of a matrix, in blocks of its own rows."""
    low, high = _overlap(at[0], start, tensor)
    if low >= high:
        return
    shift = part[0][0] - at[0][0]  # from rows of the matrix to those of the product
    low, high = low + shift, high + shift
    first = low - low % _BLOCK
    last = min(high + -high % _BLOCK, factors.height(crossed))
    left, right = factors.read(expert, crossed, first, last)
    right = right[:, slice(*part[1])]
    for begin in range(first, high, _BLOCK):
        end = min(begin + _BLOCK, last)
        product = (left[begin - first : end - first] @ right).mul_(factors.scale)
        top, bottom = max(begin, low), min(end, high)
        place = tensor[top - shift - start : bottom - shift - start, slice(*at[1])]
        place += product[top - begin : bottom - begin]


class _Factors:
    """The two factors of each matrix of a layer's weight, left (rows, r) and right (r, columns)."""

    def __init__(self, change: Change, adapter: Checkpoint, dtype: torch.dtype) -> None:
        if change.a is None or change.b is None:
            raise RuntimeError("one factor without the other")
        self._a, self._b, self._adapter, self._dtype = change.a, change.b, adapter, dtype
        self._experts, self._transposed, self.scale = change.experts, change.transposed, change.scale
        self._whole: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's weight."""
        out, wide = self._adapter.tensors[self._b].shape[0], self._adapter.tensors[self._a].shape[1]
        matrix = (wide, out) if self._transposed else (out, wide)
        return matrix if self._experts is None else (self._experts, *matrix)

    def height(self, crossed: bool) -> int:
        """Rows of the product, or (crossed) its columns."""
        return self.shape[-1] if crossed else self.shape[-2]

    def read(self, expert: int | None, crossed: bool, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows ``first:last`` of the left factor, and the right factor; crossed: of the transposed product."""
        turned = crossed != self._transposed
        if self._experts is None and not turned:  # a few rows of the longer one are enough
            return self._read(self._b, first, last), self._read(self._a)
        if self._whole is None:
            self._whole = self._read(self._a), self._read(self._b)
        a, b = self._whole
        if self._experts is not None:
            rank = a.shape[0] // self._experts
            number = expert or 0
            a, b = a[number * rank : (number + 1) * rank], b[:, number :: self._experts]
        return (a.T[first:last], b.T) if turned else (b[first:last], a)

    def _read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        return self._adapter.read(name, first, last).to(self._dtype)
