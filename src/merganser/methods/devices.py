"""What :mod:`~merganser.methods.kernels` computes on the processor, by operations of torch on another device.

The bits are the same. Numbers stay on their device, and the processor waits for it a few times for each piece of a
tensor. What is held beside a tensor belongs to a few million of its numbers at a time: enough that starting an
operation costs less than the operation, and few enough that a card's cache holds them between operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Numbers of a tensor that are looked at at once.
PIECE = 1 << 22
#: Pairs of random words that are made at once; a divisor of 2³², so that the upper half of their counters is the same.
PAIRS = 1 << 21
_TILE = 1024  # pairs whose first words come before their second ones
_TURNS = (13, 15, 26, 6, 17, 29, 16, 24)
_MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 number without its sign


def elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor lies on another device than the processor."""
    return tensor.device.type != "cpu"


def draw(key: tuple[int, int], start: int, count: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The random words of :func:`merganser.methods.kernels.draw`, some at a time.

    Args:
        key: two words.
        start: the number of the first one in the endless sequence that belongs to the key.
        count: how many.
        device: where they are made.

    Yields:
        which of 0…count these are, and their bits as (n,) int32 of the caller's own.
    """
    size, tile = 2 * PAIRS, 2 * _TILE
    for part in range(start // size, -(-(start + count) // size)):
        first, last = max(part * size, start), min((part + 1) * size, start + count)
        tiles = range(first // tile, -(-last // tile))
        words = _threefry(key, tiles.start * _TILE, len(tiles) * _TILE, device)
        begin = tiles.start * tile
        yield slice(first - start, last - start), words[first - begin : last - begin]


def _threefry(key: tuple[int, int], counter: int, count: int, device: torch.device) -> Tensor:
    """(2 · count,) int32: pairs of Threefry-2x32 with 13 rounds (Salmon et al. 2011), in tiles of 1024 pairs.

    Integers of 32 bits wrap around alike with and without a sign. A shift to the right repeats the sign, which is
    masked away; a shift to the left and the addition of what leaves on that side are one multiply-add.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    one = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(counter + keys[0]))
    two = torch.full_like(one, _signed((counter >> 32) + keys[1]))
    other = torch.empty_like(one)
    for number in range(13):
        one.add_(two)
        by = _TURNS[number % 8]
        torch.bitwise_right_shift(two, 32 - by, out=other)
        other.bitwise_and_((1 << by) - 1).add_(two, alpha=1 << by).bitwise_xor_(one)
        two, other = other, two
        if number % 4 == 3:
            injection = number // 4 + 1
            one.add_(_signed(keys[injection % 3]))
            two.add_(_signed(keys[(injection + 1) % 3] + injection))
    return torch.stack([one.view(-1, _TILE), two.view(-1, _TILE)], dim=1).flatten()


def uniform(words: Tensor) -> Tensor:
    """Numbers from [0, 1) in float32, of the upper 24 bits of words."""
    return words.bitwise_right_shift(8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def at_least(words: Tensor, bound: int) -> Tensor:
    """Whether each word, which is changed, is at least a bound below 2³², both taken without a sign."""
    return words.bitwise_xor_(-(2**31)) >= bound - 2**31


def count_between(values: Tensor, low: int, high: int, shift: int, first: int, counts: Tensor, mixed: Tensor) -> Tensor:
    """Count magnitudes by how they lie to two bounds, and those between them by their bits.

    Args:
        values: float32.
        low, high: the bits of the bounds.
        shift, first, counts, mixed: see :func:`merganser.methods.kernels.count_between`; on the device.

    Returns:
        (4,) int64: how many are above ``high``, at or above ``high``, above ``low``, at or above ``low``.
    """
    bits = values.flatten().view(torch.int32).bitwise_and(_MAGNITUDE)
    above, from_high, above_low, from_low = bits > high, bits >= high, bits > low, bits >= low
    beside = torch.stack([mask.sum() for mask in (above, from_high, above_low, from_low)])
    inside = bits[above_low.logical_and_(from_high.logical_not_())]
    places = inside.bitwise_right_shift(shift).sub_(first)
    counts += torch.bincount(places, minlength=len(counts))
    if shift:
        several = inside.bitwise_and_((1 << shift) - 1) != 0
        mixed |= torch.bincount(places[several], minlength=len(mixed)) > 0
    return beside


def largest(numbers: Tensor, ks: tuple[int, ...]) -> list[float]:
    """The k-th largest magnitude of a few numbers, for each k from 1."""
    ascending = numbers.flatten().abs().sort().values
    return list(torch.stack([ascending[len(ascending) - k] for k in ks]).tolist()) if ks else []


def give_by_rank(rows: Tensor, given: Tensor) -> Tensor:
    """For each number of each row, that of the given numbers that stands at the rank of its magnitude, from smallest.

    Equal magnitudes rank in the order of their places.

    Args:
        rows: (rows, width).
        given: (width,) float32.
    """
    found = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    given, step = given.to(rows.device), max(1, PIECE // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        order = rows[here].abs().to(torch.float32).sort(dim=1, stable=True).indices
        found[here].scatter_(1, order, given.expand(order.shape))
    return found


def divide_(tensor: Tensor, divisor: float) -> Tensor:
    """Divide in place and round as the processor does: by a plain number, a GPU multiplies by its reciprocal."""
    return tensor if divisor == 1 else tensor.div_(torch.full((), divisor, dtype=tensor.dtype, device=tensor.device))


def _signed(word: int) -> int:
    """The lower 32 bits of a number, read as an integer with a sign."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
