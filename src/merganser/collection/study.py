"""What one probe shows of the inputs of a model's layers, with padding and without: guesses, and whether they hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import Layer
from merganser.collection.masks import Batch, BatchMasks, batch_masks, model_inputs, take_rows, widened, without_padding
from merganser.collection.probes import other_tokens
from merganser.collection.rows import Call, guesses, token_ids, token_rows
from merganser.collection.taps import See, input_hooks, weight_of
from merganser.tasks.models import first_line

#: Address, shape, strides and version: equal while alive means one tensor, not changed in place in between.
Identity = tuple[int, tuple[int, ...], tuple[int, ...], int]

SAME = 1e-3  # of a feature's root mean square: rounding is smaller, rows of padding are not
MOST_WINDOWS = 3  # lengths that are tried as the window to which a model pads
_NUMBER = re.compile(r"\d+")


@dataclass
class Moments:
    """How many rows, and the sums of them and of their squares (float64); of ids their counts."""

    rows: int
    sums: Tensor
    squares: Tensor | None = None

    def __add__(self, other: Moments) -> Moments:
        both = None if self.squares is None or other.squares is None else self.squares + other.squares
        return Moments(self.rows + other.rows, self.sums + other.sums, both)

    def agrees(self, other: Moments) -> bool:
        """Whether both are of the same rows, up to rounding."""
        if self.rows != other.rows or not self.rows:
            return False
        if self.squares is None or other.squares is None:
            return torch.equal(self.sums, other.sums)
        largest = torch.maximum(self.squares, other.squares) / self.rows
        size = (largest + SAME**2 * largest.max()).sqrt()  # of each feature
        near = (self.squares - other.squares).abs() / self.rows <= SAME * size.square()
        return bool(near.all() and ((self.sums - other.sums).abs() / self.rows <= SAME * size).all())


def moments_of(x: Tensor, call: Call, masks: BatchMasks, table: int | None) -> Moments | None:
    """Of the rows that a guess picks, or the ids of a table of so many rows; None where it does not fit."""
    try:
        if table is not None:
            found = token_ids(x, call, masks)
            return Moments(len(found), torch.bincount(found, minlength=table))
        rows, index = token_rows(x, call, masks)
    except (ValueError, RuntimeError):
        return None
    rows = (rows if index is None else rows.index_select(0, index)).double()
    return Moments(len(rows), rows.sum(0), rows.square().sum(0))


@dataclass
class Guess:
    """Whose rows a call may hold, and what follows from that.

    Attributes:
        call: the guess.
        padded: what it picks from the padded probe; None where it does not fit.
        alone: what it picks from the same examples without padding.
        whole: whether that is every row there.
    """

    call: Call
    padded: Moments | None
    alone: Moments | None = None
    whole: bool = True

    def see(self, found: Moments | None, rows: int) -> None:
        """Take in what it picks from some examples without padding, of so many rows."""
        self.whole &= found is not None and found.rows == rows
        if found is None:
            self.padded = None
        else:
            self.alone = found if self.alone is None else self.alone + found

    @property
    def holds(self) -> bool:
        """Whether it picks the same rows from the padded probe as from the examples without padding."""
        return self.padded is not None and self.alone is not None and self.padded.agrees(self.alone)


@dataclass
class Seen:
    """One call of a layer in the padded probe, and what the other probes say of it.

    Attributes:
        x: its input, kept alive so that no other takes its address.
        identity: of it.
        guesses: the most usual first.
        constant: the input is the same for other tokens.
        sizes: for each number of tokens that an example without padding had, how many rows it had here.
        leading: the shape there, without the features.
    """

    x: Tensor
    identity: Identity
    guesses: list[Guess]
    constant: bool = False
    sizes: dict[int, float] = field(default_factory=dict)
    leading: tuple[int, ...] = ()

    @property
    def verified(self) -> Call | None:
        """The first guess that holds."""
        return next((guess.call for guess in self.guesses if guess.holds), None)

    @property
    def whole(self) -> Call | None:
        """The first guess that picks every row where there is no padding."""
        return next((guess.call for guess in self.guesses if guess.whole), None)


@dataclass
class Study:
    """What a set of probes showed.

    Attributes:
        window: of which their numbers of tokens are multiples.
        seen: calls of each layer, in the order of the first ones.
        absent: linear layers that were not called.
        unsteady: layers that were called another number of times in another probe.
        failure: why the examples could not be run without padding.
        whole: nothing was studied, as examples will be run without padding and all of their rows count.
    """

    window: int
    seen: dict[str, list[Seen]] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    unsteady: set[str] = field(default_factory=set)
    failure: str | None = None
    whole: bool = False

    @cached_property
    def unclear(self) -> list[str]:
        """Layers of which a call depends on the tokens, and no guess holds; and those that are routed like them."""
        vague = {n for n, calls in self.seen.items() if any(not one.constant and one.verified is None for one in calls)}
        alike = {pattern_of(name) for name in (*self.unsteady, *self.absent)}
        routed = {name for name in self.seen if pattern_of(name) in alike}
        return [] if self.failure is not None else [n for n in self.seen if n in vague or n in routed]

    def windows(self) -> list[int]:
        """Lengths that may be the window to which the model pads: of axes longer than an example."""
        found = set()
        for name in self.unclear:
            for one in self.seen[name]:
                found |= {length for length in one.leading if length > max(one.sizes, default=length)}
        return sorted(found)[:MOST_WINDOWS]


@dataclass(frozen=True)
class Subject:
    """What is studied.

    Attributes:
        model: of which the layers are.
        layers: to be seen.
        owners, groups: see :class:`Wiring`.
        few: the padded probe.
    """

    model: nn.Module
    layers: list[Layer]
    owners: dict[str, str]
    groups: dict[str, str]
    few: Batch

    @cached_property
    def tables(self) -> dict[str, int]:
        """The embeddings, and how many rows they have."""
        found = (layer for layer in self.layers if layer.kind == "embedding")
        return {layer.module: weight_of(self.model, layer).shape[0] for layer in found}

    def run(self, batch: Batch, see: See) -> None:
        """A forward pass; ``see`` is told of the inputs by the name of the group."""
        with input_hooks(self.model, self.layers, lambda name, x: see(self.groups.get(name, name), x), self.owners):
            self.model(**model_inputs(batch, self.model))

    def study(self, window: int) -> Study:
        """The probes, with numbers of tokens that are multiples of ``window``: twice that for the padded one."""
        padded = widened(self.few, self.model, 2 * window if window > 1 else 1)
        masks, study = batch_masks(padded, self.model), Study(window)

        def look(name: str, x: Tensor) -> None:
            table = self.tables.get(name)
            leading = tuple(x.shape) if table is not None else tuple(x.shape[:-1])
            found = [Guess(call, moments_of(x, call, masks, table)) for call in guesses(leading, masks)]
            study.seen.setdefault(name, []).append(Seen(x, identity_of(x), found))

        self.run(padded, look)
        study.absent = {
            layer.module for layer in self.layers if layer.kind != "embedding" and layer.module not in self.groups
        } - study.seen.keys()
        try:
            self._again(study, other_tokens(padded, self.model), _compare)
            for piece in without_padding(self.few, self.model):
                self._alone(study, widened(piece, self.model, window))
        except Exception as error:  # whatever a model says to batches that are not its own
            study.failure = first_line(error)
        return study

    def see_all(self) -> Study:
        """What layers see of examples without padding. What is the same for each of two examples is constant."""
        study = Study(1, whole=True)

        def look(name: str, x: Tensor) -> None:
            study.seen.setdefault(name, []).append(Seen(x, identity_of(x), []))

        def count(one: Seen, x: Tensor, _: int | None) -> None:
            one.sizes[number] = float(x.shape == one.x.shape and torch.equal(x, one.x))

        self.run(self.few, look)
        linear = {layer.module for layer in self.layers if layer.kind != "embedding"}
        study.absent = linear - self.groups.keys() - study.seen.keys()
        size = batch_masks(self.few, self.model).examples
        for number in range(size if size > 1 else 0):
            self._again(study, take_rows(self.few, size, slice(number, number + 1)), count)
        for calls in study.seen.values():
            for one in calls:
                one.constant = sum(one.sizes.values()) == size
                one.sizes.clear()
        return study

    def grows(self, name: str, one: Seen) -> bool:
        """Whether a layer's input has more rows where more masked padding is added."""
        tokens, rows = next(iter(one.sizes.items()))
        piece = without_padding(self.few, self.model)[0]
        wider = widened(piece, self.model, 2 * math.ceil(max(rows, tokens)))
        try:
            return self._sizes(name, piece) != self._sizes(name, wider)
        except Exception:  # it cannot be told
            return True

    def _sizes(self, name: str, batch: Batch) -> list[int]:
        """The numbers of rows of a layer's inputs."""
        found: list[int] = []

        def see(other: str, x: Tensor) -> None:
            if other == name:
                found.append(x[..., 0].numel())

        self.run(batch, see)
        return found

    def _alone(self, study: Study, piece: Batch) -> None:
        """See what each guess picks from examples of one length."""
        masks = batch_masks(piece, self.model)
        tokens = masks.tokens.rows // masks.examples

        def look(one: Seen, x: Tensor, table: int | None) -> None:
            one.leading = tuple(x.shape) if table is not None else tuple(x.shape[:-1])
            rows = math.prod(one.leading)
            one.sizes[tokens] = rows / masks.examples
            for guess in one.guesses:
                guess.see(moments_of(x, guess.call, masks, table), rows)

        self._again(study, piece, look)

    def _again(self, study: Study, batch: Batch, look: Callable[[Seen, Tensor, int | None], None]) -> None:
        """Another pass, call by call beside the first one."""
        calls: Counter[str] = Counter()

        def see(name: str, x: Tensor) -> None:
            calls[name] += 1
            known = study.seen.get(name, [])
            if calls[name] <= len(known):
                look(known[calls[name] - 1], x, self.tables.get(name))

        self.run(batch, see)
        names = calls.keys() | study.seen.keys()
        study.unsteady |= {name for name in names if calls[name] != len(study.seen.get(name, []))}


def pattern_of(name: str) -> str:
    """What the names of the layers of one sort, of all blocks and experts, have in common."""
    return _NUMBER.sub("#", name)


def _compare(one: Seen, x: Tensor, _: int | None) -> None:
    one.constant = x.shape == one.x.shape and torch.equal(x, one.x)


def identity_of(x: Tensor) -> Identity:
    """What tells a tensor from others that are alive."""
    return x.data_ptr(), tuple(x.shape), x.stride(), 0 if x.is_inference() else x._version
