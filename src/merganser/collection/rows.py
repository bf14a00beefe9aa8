"""Whose rows a call's input holds, and which of them are real tokens.

Padding never enters a statistic. With ``attention_mask`` of shape (B, T), the leading axes of an input tell its rows:

==============================  =======================================================================
leading axes                    rows that count
==============================  =======================================================================
(B, T), (T, B), (B, H, T), …    those of the mask, wherever the axes of examples and of tokens lie
(B·T,), (T·B,)                  those of the flattened mask
(B,), (B, 1), (1, B)            all: one row an example (poolers, classification heads)
(T,), (1, T)                    those of the mask, as if repeated for each example (positions)
anything else                   not told by the shape; see :mod:`merganser.collection.inputs`
==============================  =======================================================================

Shapes are guesses: sizes can be equal by chance. :mod:`merganser.collection.inputs` tests each guess against the same
examples without padding before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from torch import Tensor

from merganser.collection.masks import BatchMasks, Side

#: Whose rows an input holds: the encoder's (or only) tokens, the decoder's, one an example, those of each example once
#: for all of them (tables of positions), or all.
RowKind = Literal["tokens", "decoder", "examples", "each", "all"]


@dataclass(frozen=True)
class Call:
    """One call of a layer in each forward pass.

    Attributes:
        kind: whose rows it holds.
        factor: rows a token (or example): 1, but for inputs that are cut up by heads and the like.
        axes: of examples and of tokens. Both are one axis where they are flattened together; that of examples is None
            where the input is the same for all of them.
        tokens_first: a flattened axis runs over the examples of one token after the other.
    """

    kind: RowKind
    factor: int = 1
    axes: tuple[int | None, int] = (0, 1)
    tokens_first: bool = False

    def rows(self, masks: BatchMasks) -> int:
        """How many rows of a batch count; 0 where the masks do not tell."""
        side = side_of(self, masks)
        if side is not None:
            return side.rows * self.factor
        return masks.examples if self.kind == "examples" else 0


def side_of(call: Call, masks: BatchMasks) -> Side | None:
    """The side whose mask tells a call's rows; None where every row counts."""
    if call.kind == "tokens":
        return masks.tokens
    return masks.decoder if call.kind == "decoder" else None


def guesses(leading: tuple[int, ...], masks: BatchMasks) -> Iterator[Call]:
    """What calls an input of these leading axes may belong to, the most usual first.

    Args:
        leading: the shape without the axis of features.
        masks: of a batch whose sizes differ from one another (see :mod:`merganser.collection.inputs`).
    """
    batch, size = masks.examples, math.prod(leading)
    sides: list[tuple[RowKind, Side | None]] = [("tokens", masks.tokens), ("decoder", masks.decoder)]
    for kind, side in sides:
        if side is None:
            continue
        length = side.mask.shape[1]
        factor = max(1, size // (batch * length))
        for first, second in permutations(range(len(leading)), 2):
            if leading[first] == batch and leading[second] == length:
                yield Call(kind, factor, (first, second))
        for axis, length_here in enumerate(leading):
            if length_here == batch * length:
                yield Call(kind, factor, (axis, axis))
                yield Call(kind, factor, (axis, axis), tokens_first=True)
            if length_here == length == size:
                yield Call(kind, 1, (None, axis))
    if size == batch and batch in leading[:2]:
        yield Call("examples")


def token_rows(x: Tensor, call: Call, masks: BatchMasks) -> tuple[Tensor, Tensor | None]:
    """The rows of a layer's input as (n, d), and which of them count (None: all).

    Raises:
        ValueError: the input does not have the shape that its call promises.
    """
    side = side_of(call, masks)
    if side is None:
        flat = x.reshape(-1, x.shape[-1])
        if call.kind == "examples" and flat.shape[0] != masks.examples:
            raise ValueError(f"{tuple(x.shape)} is not one row for each of {masks.examples} examples")
        if call.kind == "each":
            flat = flat.repeat(masks.examples, 1)
        return flat, None
    found = _by_token(x, call, side)
    if found.shape[1] != call.factor * x.shape[-1]:
        raise ValueError(f"{tuple(x.shape)} has not {call.factor} rows a token")
    if call.factor == 1:
        return found, side.index
    return side.take(found).reshape(-1, x.shape[-1]), None  # several rows a token, such as one a head


def token_ids(ids: Tensor, call: Call, masks: BatchMasks) -> Tensor:
    """The ids (n,) that an embedding looks up for real tokens.

    Raises:
        ValueError: the ids do not have the shape that their call promises.
    """
    side = side_of(call, masks)
    if call.kind == "each":
        return ids.reshape(-1).repeat(masks.examples)
    return ids.reshape(-1) if side is None else side.take(_by_token(ids.unsqueeze(-1), call, side)).reshape(-1)


def _by_token(x: Tensor, call: Call, side: Side) -> Tensor:
    """An input as (B·T, …): what belongs to each token of each example, padding included."""
    batch, length = side.mask.shape
    first, second = call.axes
    if second >= x.ndim - 1:
        raise ValueError(f"{tuple(x.shape)} has no axis {second} of tokens")
    if first is None:
        alone = x.movedim(second, 0)
        if alone.shape[0] != length:
            raise ValueError(f"{tuple(x.shape)} has not {length} tokens")
        return alone.reshape(1, length, -1).expand(batch, -1, -1).reshape(batch * length, -1)
    if first == second:
        flat = x.movedim(first, 0)
        if flat.shape[0] != batch * length:
            raise ValueError(f"{tuple(x.shape)} has not {batch * length} tokens")
        if call.tokens_first:
            flat = flat.reshape(length, batch, -1).transpose(0, 1)
        return flat.reshape(batch * length, -1)
    split = x.movedim((first, second), (0, 1))
    if split.shape[:2] != side.mask.shape:
        raise ValueError(f"{tuple(x.shape)} does not fit the mask {(batch, length)}")
    return split.reshape(batch * length, -1)
