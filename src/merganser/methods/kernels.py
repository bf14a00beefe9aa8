"""Loops over numbers that are compiled when they are first used: several steps in one pass through a core's caches.

Elementwise methods spend their time in moving numbers between memory and the processor, and a call of torch for each
step moves them each time. What is compiled here runs without Python's lock, so that threads do not wait for each other.
Every number is computed by itself and in the same order of operations, so that the bytes do not depend on how a tensor
is cut. What is compiled is kept beside this file, or in the user's cache folder, for the next run.

Import this module inside functions: its compiler takes a quarter of a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

_word = np.uint32
_TILE = 1024  # numbers of which a loop's sums and marks stay in a core's first cache
_ZERO, _HALF, _ONE, _UNIT = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2.0**-24)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder can be written to
        return njit(nogil=True, error_model="numpy")(function)


def _wide(number: Any) -> Any:
    """A number as float32, of which a bfloat16 number, given as uint16, is the upper half."""
    raise NotImplementedError("compiled loops alone call it")


@overload(_wide)
def _wide_for(number):
    if isinstance(number, types.Integer):
        return lambda number: _word(_word(number) << _word(16)).view(np.float32)
    return lambda number: number


@intrinsic
def _pointer(context, address):
    def generate(context, builder, signature, given):
        return builder.inttoptr(given[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), generate


@_compiled
def _at(place, like):
    """The array at an address, of the shape and dtype of another one."""
    return carray(_pointer(place), like.shape, like.dtype)


def flat(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor that :func:`~merganser.methods.elementwise.fits_kernels`, in a row and in place."""
    return tensor.numpy().reshape(-1)


@_compiled
def subtract(halves, base, found):
    """θ − θ₀ of a θ in bfloat16, which is the upper half of a float32 number.

    Args:
        halves: (n,) uint16, the bits of θ.
        base, found: (n,) float32.
    """
    for i in range(halves.size):
        found[i] = _wide(halves[i]) - base[i]


@_compiled
def _dot(one, two, products):
    """The inner product of two (n,) float32, summed in pairs, in float64 at the end; ``products`` is for (n,)."""
    left = one.size
    for i in range(left):
        products[i] = one[i] * two[i]
    while left > 16:
        half = (left + 1) // 2
        lower, upper = products[:half], products[half:left]
        for i in range(upper.size):
            lower[i] += upper[i]
        left = half
    total = 0.0
    for i in range(left):
        total += products[i]
    return total


@_compiled
def inner_products(like, places, base, block, found):
    """Inner products of rows of the first tensor and of the differences of the others from it.

    Args:
        like: (rows, n) float32, or the bits of bfloat16 as uint16: one of the tensors.
        places: (T,) uint64, the addresses of all of them, so that nobody has to copy them into one array.
        base: (rows, n) float32, what the first one's difference is taken from; or empty.
        block: of so many numbers, products are summed in float32.
        found: (rows, T, T) float64, to which they are added.
    """
    count, (rows, width) = len(places), like.shape
    basis, products = np.empty((count, block), dtype=np.float32), np.empty(block, dtype=np.float32)
    for row in range(rows):
        for start in range(0, width, block):
            size = min(block, width - start)
            first, theirs = basis[0, :size], _at(places[0], like)[row, start : start + size]
            for i in range(size):
                first[i] = _wide(theirs[i])
            for number in range(1, count):
                theirs = _at(places[number], like)[row, start : start + size]
                difference = basis[number, :size]
                for i in range(size):
                    difference[i] = _wide(theirs[i]) - first[i]
            if base.size:
                origin = base[row, start : start + size]
                for i in range(size):
                    first[i] -= origin[i]
            for one in range(count):
                for two in range(one, count):
                    product = _dot(basis[one, :size], basis[two, :size], products)
                    found[row, one, two] += product
                    if one != two:
                        found[row, two, one] += product


@_compiled
def combine(like, places, base, reference, weights, excess, pull):
    """R + Σwᵢ(θᵢ − R) + excess·(R − θ₀), then drawn to θ₀; row by row, and R is one of the θᵢ.

    Args:
        like: (rows, n) float32, or the bits of bfloat16 as uint16: one of the θᵢ.
        places: (T,) uint64, the addresses of all of them.
        base: (rows, n) float32; or empty, and θ₀ is 0.
        reference: which one R is.
        weights: (rows, T) float32.
        excess: (rows,) float32.
        pull: (rows,) float32, from 0 to 1, which is θ₀.

    Returns:
        (rows, n) float32.
    """
    count, (rows, width) = len(places), like.shape
    found, own = np.empty((rows, width), dtype=np.float32), np.empty(_TILE, dtype=np.float32)
    for row in range(rows):
        more, drawn = excess[row], pull[row]
        for start in range(0, width, _TILE):
            size = min(_TILE, width - start)
            theirs = _at(places[reference], like)[row, start : start + size]
            total = found[row, start : start + size]
            for i in range(size):
                own[i] = _wide(theirs[i])
                total[i] = _ZERO
            for number in range(count):
                if number != reference:
                    others = _at(places[number], like)[row, start : start + size]
                    weight = weights[row, number]
                    for i in range(size):
                        total[i] += weight * (_wide(others[i]) - own[i])
            if base.size:
                origin = base[row, start : start + size]
                for i in range(size):
                    total[i] = own[i] + (total[i] + more * (own[i] - origin[i]))
                if drawn > _HALF:  # so that 1 is θ₀ itself
                    for i in range(size):
                        total[i] = origin[i] - (origin[i] - total[i]) * (_ONE - drawn)
                elif drawn > _ZERO:
                    for i in range(size):
                        total[i] += drawn * (origin[i] - total[i])
            else:
                for i in range(size):
                    total[i] = own[i] + (total[i] + more * own[i])
    return found


@_compiled
def elect(deltas, coefficients, weights, normalize):
    """Σwᵢ·sᵢδᵢ over the δᵢ that have, times the sign sᵢ of cᵢ, the sign of Σcᵢδᵢ; where that is 0, positive.

    Args:
        deltas: (T, n) float32.
        coefficients: (T,) float32.
        weights: (T,) float32.
        normalize: bool, divide by the sum of their weights where there are any.

    Returns:
        (n,) float32.
    """
    found = np.empty(deltas.shape[1], dtype=np.float32)
    elected, counted = np.empty(_TILE, dtype=np.float32), np.empty(_TILE, dtype=np.float32)
    for start in range(0, found.size, _TILE):
        size = min(_TILE, found.size - start)
        agreed = found[start : start + size]
        elected[:], counted[:], agreed[:] = _ZERO, _ZERO, _ZERO
        for number in range(len(deltas)):
            delta, coefficient = deltas[number, start : start + size], coefficients[number]
            for i in range(size):
                elected[i] += coefficient * delta[i]
        for number in range(len(deltas)):
            delta, weight = deltas[number, start : start + size], weights[number]
            flip = -_ONE if coefficients[number] < _ZERO else _ONE
            for i in range(size):
                one = flip * delta[i]
                along = one if elected[i] >= _ZERO else -one
                counts = weight if along > _ZERO else _ZERO
                counted[i] += counts
                agreed[i] += counts * one
        if normalize:
            for i in range(size):
                agreed[i] /= counted[i] if counted[i] > _ZERO else _ONE
    return found


@_compiled
def spread(deltas):
    """Σ(δᵢ − δ̄)², number by number, with δ̄ the mean of the δᵢ: Σδᵢ² − (Σδᵢ)² / T.

    Sums in float64 of float32 numbers of about one size are exact, so that the order of the δᵢ makes no difference.

    Args:
        deltas: (T, n) float32.

    Returns:
        (n,) float32.
    """
    found, count = np.empty(deltas.shape[1], dtype=np.float32), np.float64(len(deltas))
    sums, squares = np.empty(_TILE, dtype=np.float64), np.empty(_TILE, dtype=np.float64)
    for start in range(0, found.size, _TILE):
        size = min(_TILE, found.size - start)
        here = found[start : start + size]
        sums[:], squares[:] = 0.0, 0.0
        for number in range(len(deltas)):
            delta = deltas[number, start : start + size]
            for i in range(size):
                one = np.float64(delta[i])
                sums[i] += one
                squares[i] += one * one
        for i in range(size):
            here[i] = np.float32(max((count * squares[i] - sums[i] * sums[i]) / count, 0.0))
    return found


@_compiled
def _turned(word, by):
    """The bits of a word, rotated to the left. All numbers are of 32 bits, or the loops around would not be fast."""
    return _word(_word(word << by) | _word(word >> _word(_word(32) - by)))


@_compiled
def _four_rounds(one, two, by0, by1, by2, by3):
    one = _word(one + two)
    two = _turned(two, by0) ^ one
    one = _word(one + two)
    two = _turned(two, by1) ^ one
    one = _word(one + two)
    two = _turned(two, by2) ^ one
    one = _word(one + two)
    return one, _turned(two, by3) ^ one


@_compiled
def _draw_tile(words, key0, key1, tile):
    """Fill 2 · 1024 words: the pairs that Threefry-2x32 with 13 rounds (Salmon et al. 2011) gives for 1024 counters.

    The first words of all pairs come before the second ones, since loops without steps between numbers are faster.
    """
    key2 = _word(key0 ^ key1 ^ _word(0x1BD11BDA))
    low, high = _word(_word(tile << 10) + key0), _word(_word(tile >> 22) + key1)
    ones, twos = words[:_TILE], words[_TILE:]
    for i in range(_TILE):
        one, two = _four_rounds(_word(low + _word(i)), high, _word(13), _word(15), _word(26), _word(6))
        one, two = _word(one + key1), _word(two + _word(key2 + _word(1)))
        one, two = _four_rounds(one, two, _word(17), _word(29), _word(16), _word(24))
        one, two = _word(one + key2), _word(two + _word(key0 + _word(2)))
        one, two = _four_rounds(one, two, _word(13), _word(15), _word(26), _word(6))
        one, two = _word(one + key0), _word(two + _word(key1 + _word(3)))
        one = _word(one + two)
        ones[i] = one
        twos[i] = _turned(two, _word(17)) ^ one


@_compiled
def draw(found, key0, key1, start):
    """Random words, numbers start:start + n of the endless sequence that belongs to a key.

    Args:
        found: (n,) uint32, for them.
        key0, key1: uint32.
        start: int64.
    """
    words, size = np.empty(2 * _TILE, dtype=np.uint32), 2 * _TILE
    for tile in range(start // size, -(-(start + found.size) // size)):
        _draw_tile(words, key0, key1, tile)
        first, last = max(tile * size, start), min((tile + 1) * size, start + found.size)
        found[first - start : last - start] = words[first - tile * size : last - tile * size]


@_compiled
def keep_drawn(delta, key0, key1, start, below, divisor):
    """Divide δ where its random word is below a bound, and set it to zero elsewhere.

    Args:
        delta: (n,) float32.
        key0, key1, start: of its words; see :func:`draw`.
        below: uint32.
        divisor: float32, of what is kept.
    """
    words, size = np.empty(2 * _TILE, dtype=np.uint32), 2 * _TILE
    for tile in range(start // size, -(-(start + delta.size) // size)):
        _draw_tile(words, key0, key1, tile)
        first, last = max(tile * size, start), min((tile + 1) * size, start + delta.size)
        here, own = delta[first - start : last - start], words[first - tile * size :]
        for i in range(here.size):
            here[i] = here[i] / divisor if own[i] < below else _ZERO


@_compiled
def keep_drawn_by_chances(delta, words, chances, divide):
    """Set each δ to zero but with a chance of its own, by which it is divided if that is wanted.

    Args:
        delta: (n,) float32.
        words: (n,) uint32, of which the upper 24 bits are a number from [0, 1).
        chances: (n,) float32, above 0.
        divide: bool.
    """
    for i in range(delta.size):
        kept = delta[i] if np.float32(words[i] >> np.uint32(8)) * _UNIT < chances[i] else _ZERO
        delta[i] = kept / (chances[i] if divide else _ONE)


@_compiled
def give_by_rank(rows, given, found):
    """For each number of each row, what stands at the rank of its magnitude; equal magnitudes rank by their places.

    The bits of magnitudes are in the order of magnitudes. A radix sort moves them with their places in three rounds, by
    a byte each; in the fourth a place is known by its rank. A sort by comparisons takes several times as long on
    processors whose wide instructions for it are slow.

    Args:
        rows: (rows, width) float32.
        given: (width,) float32, from the smallest magnitude's to the largest's.
        found: (rows, width) float32, for what is given.
    """
    bits, width = rows.view(_word), rows.shape[1]
    here, there = np.empty(width, dtype=np.uint64), np.empty(width, dtype=np.uint64)
    starts = np.empty((4, 256), dtype=_word)  # of each digit, where the numbers with each value of it begin
    for row in range(rows.shape[0]):
        starts[:] = 0
        for i in range(width):
            magnitude = bits[row, i] & _word(0x7FFFFFFF)
            here[i] = (np.uint64(magnitude) << np.uint64(32)) | np.uint64(i)
            for digit in range(4):
                starts[digit, (magnitude >> _word(8 * digit)) & _word(0xFF)] += _word(1)
        for digit in range(4):
            start, total = starts[digit], _word(0)
            for value in range(256):
                total, start[value] = total + start[value], total
            for i in range(width):
                value = (here[i] >> np.uint64(32 + 8 * digit)) & np.uint64(0xFF)
                rank = start[value]
                start[value] = rank + _word(1)
                if digit < 3:
                    there[rank] = here[i]
                else:
                    found[row, here[i] & np.uint64(0xFFFFFFFF)] = given[rank]
            here, there = there, here


@_compiled
def keep_between(delta, least, most):
    """Set δ to zero where its magnitude is smaller than ``least`` or larger than ``most``; all are float32."""
    for i in range(delta.size):
        magnitude = abs(delta[i])
        delta[i] = delta[i] if (magnitude >= least) & (magnitude <= most) else _ZERO


@_compiled
def count_between(values, low, high, shift, first, counts, mixed):
    """Count magnitudes by how they lie to two bounds, and those between them by their bits.

    Args:
        values: (n,) float32.
        low, high: float32.
        shift: how many of the lower bits of a number are left away.
        first: what is left of ``low``.
        counts: int64, of each of the following upper bits, how many numbers between the bounds have them.
        mixed: bool, likewise, whether the lower bits of some are not zero.

    Returns:
        how many are above ``high``, at or above ``high``, above ``low``, at or above ``low``.
    """
    bits = values.view(np.uint32)
    lower = np.uint32((1 << shift) - 1)
    here, inside = np.empty(_TILE, dtype=np.float32), np.zeros(_TILE, dtype=np.uint8)
    eights = inside.view(np.uint64)  # most of which are zero: few numbers lie between the bounds
    above, from_high, above_low, from_low = 0, 0, 0, 0
    for start in range(0, values.size, _TILE):
        size = min(_TILE, values.size - start)
        signed, here_bits = values[start : start + size], bits[start : start + size]
        for i in range(size):
            here[i] = abs(signed[i])
        one, two, three, four = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(size):
            one += np.uint32(here[i] > high)
            two += np.uint32(here[i] >= high)
            three += np.uint32(here[i] > low)
            four += np.uint32(here[i] >= low)
        for i in range(size):  # apart, so that both loops are made of wide instructions
            inside[i] = (here[i] > low) & (here[i] < high)
        above, from_high, above_low, from_low = above + one, from_high + two, above_low + three, from_low + four
        for eight in range((size + 7) // 8):
            if eights[eight]:
                for i in range(8 * eight, min(8 * eight + 8, size)):
                    if inside[i]:
                        magnitude = here_bits[i] & _word(0x7FFFFFFF)
                        place = (magnitude >> shift) - first
                        counts[place] += 1
                        if magnitude & lower:
                            mixed[place] = True
    return above, from_high, above_low, from_low
