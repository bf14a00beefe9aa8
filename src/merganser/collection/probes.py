"""Small batches on which a model shows how its layers see their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from merganser.collection.masks import (
    Batch,
    batch_masks,
    change_columns,
    configured,
    decoder_length,
    of_decoder,
    take_rows,
)
from merganser.tasks.batches import IGNORED

_ROWS = 5  # of a batch, its longest, that a probe may be made of


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


def ragged(batch: Batch, model: nn.Module) -> Batch:
    """The same with padding in every row, and real tokens of two different numbers.

    Tokens are taken out of the middle, so that the first and the last, which may be special, stay.
    """
    lengths, order = batch_masks(batch, model).tokens.mask.sum(1).sort(descending=True, stable=True)
    long = int((2 * lengths >= lengths[0]).sum())  # short ones would make short probes
    first = take_rows(batch, len(lengths), order[: min(_ROWS, max(2, long))])
    masks = batch_masks(first, model)
    sides = [masks.tokens.mask, *([masks.decoder.mask] if masks.decoder else [])]
    longest = [max(1, min(int(mask.sum(1).min()), max(1, mask.shape[1] - 1))) for mask in sides]
    widths = [length + 1 for length in longest]
    if len(widths) > 1 and widths[0] == widths[1]:
        longest[1] = max(1, longest[1] - 1)
        widths[1] = longest[1] + 1 + (widths[0] == longest[1] + 1)
    size = next(n for n in range(3, 6) if n not in widths)
    rows = torch.arange(size, device=sides[0].device) % masks.examples
    few = take_rows(first, masks.examples, rows)
    places = [_places(mask[rows], length, width) for mask, length, width in zip(sides, longest, widths, strict=True)]
    pad_id = configured(model, "pad_token_id") or 0
    fillers = {"labels": IGNORED, "input_ids": pad_id, "decoder_input_ids": pad_id}

    def change(value: Tensor, side: int) -> Tensor:
        columns, real = places[side]
        moved = value[torch.arange(size, device=value.device)[:, None], columns]
        filler = next((filler for key, filler in fillers.items() if value is few.get(key)), 0)
        return torch.where(real.reshape(*real.shape, *[1] * (moved.ndim - 2)), moved, filler)

    given = {"attention_mask": batch_masks(few, model).tokens.mask.long(), **few}
    if given["attention_mask"] is None:
        given["attention_mask"] = batch_masks(few, model).tokens.mask.long()
    return change_columns(given, model, change)


def _places(mask: Tensor, longest: int, width: int) -> tuple[Tensor, Tensor]:
    """For each row the columns (rows, width) that it keeps, and which of them are real; padded where it was padded."""
    columns, real = [], []
    for number, row in enumerate(mask):
        found = row.nonzero().squeeze(1)
        length = max(1, longest - number % 2)
        found = torch.cat([found[: length - length // 2], found[len(found) - length // 2 :]])
        filler = found.new_zeros(width - len(found))
        left = not bool(row[0]) and bool(row[-1])
        columns.append(torch.cat([filler, found] if left else [found, filler]))
        ones, zeros = torch.ones_like(found, dtype=torch.bool), torch.zeros_like(filler, dtype=torch.bool)
        real.append(torch.cat([zeros, ones] if left else [ones, zeros]))
    return torch.stack(columns), torch.stack(real)


def other_tokens(batch: Batch, model: nn.Module) -> Batch:
    """The same batch with other tokens at the same places, the first and last of each row aside where it has more."""
    masks = batch_masks(batch, model)
    changed = dict(batch)
    for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        value = batch.get(key)
        side = masks.decoder if of_decoder(key) and masks.decoder else masks.tokens
        if not isinstance(value, Tensor) or value.shape[:2] != side.mask.shape:
            continue
        inner = torch.stack([_inner(row) for row in side.mask])
        moved = value.clone()
        moved[inner] = value[inner].roll(1, 0)
        if torch.equal(moved, value):  # all are the same
            moved[inner] = torch.where(value[inner] > 0, value[inner] - 1, value[inner] + 1)
        changed[key] = moved
    return changed


def _inner(row: Tensor) -> Tensor:
    places = row.nonzero().squeeze(1)
    inner = row.clone()
    if len(places) > 2:
        inner[places[0]] = inner[places[-1]] = False
    return inner


def _reshaped(key: str, value: object, length: int) -> object:
    if not isinstance(value, Tensor) or not of_decoder(key):
        return value
    return value[:, :-1] if length > 1 else torch.cat([value, value], 1)
