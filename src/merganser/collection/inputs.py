"""Which layers see which inputs, learnt from one small forward pass.

Layers that see the same tensor (query, key and value; key and value of every cross-attention) share one Gram
matrix. The probe is a batch whose sizes differ from one another, so that shapes tell whose rows an input holds;
the answer is kept per call, and later batches may have any sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import Layer
from merganser.collection.masks import (
    Batch,
    BatchMasks,
    RowKind,
    batch_masks,
    decoder_length,
    kind_of_rows,
    model_inputs,
    of_decoder,
    take_rows,
)

#: Address, shape, strides and version: equal while alive means one tensor, not changed in place in between.
Identity = tuple[int, tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class Call:
    """One call of a layer in each forward pass.

    Attributes:
        kind: whose rows it holds.
        factor: rows a token (or example): 1, but for inputs that are cut up by heads and the like.
    """

    kind: RowKind
    factor: int = 1

    def rows(self, masks: BatchMasks) -> int:
        """How many rows of a batch count; 0 where the masks do not tell."""
        side = masks.side(self.kind)
        if side is not None:
            return side.rows * self.factor
        return masks.examples if self.kind == "examples" else 0


@dataclass(frozen=True)
class Wiring:
    """What the probe found.

    Attributes:
        calls: of each layer that matters, by module; None for a call that does not count.
        leaders: for each linear layer, the first layer that sees the same input (itself, if it is the first).
        widths: of each leader's input.
        notes: what was left out or assumed.
    """

    calls: dict[str, tuple[Call | None, ...]]
    leaders: dict[str, str]
    widths: dict[str, int]
    notes: tuple[str, ...]


def probe(batch: Batch, model: nn.Module) -> Batch:
    """A few rows of ``batch``, at least 3, such that batch size and lengths are different numbers."""
    masks = batch_masks(batch, model)
    length, decoder = masks.tokens.mask.shape[1], decoder_length(batch, model)
    if decoder is not None and decoder == length:
        batch = {key: _reshaped(key, value, decoder) for key, value in batch.items()}
        decoder = decoder - 1 if decoder > 1 else 2
    size = next(n for n in range(3, 6) if n not in (length, decoder))
    rows = torch.arange(size, device=masks.tokens.mask.device) % masks.examples
    return take_rows(batch, masks.examples, rows)


def discover(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> Wiring:
    """Run the probe of ``batch`` and find whose rows, and which same inputs, the layers see.

    The model should be in eval mode, inside ``torch.no_grad()`` (not ``inference_mode``: versions tell
    whether a tensor was changed in place between two layers).
    """
    batch = probe(batch, model)
    masks = batch_masks(batch, model)
    # of each layer, in the order of the first calls; the tensors stay alive, so that no other takes their address
    seen: dict[str, list[tuple[Tensor, Identity, Call | None]]] = {}
    embeddings = {layer.module for layer in layers if layer.kind == "embedding"}

    def look(name: str, x: Tensor) -> None:
        seen.setdefault(name, []).append((x, identity_of(x), _call(x, masks, name in embeddings)))

    with input_hooks(model, [layer.module for layer in layers], look):
        model(**model_inputs(batch, model))
    absent = [layer.module for layer in layers if layer.module not in seen]
    notes = [f"{name}: not called by the model; no statistics" for name in absent]
    calls: dict[str, tuple[Call | None, ...]] = {}
    leaders: dict[str, str] = {}
    widths: dict[str, int] = {}
    by_inputs: dict[tuple[Any, ...], str] = {}
    for name, found in seen.items():
        chosen = _choose(name, [call for *_, call in found], name in embeddings, notes)
        if not any(chosen):
            continue
        calls[name] = chosen
        if name not in embeddings:
            used = tuple((identity, call) for (_, identity, _), call in zip(found, chosen, strict=True) if call)
            leaders[name] = by_inputs.setdefault(used, name)
            widths.setdefault(leaders[name], found[0][0].shape[-1])
    return Wiring(calls, leaders, widths, tuple(notes))


def identity_of(x: Tensor) -> Identity:
    """What tells a tensor from others that are alive."""
    return x.data_ptr(), tuple(x.shape), x.stride(), 0 if x.is_inference() else x._version


@contextmanager
def input_hooks(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before each call of the named modules, while the context lasts."""

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True).remove)
        yield


def _call(x: Tensor, masks: BatchMasks, ids: bool) -> Call | None:
    kind = kind_of_rows(x, masks, ids=ids)
    side = None if kind is None else masks.side(kind)
    factor = 1 if side is None else max(1, x.numel() // x.shape[-1] // side.mask.numel())
    return None if kind is None else Call(kind, factor)


def _choose(name: str, found: list[Call | None], ids: bool, notes: list[str]) -> tuple[Call | None, ...]:
    if not any(found) and not ids:
        notes.append(f"{name}: sees no tokens; every row of its inputs was counted")
        return tuple(Call("all") for _ in found)
    if not all(found):
        what = "ids that are not one a token" if ids else "inputs that are not tokens"
        notes.append(f"{name}: {what} were left out" + ("" if any(found) else "; no statistics"))
    return tuple(found)


def _reshaped(key: str, value: Any, length: int) -> Any:
    if not isinstance(value, Tensor) or not of_decoder(key):
        return value
    return value[:, :-1] if length > 1 else torch.cat([value, value], 1)
