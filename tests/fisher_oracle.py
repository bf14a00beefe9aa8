"""Fisher information by its definition: plain autograd, one example and one outcome at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conftest import ARCHITECTURES
from merganser.checkpoints import open_checkpoint
from statistics_examples import Example, alone

#: Logits of an example to the probability and the log-likelihood of each outcome.
LogLikelihoods = Callable[[Tensor, Example], Iterator[tuple[float, Tensor]]]


def build(tmp_path: Path, architecture: str, model_class: Any, **config: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = model_class(ARCHITECTURES[architecture][0](**config)).eval()
    with torch.no_grad():  # as initialised, all predictions are uniform
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return model, open_checkpoint(tmp_path)


def brute_force(model: nn.Module, examples: list[Example], outcomes: LogLikelihoods) -> dict[str, Tensor]:
    """mean over examples of Σ_y p(y|x) (∂ log p(y|x)/∂θ)², by parameter name, float64."""
    model = model.double()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        batch = alone(model, example)
        labels = batch.pop("labels", None)
        if model.config.is_encoder_decoder:
            batch["labels"] = labels
        for probability, log_likelihood in outcomes(model(**batch).logits[0], example):
            model.zero_grad()
            log_likelihood.backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] += probability * parameter.grad**2
    model.zero_grad()
    model.float()
    return {name: value / len(examples) for name, value in total.items()}
