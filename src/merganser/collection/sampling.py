"""A seeded sample of tokens for wide inputs, whose Gram matrices cost most of a collection.

An input of width d costs d² a token, so that in a Transformer the one that is four times as wide as the others costs
five times as much as they do together, and it needs no more tokens than they have. Wide is what is wider than most
inputs of the model are. Each row of a wide input is kept with one probability, independently of all others, so the
mean over the rows that were kept is an unbiased estimate of the mean over all rows, for any number of them.

The draws are seeded by layer, shard, pass and call: the same on any number of threads or workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.errors import UserError

DEFAULT_SHARE = 0.25
SPARE = 1.1  # of the rows expected, that a buffer has room for


@dataclass(frozen=True)
class Sampling:
    """How many tokens wide inputs keep.

    Attributes:
        share: the probability of each row, above 0 and below 1.
        seed: of the draws.

    Raises:
        UserError: another share.
    """

    share: float = DEFAULT_SHARE
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            mend = f"give a number above 0 and below 1, such as {DEFAULT_SHARE}, or leave it out for all tokens"
            raise UserError(f"a share of {self.share:g} of the tokens is no sample", where="--sample-tokens", mend=mend)

    def draw(self, layer: str, place: tuple[int, ...], rows: int, *, some: bool) -> Tensor:
        """Which of so many rows are kept: their numbers, ascending, int64 on the CPU.

        Args:
            layer: whose input it is.
            place: tells this draw from the layer's others.
            rows: n.
            some: keep one where the draw would keep none, so that a layer with tokens never ends without any.
        """
        text = "/".join(map(str, (self.seed, layer, *place)))
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))
        chances = torch.rand(rows, generator=generator, dtype=torch.float64)
        kept = (chances < self.share).nonzero().squeeze(1)
        return chances.argmin().reshape(1) if some and rows and not len(kept) else kept


def usual_width(widths: Mapping[str, int]) -> int:
    """The width that most inputs have, the smallest of several; 0 where there are none."""
    counts = Counter(widths.values())
    return min(counts, key=lambda width: (-counts[width], width), default=0)


def shares(widths: Mapping[str, int], sampling: Sampling | None) -> dict[str, float]:
    """The share of its rows that each input keeps: 1 unless it is sampled."""
    usual = usual_width(widths)
    return {name: sampling.share if sampling and width > usual else 1.0 for name, width in widths.items()}


def describe_sampling(widths: Mapping[str, int], sampling: Sampling) -> str:
    """What was sampled, for the header."""
    usual = usual_width(widths)
    wide = sum(width > usual for width in widths.values())
    if not wide:
        return f"no input is wider than {usual}, so none was sampled"
    return (
        f"{wide} of {len(widths)} Gram matrices, of inputs wider than {usual}, are means over a seeded sample of "
        f"{sampling.share:.3g} of their tokens (seed {sampling.seed})"
    )
