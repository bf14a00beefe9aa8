"""Which layers see which inputs, and whose rows these hold, learnt from a few small forward passes.

Layers that see the same tensor (query, key and value; key and value of every cross-attention) share one Gram matrix.

Which rows of an input are real tokens is guessed from its shape, and no guess is believed: the same examples are run
without any padding, and the rows that a guess picks from the padded batch must be as many there, with the same mean and
mean square. Where all guesses hold, batches may be padded. Where one does not (pooled or routed tokens, a layer that
mixes padding into real tokens), every batch is run in pieces without padding, in which each row counts.

Images and sounds have rows that no mask tells, beside text as well as alone: such batches are always run in pieces
without padding.

A model that pads its input to a multiple of a window itself is given such batches, whose padding is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from merganser.checkpoints.layers import Kind, Layer, kind_of
from merganser.collection.masks import (
    SIGNALS,
    Batch,
    batch_masks,
    has_rows,
    has_signals,
    model_inputs,
    take_rows,
    without_padding,
)
from merganser.collection.probes import probe, ragged
from merganser.collection.rows import Call
from merganser.collection.stacks import Experts, Stack, experts_of, study_stacks
from merganser.collection.study import Study, Subject, pattern_of
from merganser.collection.taps import applications, input_width

WIDEST_PATCH = 4096  # numbers under a convolution's kernel: a Gram matrix of more is larger than such a layer is worth
_TRANSPOSED: dict[Kind, Kind] = {"linear": "conv1d", "conv1d": "linear"}


@dataclass(frozen=True)
class Wiring:
    """What the probes found.

    Attributes:
        layers: that have statistics.
        calls: of each layer that matters, by module; None for a call that does not count. Those of ``free`` have none,
            or ``each`` for all calls.
        leaders: for each linear layer, the first layer that sees the same input (itself, if it is the first).
        widths: of each leader's input.
        notes: what was left out or assumed.
        free: layers whose number of calls and of rows depends on the data. All of their rows count.
        padding_free: batches must have no padding.
        multiple: of which the number of tokens of each batch must be one.
        owners: modules that apply layers which are not called as modules, by layer.
        groups: the first layer that has a shared weight, for the others that have it: their inputs are one sequence.
        stacks: of experts.
        rows_per_token: the most that an input has beside images or sounds, in the probe.
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
    rows_per_token: int = 1


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
    if has_signals(batch):
        subject = _signals(model, layers, batch)
        return _finished(subject, subject.see_all(), layers, stacks, experts)
    few = ragged(batch, model)
    try:
        present, owners = _applied(model, layers, few)
    except Exception:  # a model that does not take other numbers of tokens, such as one that counts those of an image
        few = probe(batch, model)
        present, owners = _applied(model, layers, few)
    subject = Subject(model, present, owners, shared_weights(present), few)
    study = subject.study(1)
    for window in study.windows():
        try:
            other = subject.study(window)
        except Exception:  # noqa: S112 (longer than the model takes, which every class says in its own way)
            continue
        if other.failure is None and len(other.unclear) < len(study.unclear):
            study = other
            break
    return _finished(subject, study, layers, stacks, experts)


def _signals(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> Subject:
    """Two examples without padding where each has an image or sound of its own, else the one that there is."""
    piece = without_padding(batch, model)[0]
    size = batch_masks(piece, model).examples
    if all(has_rows(piece[key], size) for key in SIGNALS if piece.get(key) is not None):
        piece = take_rows(piece, size, torch.arange(2, device=batch_masks(piece, model).tokens.mask.device) % size)
    present, owners = _applied(model, layers, piece)
    return Subject(model, present, owners, shared_weights(present), piece)


def _finished(
    subject: Subject, study: Study, layers: Sequence[Layer], stacks: Sequence[Stack], experts: Experts
) -> Wiring:
    """The wiring of all layers and stacks."""
    model = subject.model
    wide = [layer.module for layer in layers if is_wide(model, layer)]
    notes = [f"{name}: patches of more than {WIDEST_PATCH} numbers; no statistics" for name in wide]
    wiring = _wire(subject, study, notes)
    return _with_stacks(wiring, model, study_stacks(model, stacks, subject.few, experts)) if stacks else wiring


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


def _wire(subject: Subject, study: Study, notes: list[str]) -> Wiring:
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
        if study.whole:
            free.add(name)  # a batch may have no images
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
    if study.whole:
        notes.append("batches had no padding, because masks do not tell the rows of images and sounds")
    elif study.unclear:
        more = f" and {len(study.unclear) - 1} more" if len(study.unclear) > 1 else ""
        notes.append(f"batches had no padding, because masks do not tell the rows of {study.unclear[0]}{more}")
    layers = tuple(layer for layer in subject.layers if subject.groups.get(layer.module, layer.module) in calls)
    tokens = batch_masks(subject.few, subject.model).real
    rows = [one.x[..., 0].numel() for name in leaders for one in study.seen.get(name, []) if study.whole]
    return Wiring(
        layers, calls, leaders, widths, tuple(notes), frozenset(free), study.whole or bool(study.unclear), study.window,
        subject.owners, subject.groups, rows_per_token=max(1, -(-max(rows, default=0) // max(1, tokens))),
    )  # fmt: skip


def _uncalled(names: list[str]) -> list[str]:
    """Notes about layers that the model did not call, in one where they are many (a tower for images)."""
    reason = "not called by the model as a layer of its own; no statistics"
    if len(names) < 4:
        return [f"{name}: {reason}" for name in names]
    return [f"{len(names)} layers from {names[0]} to {names[-1]}: {reason}"]


def _choose(study: Study, name: str) -> list[Call | None]:
    """Whose rows the calls of a layer hold; None where that is not told."""
    found = study.seen[name]
    if study.whole:
        return [Call("each") if one.constant else None for one in found]
    if study.failure is not None:
        return [next((guess.call for guess in one.guesses), None) for one in found]
    rest = [None if one.constant or not study.unclear or study.window > 1 else one.whole for one in found]
    return [one.verified or other for one, other in zip(found, rest, strict=True)]


def _why_untold(subject: Subject, study: Study, name: str) -> str | None:
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
