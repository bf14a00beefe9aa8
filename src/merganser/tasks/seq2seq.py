"""Sequence to sequence: a target text for a source text, scored by exact match of the generated text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from merganser.tasks.base import Config, Metric, Task, Truths
from merganser.tasks.batches import Feature
from merganser.tasks.columns import Columns, texts
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import quiet
from merganser.tasks.tokens import Encoded, encode_texts


def exact_match(judgements: np.ndarray) -> float:
    """The share of generated texts that are the target, white space aside. Judgements: bool (examples,)."""
    return float(judgements.mean()) if len(judgements) else 0.0


@dataclass(frozen=True)
class Seq2Seq(Task):
    """A target text; key metric exact match of greedy generation.

    Attributes:
        max_new_tokens: how many tokens are generated at most.
    """

    max_new_tokens: int = 64

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    heads = ("ForConditionalGeneration", "ForSeq2SeqLM")
    problem = "sequence"
    metrics: ClassVar[Mapping[str, Metric]] = {"exact_match": exact_match}
    needs: ClassVar[tuple[str, ...]] = ("text", "target")  # the decoder reads the target: collecting needs it, too
    wants = ()
    label_role = None
    decoder_mask = "labels"  # the decoder's tokens are the labels, moved by one
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("source", "input", "article", "document", "text", "question", "prompt", "sentence"),
        "target": ("target", "output", "summary", "highlights", "answer", "completion", "label"),
    }

    def fits(self, config: Mapping[str, Any]) -> bool:
        """An encoder-decoder over text (models of images end in ``ForConditionalGeneration``, too)."""
        return self.has_head(config) and config.get("model_type") in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> list[str]:
        """The targets."""
        return texts(rows, columns.target or "target", "target")

    def encode(
        self, rows: Rows, tokenizer: Any, config: Config, columns: Columns, max_length: int, references: Truths = None
    ) -> Encoded:
        """Tokenise source and target, each cut at ``max_length``; the target's tokens are the labels."""
        sources = super().encode(rows, tokenizer, config, columns, max_length)
        wanted = references if references is not None else self.references(rows, columns, LabelSpace(()))
        targets = encode_texts(rows, wanted, None, tokenizer, config, max_length, target=True)
        features = [
            replace(source, labels=target.input_ids)
            for source, target in zip(sources.features, targets.features, strict=True)
        ]
        return replace(sources, features=features, cut=sources.cut | targets.cut)

    def outputs(
        self, model: nn.Module, inputs: dict[str, Tensor], features: Sequence[Feature], tokenizer: Any
    ) -> list[str]:
        """The generated texts."""
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        generator: Any = model
        with torch.inference_mode(), quiet():
            ids = generator.generate(**asked, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))

    def align(self, outputs: Sequence[str], own: LabelSpace, space: LabelSpace) -> list[str]:
        """Texts, white space evened out."""
        return [" ".join(text.split()) for text in outputs]

    def combine(self, aligned: Sequence[Sequence[str]]) -> list[str]:
        """The majority vote over the generated texts; between equals, the first model's."""
        return [Counter(votes).most_common(1)[0][0] for votes in zip(*aligned, strict=True)]

    def judge(self, aligned: Sequence[str], references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Whether each text is the target: bool (examples,)."""
        return np.array([text == " ".join(str(true).split()) for text, true in zip(aligned, references, strict=True)])
