"""Which layers see which inputs, and whose rows these hold, learnt from a few small forward passes.

Layers that see the same tensor (query, key and value; key and value of every cross-attention) share one Gram matrix.

Which rows of an input are real tokens is guessed from its shape, and no guess is believed: the same examples are run
without any padding, and the rows that a guess picks from the padded batch must be as many there, with the same mean and
mean square. Where all guesses hold, batches may be padded. Where one does not (pooled or routed tokens, a layer that
mixes padding into real tokens), every batch is run in pieces without padding, in which each row counts.

A model that pads its input to a multiple of a window itself is given such batches, whose padding is known.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import Kind, Layer, kind_of
from merganser.collection.masks import Batch, BatchMasks, batch_masks, model_inputs, widened, without_padding
from merganser.collection.probes import other_tokens, probe, ragged
from merganser.collection.rows import Call, guesses, token_ids, token_rows
from merganser.collection.stacks import Experts, Stack, experts_of, study_stacks
from merganser.collection.taps import See, applications, input_hooks, input_width, weight_of
from merganser.tasks.models import first_line

#: Address, shape, strides and version: equal while alive means one tensor, not changed in place in between.
Identity = tuple[int, tuple[int, ...], tuple[int, ...], int]

SAME = 1e-3  # of a feature's root mean square: rounding is smaller, rows of padding are not
MOST_WINDOWS = 3  # lengths that are tried as the window to which a model pads
WIDEST_PATCH = 4096  # numbers under a convolution's kernel: a Gram matrix of more is larger than such a layer is worth
_TRANSPOSED: dict[Kind, Kind] = {"linear": "conv1d", "conv1d": "linear"}
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Wiring:
    """What the probes found.

    Attributes:
        layers: that have statistics.
        calls: of each layer that matters, by module; None for a call that does not count. Empty for those of ``free``.
        leaders: for each linear layer, the first layer that sees the same input (itself, if it is the first).
        widths: of each leader's input.
        notes: what was left out or assumed.
        free: layers whose number of calls and of rows depends on the data. All of their rows count.
        padding_free: batches must have no padding.
        multiple: of which the number of tokens of each batch must be one.
        owners: modules that apply layers which are not called as modules, by layer.
        groups: the first layer that has a shared weight, for the others that have it: their inputs are one sequence.
        stacks: of experts.
    """

    layers: tuple[Layer, ...]
    calls: dict[str, tuple[Call | None, ...]]
    leaders: dict[str, str]
    widths: dict[str, int]
    notes: tuple[str, ...]
    free: frozenset[str] = frozenset()
    padding_free: bool = False
    multiple: int = 1
    owners: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()


@dataclass
class _Moments:
    """How many rows, and the sums of them and of their squares (float64); of ids their counts."""

    rows: int
    sums: Tensor
    squares: Tensor | None = None

    def __add__(self, other: _Moments) -> _Moments:
        both = None if self.squares is None or other.squares is None else self.squares + other.squares
        return _Moments(self.rows + other.rows, self.sums + other.sums, both)

    def agrees(self, other: _Moments) -> bool:
        """Whether both are of the same rows, up to rounding."""
        if self.rows != other.rows or not self.rows:
            return False
        if self.squares is None or other.squares is None:
            return torch.equal(self.sums, other.sums)
        largest = torch.maximum(self.squares, other.squares) / self.rows
        size = (largest + SAME**2 * largest.max()).sqrt()  # of each feature
        near = (self.squares - other.squares).abs() / self.rows <= SAME * size.square()
        return bool(near.all() and ((self.sums - other.sums).abs() / self.rows <= SAME * size).all())


def _moments(x: Tensor, call: Call, masks: BatchMasks, table: int | None) -> _Moments | None:
    """Of the rows that a guess picks, or the ids of a table of so many rows; None where it does not fit."""
    try:
        if table is not None:
            found = token_ids(x, call, masks)
            return _Moments(len(found), torch.bincount(found, minlength=table))
        rows, index = token_rows(x, call, masks)
    except (ValueError, RuntimeError):
        return None
    rows = (rows if index is None else rows.index_select(0, index)).double()
    return _Moments(len(rows), rows.sum(0), rows.square().sum(0))


@dataclass
class _Guess:
    """Whose rows a call may hold, and what follows from that.

    Attributes:
        call: the guess.
        padded: what it picks from the padded probe; None where it does not fit.
        alone: what it picks from the same examples without padding.
        whole: whether that is every row there.
    """

    call: Call
    padded: _Moments | None
    alone: _Moments | None = None
    whole: bool = True

    def see(self, found: _Moments | None, rows: int) -> None:
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
class _Seen:
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
    guesses: list[_Guess]
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
class _Study:
    """What a set of probes showed.

    Attributes:
        window: of which their numbers of tokens are multiples.
        seen: calls of each layer, in the order of the first ones.
        absent: linear layers that were not called.
        unsteady: layers that were called another number of times in another probe.
        failure: why the examples could not be run without padding.
    """

    window: int
    seen: dict[str, list[_Seen]] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    unsteady: set[str] = field(default_factory=set)
    failure: str | None = None

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
class _Subject:
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

    def study(self, window: int) -> _Study:
        """The probes, with numbers of tokens that are multiples of ``window``: twice that for the padded one."""
        padded = widened(self.few, self.model, 2 * window if window > 1 else 1)
        masks, study = batch_masks(padded, self.model), _Study(window)

        def look(name: str, x: Tensor) -> None:
            table = self.tables.get(name)
            leading = tuple(x.shape) if table is not None else tuple(x.shape[:-1])
            found = [_Guess(call, _moments(x, call, masks, table)) for call in guesses(leading, masks)]
            study.seen.setdefault(name, []).append(_Seen(x, identity_of(x), found))

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

    def grows(self, name: str, one: _Seen) -> bool:
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

    def _alone(self, study: _Study, piece: Batch) -> None:
        """See what each guess picks from examples of one length."""
        masks = batch_masks(piece, self.model)
        tokens = masks.tokens.rows // masks.examples

        def look(one: _Seen, x: Tensor, table: int | None) -> None:
            one.leading = tuple(x.shape) if table is not None else tuple(x.shape[:-1])
            rows = math.prod(one.leading)
            one.sizes[tokens] = rows / masks.examples
            for guess in one.guesses:
                guess.see(_moments(x, guess.call, masks, table), rows)

        self._again(study, piece, look)

    def _again(self, study: _Study, batch: Batch, look: Callable[[_Seen, Tensor, int | None], None]) -> None:
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


def _compare(one: _Seen, x: Tensor, _: int | None) -> None:
    one.constant = x.shape == one.x.shape and torch.equal(x, one.x)


def discover(
    model: nn.Module, layers: Sequence[Layer], batch: Batch, stacks: Sequence[Stack] = (), experts: Experts = "shared"
) -> Wiring:
    """Run probes made of ``batch``, and find whose rows, and which same inputs, the layers see.

    The model should be in eval mode, inside ``torch.no_grad()`` (not ``inference_mode``: versions tell
    whether a tensor was changed in place between two layers).

    Args:
        model: of which the layers are.
        layers: in module order; of one that is no linear module, the weight must be seen to be used as one.
        batch: ready for ``model(**batch)``.
        stacks: of experts.
        experts: whether experts share Gram matrices.
    """
    few = ragged(batch, model)
    try:
        present, owners = _applied(model, layers, few)
    except Exception:  # a model that does not take other numbers of tokens, such as one that counts those of an image
        few = probe(batch, model)
        present, owners = _applied(model, layers, few)
    subject = _Subject(model, present, owners, shared_weights(present), few)
    study = subject.study(1)
    for window in study.windows():
        try:
            other = subject.study(window)
        except Exception:  # longer than the model takes
            continue
        if other.failure is None and len(other.unclear) < len(study.unclear):
            study = other
            break
    wide = [layer.module for layer in layers if is_wide(model, layer)]
    notes = [f"{name}: patches of more than {WIDEST_PATCH} numbers; no statistics" for name in wide]
    wiring = _wire(subject, study, notes)
    return _with_stacks(wiring, model, study_stacks(model, stacks, few, experts)) if stacks else wiring


def _with_stacks(wiring: Wiring, model: nn.Module, stacks: Sequence[Stack]) -> Wiring:
    """The same with the inputs of experts: free ones, as routing depends on the data."""
    widths = {key: stack.width for stack in stacks for key in stack.inputs(experts_of(model, stack))}
    shared, inner = sum(stack.shared for stack in stacks), sum(stack.inner for stack in stacks)
    note = f"experts: {shared} stacks share the Gram matrix of their inputs, {inner} have one of each expert's inside"
    return replace(
        wiring,
        calls=wiring.calls | dict.fromkeys(widths, ()),
        leaders=wiring.leaders | {key: key for key in widths},
        widths=wiring.widths | widths,
        notes=(*wiring.notes, note) if stacks else wiring.notes,
        free=wiring.free | widths.keys(),
        padding_free=wiring.padding_free or bool(stacks),
        stacks=tuple(stacks),
    )


def shared_weights(layers: Sequence[Layer]) -> dict[str, str]:
    """For each linear layer that has its weight on disk from another one before it, the name of that one."""
    first: dict[str, str] = {}
    linear = [layer for layer in layers if layer.kind != "embedding" and layer.tied]
    leaders = {layer.module: first.setdefault(layer.weight, layer.module) for layer in linear}
    return {name: leader for name, leader in leaders.items() if name != leader}


def identity_of(x: Tensor) -> Identity:
    """What tells a tensor from others that are alive."""
    return x.data_ptr(), tuple(x.shape), x.stride(), 0 if x.is_inference() else x._version


def _applied(model: nn.Module, layers: Sequence[Layer], few: Batch) -> tuple[list[Layer], dict[str, str]]:
    """The layers that are linear maps, and the modules that apply those which are not called as modules."""
    found: dict[str, tuple[str, bool]] = {}
    with applications(model, layers, found) as called:
        model(**model_inputs(few, model))
    modules = dict(model.named_modules())
    present, owners = [], {}
    for layer in layers:
        if is_wide(model, layer):
            continue
        is_module = layer.module in modules and kind_of(modules[layer.module]) is not None
        if layer.module in found and not (is_module and layer.module in called):
            owners[layer.module], transposed = found[layer.module]
            present.append(replace(layer, kind=_TRANSPOSED[layer.kind]) if transposed else layer)
        elif is_module:
            present.append(layer)
    return present, owners


def is_wide(model: nn.Module, layer: Layer) -> bool:
    """Whether a layer is a convolution whose patches have too many numbers."""
    return kind_of(model.get_submodule(layer.module)) == "convolution" and input_width(model, layer) > WIDEST_PATCH


def _wire(subject: _Subject, study: _Study, notes: list[str]) -> Wiring:
    """What the study says of each layer."""
    free: set[str] = set()
    routed = {pattern_of(name) for name in study.unsteady} | {
        pattern_of(name) for name in study.absent if pattern_of(name) in map(pattern_of, study.seen)
    }
    calls: dict[str, tuple[Call | None, ...]] = {}
    leaders: dict[str, str] = {}
    widths: dict[str, int] = {}
    by_inputs: dict[tuple[Any, ...], str] = {}
    if study.failure is not None:
        notes.append(f"shapes alone told the rows of inputs, because the model does not run otherwise: {study.failure}")
    for name, found in study.seen.items():
        ids = name in subject.tables
        chosen = _choose(study, name)
        unknown = any(call is None and not one.constant for call, one in zip(chosen, found, strict=True))
        if unknown or pattern_of(name) in routed:
            if reason := _why_untold(subject, study, name):
                notes.append(f"{name}: {reason}; no statistics")
                continue
            free.add(name)
            chosen = [Call("all")] * len(found)
        elif not any(chosen) and not ids:
            notes.append(f"{name}: sees no tokens; every row of its inputs was counted")
            chosen = [Call("all")] * len(found)
        elif not all(chosen):
            what = "ids that are not one a token" if ids else "inputs that are not tokens"
            notes.append(f"{name}: {what} were left out" + ("" if any(chosen) else "; no statistics"))
            if not any(chosen):
                continue
        calls[name] = () if name in free else tuple(chosen)
        if not ids:
            used = tuple((one.identity, call) for one, call in zip(found, chosen, strict=True) if call)
            leaders[name] = by_inputs.setdefault((name in free, *used), name)
            widths.setdefault(leaders[name], found[0].x.shape[-1])
    alike, uncalled = {pattern_of(name) for name in free}, list[str]()
    for layer in subject.layers:
        name = layer.module
        if name in study.seen or name in subject.groups:
            continue
        if layer.kind == "embedding" or pattern_of(name) not in alike:
            uncalled.append(name)
            continue
        free.add(name)  # one of several experts, to which no token of the probe was sent
        calls[name], leaders[name] = (), name
        widths[name] = input_width(subject.model, layer)
    notes += _uncalled(uncalled)
    if study.unclear:
        more = f" and {len(study.unclear) - 1} more" if len(study.unclear) > 1 else ""
        notes.append(f"batches had no padding, because masks do not tell the rows of {study.unclear[0]}{more}")
    layers = tuple(layer for layer in subject.layers if subject.groups.get(layer.module, layer.module) in calls)
    return Wiring(
        layers, calls, leaders, widths, tuple(notes), frozenset(free), bool(study.unclear), study.window,
        subject.owners, subject.groups,
    )  # fmt: skip


def _uncalled(names: list[str]) -> list[str]:
    """Notes about layers that the model did not call, in one where they are many (a tower for images)."""
    reason = "not called by the model; no statistics"
    if len(names) < 4:
        return [f"{name}: {reason}" for name in names]
    return [f"{len(names)} layers from {names[0]} to {names[-1]}: {reason}"]


def _choose(study: _Study, name: str) -> list[Call | None]:
    """Whose rows the calls of a layer hold; None where that is not told."""
    found = study.seen[name]
    if study.failure is not None:
        return [next((guess.call for guess in one.guesses), None) for one in found]
    rest = [None if one.constant or not study.unclear or study.window > 1 else one.whole for one in found]
    return [one.verified or other for one, other in zip(found, rest, strict=True)]


def _why_untold(subject: _Subject, study: _Study, name: str) -> str | None:
    """Why a layer whose rows no guess tells cannot have statistics; None: each of its rows counts without padding."""
    if study.failure is not None:
        return "masks do not tell the rows of its inputs"
    padded = "the model pads its input to windows, and that padding cannot be told from tokens"
    if study.window > 1:
        return padded
    for one in study.seen[name]:
        if all(rows <= tokens for tokens, rows in one.sizes.items()):
            continue
        (first, rows), *others = one.sizes.items()
        slopes = {(rows - other) / (first - length) for length, other in others}
        if len(slopes) == 1 and min(slopes) >= 1 and rows >= min(slopes) * first:
            continue  # so many rows a token, and some that are always there
        if subject.grows(name, one):
            return padded
    return None
