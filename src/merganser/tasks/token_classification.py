"""Token classification: a BIO tag for each word, scored by entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from merganser.errors import CheckpointError, DataError
from merganser.tasks.base import Metric, Task, mean_of_known
from merganser.tasks.batches import IGNORED, Feature
from merganser.tasks.columns import Columns, another_column, column_values
from merganser.tasks.data import Rows
from merganser.tasks.entities import OUTSIDE, count_entities, f1, is_bio, precision, recall
from merganser.tasks.labels import CHOOSE, LabelReader, LabelSpace, spread
from merganser.tasks.models import Opened
from merganser.tasks.tokens import Encoded, encode_words


@dataclass(frozen=True)
class TokenClassification(Task):
    """A tag for each word; key metric micro entity F1 (seqeval's definition).

    The first sub-word of a word carries its label and gives its prediction. Words beyond the maximum length
    are predicted ``O``, so that cutting never raises a score; the cut sequences are counted.
    """

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    heads = ("ForTokenClassification",)
    problem = "tokens"
    metrics: ClassVar[Mapping[str, Metric]] = {"f1": f1, "precision": precision, "recall": recall}
    needs = ("tokens",)
    wants = ()
    decoder_mask = None  # the token classifiers of encoder-decoder models leave the decoder out
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"label": ("ner_tags", "tags", "labels", "label")}

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> list[list[str]]:
        """The tags of each row's words."""
        column, words = columns.label or "tags", columns.tokens or "tokens"
        reader = LabelReader(space, rows.class_names.get(column))
        found = []
        values = zip(column_values(rows, column, "label"), column_values(rows, words, "tokens"), strict=True)
        for (tags, where), (tokens, _) in values:
            if not isinstance(tags, list | tuple) or not isinstance(tokens, list | tuple):
                raise DataError(f"{words!r} and {column!r} must both be lists", where=where, mend=CHOOSE)
            if len(tags) != len(tokens):
                mend = "give one tag for each word"
                raise DataError(f"{len(tokens)} words but {len(tags)} tags", where=where, mend=mend)
            found.append([space.names[reader.read(tag, where)] for tag in tags])
        return found

    def tokenise(
        self, rows: Rows, tokenizer: Any, config: Mapping[str, Any], columns: Columns, max_length: int
    ) -> Encoded:
        """The tokens of the words."""
        column = columns.tokens or "tokens"
        sentences = []
        for words, where in column_values(rows, column, "tokens"):
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise DataError(f"{column!r} is not a list of words", where=where, mend=another_column("tokens"))
            sentences.append(list(words))
        return encode_words(rows, sentences, tokenizer, config, max_length)

    def label(self, reference: Sequence[str], feature: Feature, space: LabelSpace) -> list[int]:
        """-100 except on the first sub-word of each word, which has the word's tag."""
        labels = [IGNORED] * len(feature.input_ids)
        for position, tag in zip(feature.words or (), reference, strict=True):
            if position >= 0:
                labels[position] = space.find(tag)
        return labels

    def outputs(
        self, model: nn.Module, inputs: dict[str, Tensor], features: Sequence[Feature], tokenizer: Any
    ) -> list[np.ndarray]:
        """The logits of each word's first sub-word, (words, tags) for each example; NaN for words cut off."""
        with torch.inference_mode():
            logits = model(**inputs).logits.float().cpu().numpy()
        found = []
        for row, feature in zip(logits, features, strict=True):
            places = np.array(feature.words or [], np.int64)
            by_word = np.full((len(places), row.shape[1]), np.nan, np.float32)
            by_word[places >= 0] = row[places[places >= 0]]
            found.append(by_word)
        return found

    def align(self, outputs: Sequence[np.ndarray], own: LabelSpace, space: LabelSpace) -> list[np.ndarray]:
        """Logits (words, tags of the space) for each example."""
        return [spread(logits, own, space) for logits in outputs]

    def combine(self, aligned: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """The mean of the logits word by word, whatever the models' tokenizers."""
        return [mean_of_known(np.stack(models)) for models in zip(*aligned, strict=True)]

    def judge(self, aligned: Sequence[np.ndarray], references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Right, predicted and true entities of each sequence: int64 (examples, 3)."""
        counts = [count_entities(_tags(logits, space), tags) for logits, tags in zip(aligned, references, strict=True)]
        return np.array(counts, np.int64).reshape(-1, 3)

    def by_label(self, aligned: Sequence[np.ndarray], references: Sequence[Any], space: LabelSpace) -> dict[str, float]:
        """Entity F1 of each type that occurs."""
        pairs = list(zip([_tags(logits, space) for logits in aligned], references, strict=True))
        kinds = sorted({tag[2:] for tags in references for tag in tags if tag != OUTSIDE})
        counts = {kind: [count_entities(_of(kind, found), _of(kind, true)) for found, true in pairs] for kind in kinds}
        return {kind: f1(np.array(counted)) for kind, counted in counts.items()}

    def check_scoring(self, opened: Opened) -> None:
        """Refuse a head whose outputs are not named by BIO tags."""
        wrong = [name for name in self.space(opened.config).names if not is_bio(name)]
        if wrong:
            what = f"entities cannot be scored: the model's labels are not BIO tags: {', '.join(wrong[:10])}"
            raise CheckpointError(what, where=opened.where, mend="name the outputs O, B-TYPE, I-TYPE in id2label")


def _tags(logits: np.ndarray, space: LabelSpace) -> list[str]:
    """The best tag of each word; O where nothing is known of it (it was cut off)."""
    known = np.where(np.isnan(logits), -np.inf, logits)
    best = known.argmax(axis=1) if len(known) else []
    return [space.names[place] if np.isfinite(row).any() else OUTSIDE for place, row in zip(best, known, strict=True)]


def _of(kind: str, tags: Sequence[str]) -> list[str]:
    """The tags of one type of entity."""
    return [tag if tag[2:] == kind else OUTSIDE for tag in tags]
