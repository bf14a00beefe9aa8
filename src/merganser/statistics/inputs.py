"""Which layers see which inputs, learnt from one small forward pass, and the hooks that then gather them.

Layers that see the same tensor (query, key and value; key and value of every cross-attention) share one Gram
matrix. The probe is a batch whose sizes differ from one another, so that shapes tell whose rows an input
holds; the answer is kept per call, and later batches may have any sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import Layer
from merganser.errors import StatisticsError
from merganser.statistics.gram import Gram, Task, Workers, buffer_rows
from merganser.statistics.masks import (
    BatchMasks,
    RowKind,
    batch_masks,
    decoder_length,
    kind_of_rows,
    token_ids,
    token_rows,
)
from merganser.statistics.pieces import take_rows

Identity = tuple[int, tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class Call:
    """One call of a layer in each forward pass.

    Attributes:
        kind: whose rows it holds.
        factor: rows a token (or example); 1, but for inputs that are split up by heads and the like.
    """

    kind: RowKind
    factor: int


@dataclass(frozen=True)
class Wiring:
    """What the probe found.

    Attributes:
        kinds: for each layer's module, whose rows each of its calls holds; None for a call that does not
            count.
        leaders: for each linear layer, the first layer that sees the same input (itself, if it is the first).
        widths: of each leader's input.
        notes: what was left out or assumed.
    """

    calls: dict[str, tuple[Call | None, ...]]
    leaders: dict[str, str]
    widths: dict[str, int]
    notes: tuple[str, ...]


def probe(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A few rows of ``batch``, at least 3, such that batch size and lengths are different numbers."""
    masks = batch_masks(batch, model)
    length, decoder = masks.tokens.mask.shape[1], decoder_length(batch, model)
    if decoder is not None and decoder == length:
        batch = {key: _reshaped(key, value, decoder) for key, value in batch.items()}
        decoder = decoder - 1 if decoder > 1 else 2
    size = next(n for n in range(3, 6) if n not in (length, decoder))
    rows = torch.arange(size, device=masks.tokens.mask.device) % masks.examples
    return take_rows(batch, masks.examples, rows)


def _reshaped(key: str, value: Any, length: int) -> Any:
    if not isinstance(value, Tensor) or not (key.startswith("decoder_") or key == "labels"):
        return value
    return value[:, :-1] if length > 1 else torch.cat([value, value], 1)


def discover(model: nn.Module, layers: Sequence[Layer], batch: dict[str, Any]) -> Wiring:
    """Run the probe of ``batch`` and find whose rows, and which same inputs, the layers see.

    The model should be in eval mode, inside ``torch.no_grad()`` (not ``inference_mode``: versions tell
    whether a tensor was changed in place between two layers).
    """
    batch = probe(batch, model)
    masks = batch_masks(batch, model)
    seen: dict[str, list[tuple[Tensor, RowKind | None, Identity]]] = {}  # in the order of the first calls
    embeddings = {layer.module for layer in layers if layer.kind == "embedding"}

    def look(name: str, x: Tensor) -> None:
        # the references keep the tensors alive: equal addresses then mean one tensor
        kind = kind_of_rows(x, masks, ids=name in embeddings)
        seen.setdefault(name, []).append((x, kind, _identity(x)))

    with _hooks(model, [layer.module for layer in layers], look):
        model(**batch)
    kinds: dict[str, tuple[RowKind | None, ...]] = {}
    leaders: dict[str, str] = {}
    widths: dict[str, int] = {}
    by_inputs: dict[tuple[Any, ...], str] = {}
    notes = [
        f"{layer.module}: not called by the model; no statistics"
        for layer in layers
        if layer.module not in seen
    ]
    for name, calls in seen.items():
        chosen = _choose(name, [kind for _, kind, _ in calls], name in embeddings, notes)
        if not any(chosen):
            continue
        kinds[name] = chosen
        if name not in embeddings:
            used = tuple((i, k) for (_, _, i), k in zip(calls, chosen, strict=True) if k)
            leaders[name] = by_inputs.setdefault(used, name)
            widths.setdefault(leaders[name], calls[0][0].shape[-1])
    total = sum(len(chosen) for chosen in kinds.values())
    return Wiring(kinds, leaders, widths, total, tuple(notes))


def _choose(
    name: str, found: list[RowKind | None], ids: bool, notes: list[str]
) -> tuple[RowKind | None, ...]:
    if any(found) or ids:
        if not all(found):
            what = "ids that are not one a token" if ids else "inputs that are not tokens"
            notes.append(f"{name}: {what} were left out" + ("" if any(found) else "; no statistics"))
        return tuple(found)
    notes.append(f"{name}: sees no tokens; every row of its inputs was counted")
    return tuple("all" for _ in found)


def _identity(x: Tensor) -> Identity:
    version = 0 if x.is_inference() else x._version
    return x.data_ptr(), tuple(x.shape), x.stride(), version


@contextmanager
def _hooks(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    """Call ``see(name, input)`` before each call of the named modules, while the context lasts."""

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = []
    try:
        for name in names:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
