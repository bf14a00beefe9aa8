"""Causal language modelling: each token predicted from those before it, scored by its likelihood.

A text is a column of text, a prompt with its completion, or a chat: a list of messages, each with ``role`` and
``content``, which the tokenizer's chat template makes a text of. Of a model that sees images, too, the text part alone
is run, on its own class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from merganser.errors import CheckpointError, DataError
from merganser.tasks.base import Config, Metric, Task, architecture
from merganser.tasks.batches import Feature
from merganser.tasks.columns import USUAL, Columns, another_column, column_values, resolve, texts
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import first_line
from merganser.tasks.tokens import Encoded, encode_texts


def nll(judgements: np.ndarray) -> float:
    """Mean negative log-likelihood of a token, in nats; judgements: (examples, 3) of sum, tokens and right ones."""
    total, tokens, _ = judgements.sum(axis=0)
    return float(total / tokens) if tokens else float("nan")


def perplexity(judgements: np.ndarray) -> float:
    """The exponential of :func:`nll`: at least 1."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll(judgements)))


def accuracy(judgements: np.ndarray) -> float:
    """The share of tokens that the model finds the likeliest; judgements as of :func:`nll`."""
    _, tokens, right = judgements.sum(axis=0)
    return float(right / tokens) if tokens else float("nan")


@dataclass(frozen=True)
class CausalLM(Task):
    """Text alone, which is its own truth; key metric the mean negative log-likelihood, less is better."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    problem = "next_token"
    metrics: ClassVar[Mapping[str, Metric]] = {"nll": nll, "perplexity": perplexity, "accuracy": accuracy}
    lower_is_better = frozenset({"nll", "perplexity"})
    ensembles = False
    wants = ()
    label_role = None
    decoder_mask = None
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": (*USUAL["text"], "messages", "prompt")}

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """A decoder over text, alone or beside images."""
        return super().has_head(config) or _sees_images(config)

    def model_class(self, config: Mapping[str, Any]) -> str:
        """That of a decoder over text, or of one that sees images, too."""
        return "AutoModelForImageTextToText" if _sees_images(config) else self.auto_class

    def columns(self, rows: Rows, given: Columns, *, labelled: bool = True) -> Columns:
        """The text, and the completion of a prompt."""
        roles = ("text", "target") if given.target is not None else ("text",)
        found = resolve(rows, given, roles, (), self.usual)
        if found.text == "prompt" and found.target is None and "completion" in rows.columns:
            found = replace(found, target="completion")
        return found

    def tokenise(self, rows: Rows, tokenizer: Any, config: Config, columns: Columns, max_length: int) -> Encoded:
        """The tokens of the texts; those of chats have the special tokens of their template, and no others."""
        first = list(column_values(rows, columns.text or "text", "text"))
        chats = [isinstance(value, list) for value, _ in first]
        if any(chats) and not all(chats):
            where = first[chats.index(False)][1]
            raise DataError("some rows hold a chat, this one does not", where=where, mend=another_column("text"))
        if not any(chats):
            whole = texts(rows, columns.text or "text")
            if columns.target is not None:
                ends = texts(rows, columns.target, "target")
                whole = [start + end for start, end in zip(whole, ends, strict=True)]
            return encode_texts(rows, whole, None, tokenizer, config, max_length)
        messages = [value for value, _ in first]
        if columns.target is not None:
            ends = [value for value, _ in column_values(rows, columns.target, "target")]
            messages = [start + _as_messages(end) for start, end in zip(messages, ends, strict=True)]
        places = [where for _, where in first]
        whole = [_chat(chat, tokenizer, where) for chat, where in zip(messages, places, strict=True)]
        return encode_texts(rows, whole, None, tokenizer, config, max_length, special=False)

    def label(self, reference: Any, feature: Feature, space: LabelSpace) -> list[int]:
        """The tokens of the text."""
        return feature.input_ids

    def outputs(
        self, model: nn.Module, inputs: dict[str, Tensor], features: Sequence[Feature], tokenizer: Any
    ) -> list[np.ndarray]:
        """For each text its summed negative log-likelihood, its predicted tokens and the right ones: float64 (3,)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode():
            logits = model(**inputs).logits
            found = []
            for row, tokens, real in zip(logits, ids, mask.sum(dim=1).tolist(), strict=True):
                # text by text: the log-probabilities of a whole batch would be as large again as the logits
                said, truth = row[: real - 1].float(), tokens[1:real]
                losses = functional.cross_entropy(said, truth, reduction="none")
                right = (said.argmax(dim=-1) == truth).sum().item()
                found.append(np.array([losses.double().sum().item(), real - 1, right], np.float64))
        return found


def _sees_images(config: Mapping[str, Any]) -> bool:
    """Whether the architecture is a decoder over text and images."""
    known = config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return known and architecture(config).endswith("ForConditionalGeneration") and not config.get("is_encoder_decoder")


def _as_messages(completion: Any) -> list[Any]:
    """A completion of a chat as messages: some corpora give its text alone."""
    return completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]


def _chat(messages: list[Any], tokenizer: Any, where: str) -> str:
    """A chat as the model reads it."""
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            what = f"a message of a chat is {str(message)[:60]!r}, which has not a role and a content"
            raise DataError(what, where=where, mend=another_column("text"))
    if not getattr(tokenizer, "chat_template", None):
        what = "the data hold chats, and the tokenizer has no chat template"
        mend = "put the model's chat_template.jinja beside its tokenizer, or choose a column of text with --text-column"
        raise CheckpointError(what, where=getattr(tokenizer, "name_or_path", None), mend=mend)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template says no in its own ways
        what = f"the chat template refuses this chat: {first_line(error)}"
        raise DataError(what, where=where, mend="correct the row, or remove it") from None
