"""From texts to tokens: cut at a length that is counted, token types kept where the model has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.errors import CheckpointError, DataError
from merganser.tasks.batches import Feature
from merganser.tasks.data import Rows

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

    Raises:
        DataError: a text without a single token, with its file and line.
    """
    types = has_token_types(config)
    features: list[Feature] = []
    shortened: set[int] = set()
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        seconds = None if pairs is None else list(pairs[start : start + _CHUNK])
        whole = _tokenise(tokenizer, chunk, seconds, types, target)
        long = [index for index, feature in enumerate(whole) if len(feature.input_ids) > max_length]
        if long:
            cut = _tokenise(
                tokenizer,
                [chunk[index] for index in long],
                None if seconds is None else [seconds[index] for index in long],
                types,
                target,
                max_length,
            )
            for index, feature in zip(long, cut, strict=True):
                whole[index] = feature
                shortened.add(start + index)
        for offset, feature in enumerate(whole):
            if not feature.input_ids:
                raise no_tokens(rows, start + offset)
        features += whole
    return Encoded(features, frozenset(shortened), max_length)


def no_tokens(rows: Rows, index: int) -> DataError:
    """The error of a text that the tokenizer makes nothing of."""
    return DataError("the text has no tokens", where=rows.where(index), mend="remove the row, or give it a text")


def _tokenise(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, types: bool, target: bool, max_length: int | None = None
) -> list[Feature]:
    given = {"text_target": texts} if target else {"text": texts, "text_pair": pairs}
    cut = {"truncation": False} if max_length is None else {"truncation": "longest_first", "max_length": max_length}
    encoded = tokenizer(
        **given, **cut, padding=False, return_attention_mask=False, return_token_type_ids=types, verbose=False
    )
    type_rows = encoded["token_type_ids"] if types else [None] * len(texts)
    return [Feature(ids, token_types) for ids, token_types in zip(encoded["input_ids"], type_rows, strict=True)]


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
        raise CheckpointError(
            f"token classification needs a fast tokenizer, not {type(tokenizer).__name__}",
            where=getattr(tokenizer, "name_or_path", None),
            mend="put the model's tokenizer.json beside the weights",
        )
    _separate_words(tokenizer)
    types = has_token_types(config)
    features: list[Feature] = []
    shortened: set[int] = set()
    for start in range(0, len(sentences), _CHUNK):
        chunk = [list(words) for words in sentences[start : start + _CHUNK]]
        options = {"is_split_into_words": True, "padding": False, "return_token_type_ids": types, "verbose": False}
        whole = tokenizer(chunk, truncation=False, **options)
        long = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
        cut = tokenizer([chunk[i] for i in long], truncation=True, max_length=max_length, **options) if long else None
        shortened |= {start + index for index in long}
        for index, words in enumerate(chunk):
            source, place = (cut, long.index(index)) if cut is not None and index in long else (whole, index)
            ids = source["input_ids"][place]
            if not ids:
                raise no_tokens(rows, start + index)
            firsts = [-1] * len(words)
            for position, word in reversed(list(enumerate(source.word_ids(place)))):
                if word is not None:
                    firsts[word] = position
            features.append(Feature(ids, source["token_type_ids"][place] if types else None, None, firsts))
    return Encoded(features, frozenset(shortened), max_length)


def _separate_words(tokenizer: Any) -> None:
    """Make byte-level tokenizers (RoBERTa, GPT-2) put the space before each word that the split took away."""
    before: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if getattr(before, "add_prefix_space", None) is False:
        before.add_prefix_space = True
