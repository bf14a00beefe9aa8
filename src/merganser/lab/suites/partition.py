"""Cutting one data set into parts whose labels differ: the non-IID partitions of Jin et al. (2023).

partition(labels, parts=2, total=2000, seed=1)                  each part has much of one label
partition(targets, parts=2, total=2000, seed=1, regression=True)
partition(labels, parts=2, total=2000, seed=1, iid=True)        for comparison: parts alike
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from merganser.errors import UserError


def partition(
    labels: Sequence[int | float], parts: int, total: int, seed: int, *, iid: bool = False, regression: bool = False
) -> list[list[int]]:
    """Cut ``total`` examples, drawn from all without replacement, into parts.

    Not IID: the labels that occur among the drawn examples are shuffled, and part k has label k (modulo their
    number) as its main one. One after the other, each part but the last takes 80% of all the drawn examples
    of its main label and 0.2 / (parts - 1) of what is left of each other label. The last part takes
    everything left. In detail:

    - A share is rounded down, in whole numbers: ``4 * n // 5`` and ``left // (5 * (parts - 1))``.
    - With more parts than labels, a main label comes round again; its part takes what is left where that is
      less than 80% of all.
    - The examples of a label are taken in the order in which they were drawn.
    - Targets of a regression are first cut into as many bins as there are parts, of equal width between the
      smallest and the largest drawn target; a bin has its lower edge, the last one both. Bins then are
      labels; an empty bin is none.

    IID: the drawn examples, in the order drawn, are cut into contiguous slices; slice k ends at
    ``(k + 1) * total // parts``.

    The draw and the shuffle come from one generator with the seed, so that both kinds of partition with the
    same seed share out the same examples.

    Args:
        labels: the label of each example, or its target, a finite number.
        parts: at least 2.
        total: how many examples to share out.
        seed: not negative.
        iid: see above.
        regression: the labels are targets.

    Returns:
        For each part the places of its examples, in the order of the data. No place is in two parts, and
        together there are ``total`` of them.

    Raises:
        UserError: fewer than 2 parts, a total that is more than there is or fewer than the parts, a negative
            seed, a target that is not finite, or a part that would get no example.
    """
    _check(len(labels), parts, total, seed)
    generator = np.random.default_rng(seed)
    drawn: list[int] = generator.permutation(len(labels))[:total].tolist()
    if iid:
        cuts = [part * total // parts for part in range(parts + 1)]
        return [sorted(drawn[start:end]) for start, end in pairwise(cuts)]
    chosen = [labels[index] for index in drawn]
    pools: dict[int | float, list[int]] = {}
    for index, label in zip(drawn, _bins(chosen, parts) if regression else chosen, strict=True):
        pools.setdefault(label, []).append(index)
    names = sorted(pools)
    names = [names[place] for place in generator.permutation(len(names))]
    counts = {name: len(pools[name]) for name in names}
    found: list[list[int]] = []
    for part in range(parts - 1):
        main = names[part % len(names)]
        taken: list[int] = []
        for name in names:
            share = 4 * counts[name] // 5 if name == main else len(pools[name]) // (5 * (parts - 1))
            taken += pools[name][:share]
            pools[name] = pools[name][share:]
        found.append(sorted(taken))
    found.append(sorted(index for pool in pools.values() for index in pool))
    for number, part_indices in enumerate(found, 1):
        if not part_indices:
            what = f"part {number} of {parts} would get no example: {total} examples of {len(names)} labels"
            raise UserError(what, where="partition", mend="share out more examples, or make fewer parts")
    return found


def _check(available: int, parts: int, total: int, seed: int) -> None:
    what = ""
    if parts < 2:
        what, mend = f"{parts} parts", "ask for at least 2 parts"
    elif total > available:
        what, mend = f"{total} examples are to be shared out, but there are {available}", f"ask for at most {available}"
    elif total < parts:
        what, mend = f"{total} examples are too few for {parts} parts", "ask for more examples"
    elif seed < 0:
        what, mend = f"the seed is {seed}", "give a seed of 0 or more"
    if what:
        raise UserError(what, where="partition", mend=mend)


def _bins(targets: Sequence[int | float], parts: int) -> list[int]:
    """The bin of each target, from 0: ``parts`` bins of equal width."""
    if not all(math.isfinite(target) for target in targets):
        raise UserError("a target is not finite", where="partition", mend="correct or remove the example")
    low, high = min(targets), max(targets)
    if low == high:
        return [0] * len(targets)
    return [min(int((target - low) * parts / (high - low)), parts - 1) for target in targets]
