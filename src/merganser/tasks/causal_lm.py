"""Causal language modelling: each token predicted from those before it, scored by its likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.tasks.base import Metric, Problem, Task
from merganser.tasks.batches import Collation, Feature
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import padding_id
from merganser.tasks.tokens import Encoded


def nll(judgements: np.ndarray) -> float:
    """Mean negative log-likelihood of a token, in nats; judgements: (examples, 2) of sum and tokens."""
    total, tokens = judgements.sum(axis=0)
    return float(total / tokens) if tokens else float("nan")


def perplexity(judgements: np.ndarray) -> float:
    """The exponential of :func:`nll`: at least 1."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll(judgements)))


@dataclass(frozen=True)
class CausalLM(Task):
    """Text alone; key metric the mean negative log-likelihood, less is better."""

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    heads: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")
    problem: ClassVar[Problem | None] = "next_token"
    metrics: ClassVar[Mapping[str, Metric]] = {"nll": nll, "perplexity": perplexity}
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"nll", "perplexity"})
    ensembles: ClassVar[bool] = False
    wants: ClassVar[tuple[str, ...]] = ()
    label_role: ClassVar[str | None] = None

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> list[None]:
        """The texts are their own truth."""
        return [None] * len(rows)

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        config: Mapping[str, Any],
        columns: Columns,
        max_length: int,
        references: Sequence[Any] | None = None,
    ) -> Encoded:
        """Tokenise the texts; where ``references`` are given, the tokens are the labels."""
        encoded = super().encode(rows, tokenizer, config, columns, max_length)
        if references is None:
            return encoded
        return replace(encoded, features=[replace(f, labels=f.input_ids) for f in encoded.features])

    def collation(self, tokenizer: Any, config: Mapping[str, Any]) -> Collation:
        """No decoder beside the model itself."""
        return Collation(padding_id(tokenizer))

    def outputs(
        self, model: nn.Module, inputs: dict[str, Tensor], features: Sequence[Feature], tokenizer: Any
    ) -> list[np.ndarray]:
        """For each text its summed negative log-likelihood and its predicted tokens: float64 (2,)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode():
            logits = model(**inputs).logits
            found = []
            for row, tokens, real in zip(logits, ids, mask.sum(dim=1).tolist(), strict=True):
                # text by text: the log-probabilities of a whole batch would be as large again as the logits
                losses = functional.cross_entropy(row[: real - 1].float(), tokens[1:real], reduction="none")
                found.append(np.array([losses.double().sum().item(), real - 1], np.float64))
        return found

    def align(self, outputs: Sequence[np.ndarray], own: LabelSpace, space: LabelSpace) -> np.ndarray:
        """Sums and counts (examples, 2)."""
        return np.stack(list(outputs))

    def judge(self, aligned: np.ndarray, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Sums and counts (examples, 2)."""
        return aligned
