"""Which tokens of a batch are real, and batches in parts without the padding that a part does not need.

Images and sounds are signals: of a batch without text each example counts as one token, unless a mask tells samples of
a sound from padding.

A decoder has a mask of its own: ``decoder_attention_mask`` where the batch has one; otherwise position t of
the decoder is real if t is at most the position of the last label that is not -100, because labels are
shifted right to become decoder inputs (input t+1 is label t, and the loss reads positions up to the last
label).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.errors import DataError
from merganser.tasks.batches import IGNORED

PIECE_COST = 64  # padded tokens that one more forward pass is worth (measured with a 22M encoder on 2 cores)
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
TOKENS = ("input_ids", "inputs_embeds")
SIGNALS = ("pixel_values", "pixel_values_videos", "input_values", "input_features")
#: Masks of padding inside images, which no layer's rows can be told by.
_PIXEL_MASKS = ("pixel_mask", "pixel_attention_mask")
MASK = "attention_mask"  # how the names of masks end, that of a decoder too

Batch = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """Real tokens of one sequence input.

    Attributes:
        mask: (B, T) bool.
        index: positions of the real tokens in the flattened (B·T) order; None where all are real.
    """

    mask: Tensor
    index: Tensor | None

    @property
    def rows(self) -> int:
        """How many tokens are real."""
        return self.mask.numel() if self.index is None else self.index.numel()

    def take(self, flat: Tensor) -> Tensor:
        """The real rows of ``flat`` (B·T, …)."""
        return flat if self.index is None else flat.index_select(0, self.index)


@dataclass(frozen=True)
class BatchMasks:
    """The masks of one batch: of its tokens, and of the decoder's where there is a decoder."""

    tokens: Side
    decoder: Side | None

    @property
    def examples(self) -> int:
        """B, the number of examples."""
        return int(self.tokens.mask.shape[0])

    @property
    def real(self) -> int:
        """Real tokens of both sides."""
        return self.tokens.rows + (self.decoder.rows if self.decoder else 0)


def batch_masks(batch: Mapping[str, Any], model: nn.Module) -> BatchMasks:
    """The masks of a batch that is ready for ``model(**batch)``.

    Raises:
        DataError: neither tokens nor signals, or a mask that is not (batch, tokens).
    """
    positions = _positions(batch)
    tokens = _given(batch, MASK, positions) if _is_masked(batch) else _given({}, MASK, positions)
    return BatchMasks(_side(tokens), _decoder(batch, model))


def has_signals(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds images or sounds."""
    return any(isinstance(batch.get(key), Tensor) for key in SIGNALS)


def check_signals(batch: Mapping[str, Any]) -> None:
    """Refuse images and sounds of which padding, or the example that they belong to, cannot be told.

    Raises:
        DataError: such a batch.
    """
    for key in _PIXEL_MASKS:
        mask = batch.get(key)
        if isinstance(mask, Tensor) and not bool(mask.all()):
            what = f"{key} marks padding inside images, which cannot be told from their rows in the layers"
            raise DataError(what, mend="give images that are not padded, such as those of one size in each batch")
    first = _first(batch, *TOKENS, *SIGNALS)
    for key in SIGNALS:
        signal = batch.get(key)
        if isinstance(signal, Tensor) and signal.shape[0] != first.shape[0] != 1:
            what = (
                f"{key} has {signal.shape[0]} rows for {first.shape[0]} examples, so that it is not told whose they are"
            )
            raise DataError(what, mend="give batches of one example each")
    mask = batch.get(MASK)
    if isinstance(mask, Tensor) and not _is_masked(batch) and not bool(mask.all()):
        what = f"attention_mask has the shape {list(mask.shape)}, which does not tell rows of {list(first.shape)}"
        raise DataError(what, mend="leave the mask out where the model takes all of its input as real")


def _is_masked(batch: Mapping[str, Any]) -> bool:
    """Whether the attention mask is one of tokens, or of the samples of a sound."""
    if any(isinstance(batch.get(key), Tensor) for key in TOKENS):
        return True
    mask, first = batch.get(MASK), _first(batch, *TOKENS, *SIGNALS)
    return isinstance(mask, Tensor) and mask.shape == first.shape[:2] and first.ndim < 4


def _positions(batch: Mapping[str, Any]) -> Tensor:
    """Anything whose first two axes are examples and tokens; (B, 1) for signals that have no mask of their own."""
    first = _first(batch, *TOKENS, *SIGNALS)
    return first if _is_masked(batch) else first.reshape(first.shape[0], -1)[:, :1]


def describe_masking(batch: Mapping[str, Any], model: nn.Module) -> tuple[str, list[str]]:
    """The masking rule in words, for the header, and notes where the batch leaves something to assume."""
    notes = []
    rule = "attention_mask"
    if not _is_masked(batch):
        rule = "none"
        notes.append("the batches have no text: every row of the layers' inputs was counted, an example is one token")
    elif batch.get("attention_mask") is None:
        rule = "none"
        notes.append("the batches have no attention_mask: every token was counted as real")
    if _decoder(batch, model) is not None:
        if batch.get("decoder_attention_mask") is not None:
            rule += "; decoder_attention_mask"
        elif batch.get("labels") is not None:
            rule += "; decoder positions up to the last label"
        else:
            rule += "; decoder: none"
            notes.append("the batches have neither decoder_attention_mask nor labels: all decoder tokens counted")
    return rule, notes


def configured(model: nn.Module, key: str) -> Any:
    """What a model's configuration says of ``key``; None where it says nothing."""
    return getattr(getattr(model, "config", None), key, None)


def decoder_length(batch: Mapping[str, Any], model: nn.Module) -> int | None:
    """Length of the decoder's inputs where the batch gives them (or the labels that become them)."""
    if not configured(model, "is_encoder_decoder"):
        return None
    for key in DECODER_INPUTS:
        if batch.get(key) is not None:
            return int(batch[key].shape[1])
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        return int(labels.shape[1])
    return None  # no decoder, or one that reads the inputs once more


def model_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What the model is called with: labels only where they become the decoder's inputs, and no loss otherwise."""
    given = any(batch.get(key) is not None for key in DECODER_INPUTS)
    if decoder_length(batch, model) is not None and not given:
        return dict(batch)
    return {key: value for key, value in batch.items() if key != "labels"}


def _decoder(batch: Mapping[str, Any], model: nn.Module) -> Side | None:
    length = decoder_length(batch, model)
    if length is None:
        return None
    labels = batch.get("labels")
    if batch.get("decoder_attention_mask") is None and labels is not None and labels.ndim == 2:
        real = (labels != IGNORED).long()
        return _side(real.flip(1).cummax(1).values.flip(1).bool())  # up to the last label
    inputs = _positions(batch)
    return _side(_given(batch, "decoder_attention_mask", inputs.new_empty(inputs.shape[0], length)))


def _first(batch: Mapping[str, Any], *keys: str) -> Tensor:
    for key in keys:
        value = batch.get(key)
        if isinstance(value, Tensor):
            return value
    raise DataError(f"a batch has none of {', '.join(keys)}", mend="give batches that model(**batch) accepts")


def _given(batch: Mapping[str, Any], key: str, like: Tensor) -> Tensor:
    mask = batch.get(key)
    if mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if mask.ndim != 2 or tuple(mask.shape) != tuple(like.shape[:2]):
        mend = "give masks of shape (batch, tokens)"
        raise DataError(f"{key} has the shape {list(mask.shape)}, the tokens have {list(like.shape[:2])}", mend=mend)
    return mask.bool()


def _side(mask: Tensor) -> Side:
    return Side(mask, None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1))


def take_rows(batch: Batch, size: int, rows: slice | Tensor) -> Batch:
    """Some examples of a batch of ``size``."""
    return {key: value[rows] if has_rows(value, size) else value for key, value in batch.items()}


def split_by_count(batch: Batch, model: nn.Module, most: int) -> list[Batch]:
    """A batch in pieces of at most ``most`` examples, in their order."""
    size = batch_masks(batch, model).examples
    return [take_rows(batch, size, slice(start, start + most)) for start in range(0, size, most)]


def split_by_mask(batch: Batch, model: nn.Module) -> list[Batch]:
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
    decoder = bool(configured(model, "is_encoder_decoder"))

    def narrow(key: str, value: Any) -> Any:
        stays = decoder and of_decoder(key)
        return value if stays or not _has_columns(key, value, mask) else value[:, :width]

    return {key: narrow(key, value) for key, value in batch.items()}


def of_decoder(key: str) -> bool:
    """Whether what a batch calls by this name belongs to a decoder, where there is one."""
    return key == "labels" or key.startswith("decoder_")


def without_padding(batch: Batch, model: nn.Module) -> list[Batch]:
    """A batch in pieces without any padding: examples whose real tokens, a decoder's too, are as many.

    What is left has masks all the same, of ones.
    """
    masks = batch_masks(batch, model)
    tokens, decoder = masks.tokens.mask, masks.decoder.mask if masks.decoder else None
    both = tokens if decoder is None else torch.cat([tokens, decoder], 1)
    distinct, group = both.unique(dim=0, return_inverse=True)
    pieces = []
    for number, real in enumerate(distinct):
        rows = (group == number).nonzero().squeeze(1)
        sides = real.split([tokens.shape[1], both.shape[1] - tokens.shape[1]])
        columns = [side.nonzero().squeeze(1) for side in sides]
        piece = take_rows(batch, masks.examples, rows)
        pieces.append(change_columns(piece, model, partial(_selected, columns)))
    return pieces


def _selected(columns: list[Tensor], value: Tensor, side: int) -> Tensor:
    return value[:, columns[side]]


def widened(batch: Batch, model: nn.Module, multiple: int) -> Batch:
    """A batch whose tokens are padded, and masked, to a multiple of a length, as the model would itself."""
    mask = batch_masks(batch, model).tokens.mask
    more = -mask.shape[1] % multiple
    if not more:
        return batch
    pad_id = configured(model, "pad_token_id") or 0

    def pad(value: Tensor, side: int) -> Tensor:
        if side:
            return value
        filler = pad_id if value is batch.get("input_ids") else 0
        return torch.cat([value, value.new_full((value.shape[0], more, *value.shape[2:]), filler)], 1)

    return change_columns({MASK: mask.long(), **batch}, model, pad)


def change_columns(batch: Batch, model: nn.Module, change: Callable[[Tensor, int], Tensor]) -> Batch:
    """A batch whose tensors of a value a token are changed: ``change(value, side)``, the side 1 for a decoder's own."""
    masks = batch_masks(batch, model)
    sides = [masks.tokens, masks.decoder or masks.tokens]

    def changed(key: str, value: Any) -> Any:
        side = int(masks.decoder is not None and of_decoder(key))
        return change(value, side) if _has_columns(key, value, sides[side].mask) else value

    return {key: changed(key, value) for key, value in batch.items()}


def _has_columns(key: str, value: Any, mask: Tensor) -> bool:
    """Whether a value of a batch is a tensor with a column for each token: not one whose channels are as many."""
    return isinstance(value, Tensor) and value.shape[:2] == mask.shape and not key.startswith(("pixel_", "image_"))


def split_by_length(batch: Batch, model: nn.Module, most_tokens: int | None = None) -> list[Batch]:
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
    groups = length_runs(ascending, PIECE_COST) if on_cpu else [(0, size)]
    if most_tokens is not None:
        groups = [part for start, stop in groups for part in _halved_run(start, stop, ascending, most_tokens)]
    if len(groups) == 1 and ascending[-1] == width:
        return [batch]
    return [trimmed(take_rows(batch, size, order[start:stop]), model) for start, stop in groups]


def _halved_run(start: int, stop: int, lengths: list[int], most: int) -> list[tuple[int, int]]:
    if stop - start < 2 or (stop - start) * lengths[stop - 1] <= most:
        return [(start, stop)]
    middle = (start + stop) // 2
    return _halved_run(start, middle, lengths, most) + _halved_run(middle, stop, lengths, most)


def length_runs(lengths: list[int], cost: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs, each as long as its last, while a cut saves more than ``cost`` tokens."""
    best, where = cost, 0
    for cut in range(1, len(lengths)):
        saved = cut * (lengths[-1] - lengths[cut - 1])
        if saved > best:
            best, where = saved, cut
    if not where:
        return [(0, len(lengths))]
    left, right = length_runs(lengths[:where], cost), length_runs(lengths[where:], cost)
    return left + [(start + where, stop + where) for start, stop in right]


def has_rows(value: Any, size: int) -> bool:
    """Whether a value of a batch of ``size`` is a tensor with a row for each example."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
