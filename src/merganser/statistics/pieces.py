"""Parts of a batch: some of its rows, without the padding that only the other rows needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from merganser.statistics.masks import batch_masks

PIECE_COST = 64  # padded tokens that one more forward pass is worth (measured with a 22M encoder on 2 cores)
MASK = "attention_mask"  # how the names of masks end, that of a decoder too

Batch = dict[str, Any]


def take_rows(batch: Batch, size: int, rows: slice | Tensor) -> Batch:
    """Some examples of a batch of ``size``."""
    return {key: value[rows] if has_rows(value, size) else value for key, value in batch.items()}


def in_runs(batch: Batch, model: nn.Module, most: int) -> list[Batch]:
    """A batch in pieces of at most ``most`` examples, in their order."""
    size = batch_masks(batch, model).examples
    return [take_rows(batch, size, slice(start, start + most)) for start in range(0, size, most)]


def with_one_mask(batch: Batch, model: nn.Module) -> list[Batch]:
    """A batch in pieces of examples whose masks are the same: of one length, and so without padding of its own."""
    size = batch_masks(batch, model).examples
    masks = [value for key, value in batch.items() if key.endswith(MASK) and has_rows(value, size)]
    if not masks:
        return [batch]
    distinct, group = torch.cat(masks, 1).unique(dim=0, return_inverse=True)
    return [take_rows(batch, size, (group == one).nonzero().squeeze(1)) for one in range(len(distinct))]


def trimmed(batch: Batch, model: nn.Module) -> Batch:
    """A batch without the columns at its end in which no example has a token; a decoder's stay."""
    mask = batch_masks(batch, model).tokens.mask
    width = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else mask.shape[1]
    if width == mask.shape[1]:
        return batch
    decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def narrow(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        if decoder and (key == "labels" or key.startswith("decoder_")):
            return value
        return value[:, :width]

    return {key: narrow(key, value) for key, value in batch.items()}


def by_length(batch: Batch, model: nn.Module, most_tokens: int | None = None) -> list[Batch]:
    """A batch in pieces of similar length, where that saves more padding than the extra passes cost.

    On a GPU, where a pass costs as much as thousands of tokens, it is cut for ``most_tokens`` alone. Batches that hold
    anything but one row of at most two dimensions an example stay whole.

    Args:
        batch: ready for ``model(**batch)``.
        model: told from its configuration whether it has a decoder.
        most_tokens: padded tokens of a piece, unless one example has more.
    """
    mask = batch_masks(batch, model).tokens.mask
    size, width = mask.shape
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if size < 2 or not all(has_rows(value, size) and value.ndim <= 2 for value in tensors):
        return [batch]
    on_cpu = mask.device.type == "cpu"
    if not on_cpu and (most_tokens is None or mask.numel() <= most_tokens):
        return [batch]
    lengths, order = (mask.cumsum(1).argmax(1) + 1).sort(stable=True)  # up to the last real token
    ascending = lengths.tolist()
    groups = split_lengths(ascending, PIECE_COST) if on_cpu else [(0, size)]
    if most_tokens is not None:
        groups = [part for start, stop in groups for part in _halved(start, stop, ascending, most_tokens)]
    if len(groups) == 1 and ascending[-1] == width:
        return [batch]
    return [trimmed(take_rows(batch, size, order[start:stop]), model) for start, stop in groups]


def _halved(start: int, stop: int, lengths: list[int], most: int) -> list[tuple[int, int]]:
    if stop - start < 2 or (stop - start) * lengths[stop - 1] <= most:
        return [(start, stop)]
    middle = (start + stop) // 2
    return _halved(start, middle, lengths, most) + _halved(middle, stop, lengths, most)


def split_lengths(lengths: list[int], cost: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs, each as long as its last, while a cut saves more than ``cost`` tokens."""
    best, where = cost, 0
    for cut in range(1, len(lengths)):
        saved = cut * (lengths[-1] - lengths[cut - 1])
        if saved > best:
            best, where = saved, cut
    if not where:
        return [(0, len(lengths))]
    left, right = split_lengths(lengths[:where], cost), split_lengths(lengths[where:], cost)
    return left + [(start + where, stop + where) for start, stop in right]


def has_rows(value: Any, size: int) -> bool:
    """Whether a value of a batch of ``size`` is a tensor with a row for each example."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
