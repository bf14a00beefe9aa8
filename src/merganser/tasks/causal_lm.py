"""Causal language modelling: each token predicted from those before it, scored by its likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.tasks.base import Metric, Task
from merganser.tasks.batches import Feature
from merganser.tasks.labels import LabelSpace


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
    """Text alone, which is its own truth; key metric the mean negative log-likelihood, less is better."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    problem = "next_token"
    metrics: ClassVar[Mapping[str, Metric]] = {"nll": nll, "perplexity": perplexity}
    lower_is_better = frozenset({"nll", "perplexity"})
    ensembles = False
    wants = ()
    label_role = None
    decoder_mask = None

    def label(self, reference: Any, feature: Feature, space: LabelSpace) -> list[int]:
        """The tokens of the text."""
        return feature.input_ids

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
