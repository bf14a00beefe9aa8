"""From texts to tokens: cut at a length that is counted, token types kept where the model has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from merganser.errors import CheckpointError, DataError
from merganser.tasks.batches import Feature
from merganser.tasks.data import Rows
from merganser.tasks.models import blamed

_TOGETHER = "check that the tokenizer's files are whole, and are those of this model"
_CHUNK = 512  # texts tokenised at once: enough to be fast, few enough to keep the tokenizer's own records small


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    Attributes:
        features: in the order of the data.
        cut: the places of those that were longer than ``max_length`` and were cut.
        max_length: in tokens.
    """

    features: list[Feature]
    cut: frozenset[int]
    max_length: int

    @property
    def truncated(self) -> int:
        """How many examples were cut."""
        return len(self.cut)


def has_token_types(config: Mapping[str, Any]) -> bool:
    """Whether a model tells the first text from the second; many tokenizers offer more than models take."""
    types = config.get("type_vocab_size")
    return isinstance(types, int) and types > 1


def encode_texts(
    rows: Rows,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: Any,
    config: Mapping[str, Any],
    max_length: int,
    *,
    target: bool = False,
    special: bool = True,
) -> Encoded:
    """Tokenise texts or pairs of texts; of a pair that is too long, the longer text is cut.

    Args:
        rows: for the places of errors.
        texts: the first or only texts.
        pairs: the second texts.
        tokenizer: of the model.
        config: of the model.
        max_length: in tokens, special tokens included.
        target: the texts are what a decoder is to write (some tokenizers mark these differently).
        special: add special tokens; False for texts that have theirs in them, as chats have.

    Raises:
        DataError: a text without a single token, with its file and line.
    """
    given = {"text_target": texts} if target else {"text": texts} | ({} if pairs is None else {"text_pair": pairs})
    return _encode(rows, given, tokenizer, config, max_length, special=special)


def encode_words(
    rows: Rows, sentences: Sequence[Sequence[str]], tokenizer: Any, config: Mapping[str, Any], max_length: int
) -> Encoded:
    """Tokenise texts that are split into words, and find the first sub-word of each word.

    Raises:
        CheckpointError: the tokenizer is a slow one, which does not tell which sub-word belongs to which
            word.
        DataError: a text without a single token, with its file and line.
    """
    if not getattr(tokenizer, "is_fast", False):
        what = f"token classification needs a fast tokenizer, not {type(tokenizer).__name__}"
        mend = "put the model's tokenizer.json beside the weights"
        raise CheckpointError(what, where=getattr(tokenizer, "name_or_path", None), mend=mend)
    _separate_words(tokenizer)
    return _encode(rows, {"text": sentences}, tokenizer, config, max_length, words=True)


def _encode(
    rows: Rows,
    given: Mapping[str, Sequence[Any]],
    tokenizer: Any,
    config: Mapping[str, Any],
    max_length: int,
    *,
    words: bool = False,
    special: bool = True,
) -> Encoded:
    """Tokenise what the tokenizer is ``given``, as a whole to see what is too long, and that once more, cut."""
    types = has_token_types(config)
    options = {
        "is_split_into_words": words,
        "add_special_tokens": special,
        "padding": False,
        "return_attention_mask": False,
        "return_token_type_ids": types,
        "verbose": False,
    }
    features: list[Feature] = []
    shortened: set[int] = set()
    rows_of_table = _vocabulary_size(config)
    for start in range(0, len(next(iter(given.values()))), _CHUNK):
        chunk = {name: list(values[start : start + _CHUNK]) for name, values in given.items()}
        with _using(tokenizer):
            whole = tokenizer(**chunk, truncation=False, **options)
        places = [(whole, index) for index in range(len(whole["input_ids"]))]
        long = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
        if long:
            again = {name: [values[index] for index in long] for name, values in chunk.items()}
            with _using(tokenizer):
                cut = tokenizer(**again, truncation="longest_first", max_length=max_length, **options)
            for place, index in enumerate(long):
                places[index] = (cut, place)
                shortened.add(start + index)
        for index, (encoded, place) in enumerate(places):
            ids = encoded["input_ids"][place]
            if not ids:
                mend = "remove the row, or give it a text"
                raise DataError("the text has no tokens", where=rows.where(start + index), mend=mend)
            if max(ids) >= rows_of_table:
                what = f"the tokenizer gives a token the id {max(ids)}, but the model has {rows_of_table} tokens"
                raise CheckpointError(what, where=_files_of(tokenizer), mend=_TOGETHER)
            token_types = encoded["token_type_ids"][place] if types else None
            firsts = _first_subwords(encoded.word_ids(place), len(chunk["text"][index])) if words else None
            features.append(Feature(ids, token_types, words=firsts))
    return Encoded(features, frozenset(shortened), max_length)


def _using(tokenizer: Any) -> AbstractContextManager[None]:
    return blamed("the tokenizer cannot be used", _files_of(tokenizer), _TOGETHER)


def _files_of(tokenizer: Any) -> str | None:
    place = getattr(tokenizer, "name_or_path", None)
    return str(place) if place else None


def _vocabulary_size(config: Mapping[str, Any]) -> float:
    """How many tokens a model has an embedding of, as its configuration says; without end where it does not."""
    inner = config.get("text_config")  # of a model that sees images, too
    sizes = [part.get("vocab_size") for part in (config, inner) if isinstance(part, Mapping)]
    return max((size for size in sizes if isinstance(size, int) and size > 0), default=math.inf)


def _first_subwords(word_ids: Sequence[int | None], words: int) -> list[int]:
    """The place of each word's first sub-word; -1 where it has none, or was cut off."""
    firsts = [-1] * words
    for position, word in reversed(list(enumerate(word_ids))):
        if word is not None:
            firsts[word] = position
    return firsts


def _separate_words(tokenizer: Any) -> None:
    """Make byte-level tokenizers (RoBERTa, GPT-2) put the space before each word that the split took away."""
    before: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if getattr(before, "add_prefix_space", None) is False:
        before.add_prefix_space = True
