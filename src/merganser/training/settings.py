"""Hyper-parameters of a training, and the published ones of the experiments as one table.

defaults("roberta", "emotion")                       defaults("RobertaForMaskedLM", "ner")
defaults("bert", "glue").model_copy(update={"epochs": 1})
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from merganser.errors import UserError, validated

Schedule = Literal["linear", "polynomial"]
Reweight = Literal["none", "sqrt-inverse"]
Batching = Literal["shuffled", "by-length"]

#: Where transformers' polynomial schedule ends; it takes no rate that is not above it.
POLYNOMIAL_END = 1e-7


class LoraSettings(BaseModel):
    """The adapter that is trained in place of a model's weights (Hu et al. 2022); its head is trained as a whole.

    Attributes:
        rank: of each change ΔW = (alpha / rank) BA.
        alpha: see there.
        targets: last names of the linear layers that are adapted, such as ``query``; none for all of the base model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class TrainingSettings(BaseModel):
    """How a model is trained: AdamW in float32, gradients clipped at norm 1.

    Attributes:
        learning_rate: the peak of the schedule.
        epochs: passes over the data; a fraction is allowed.
        max_steps: optimiser steps in all; overrides ``epochs``.
        batch_size: examples in a step (on each device).
        schedule: how the learning rate falls after the warm-up: ``linear`` to 0, or transformers'
            ``polynomial`` (of power 1, to 1e-7).
        warmup: the share of the steps over which the learning rate rises, 0 or more and below 1.
        weight_decay: of all weights but biases and norms.
        max_length: tokens at which a text is cut; never more than the model takes.
        reweight: ``sqrt-inverse`` weighs the loss by the square root of inverse label frequency, so that rare
            labels weigh more; see :mod:`merganser.training.losses`.
        best_epoch: keep the weights of the epoch with the best score on development data, not the last ones.
        batching: ``shuffled``, or ``by-length``: texts of similar length together, in a random order.
        lora: train an adapter of this kind; None for all weights, and then it is not written down either, so that
            what was trained before there were adapters keeps its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-5
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    schedule: Schedule = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    max_length: Annotated[int, Field(ge=1)] = 128
    reweight: Reweight = "none"
    best_epoch: bool = False
    batching: Batching = "shuffled"
    lora: LoraSettings | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "lora" or value is not None}

    @model_validator(mode="after")
    def _falls(self) -> TrainingSettings:
        if self.schedule == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"the polynomial schedule falls to {POLYNOMIAL_END:g}, so that a learning_rate of "
                f"{self.learning_rate:g} cannot fall: give a higher one, or schedule: linear"
            )
        return self


def make_settings(where: str = "training", /, **values: Any) -> TrainingSettings:
    """Settings from what a user gave.

    Args:
        where: the place of the values in a configuration, for messages.
        values: hyper-parameters by name.

    Raises:
        UserError: unknown names and values out of their range, all at once.
    """
    return validated(TrainingSettings, values, where, UserError)


def with_changes(settings: TrainingSettings, *layers: Mapping[str, Any], where: str = "training") -> TrainingSettings:
    """Settings with a user's changes, each layer over those before it.

    Epochs that a layer names beat a ``max_steps`` of what lies below it, such as the published one.

    Raises:
        UserError: see :func:`make_settings`.
    """
    values = settings.model_dump()
    for layer in layers:
        if layer.get("epochs") is not None:
            values["max_steps"] = None
        values.update(layer)
    return make_settings(where, **values)


_LONG = {"epochs": 20, "schedule": "polynomial", "warmup": 0.06, "best_epoch": True}
_GLUE = {"learning_rate": 2e-5, "epochs": 3}

#: (model type, suite) -> what differs from :class:`TrainingSettings`' own defaults. Batches are of 16 and
#: texts are cut at 128 tokens everywhere. Left open by the paper and chosen here: the schedules of T5 and of
#: GLUE (linear, no warm-up), the learning rate of DeBERTa by suite (6e-6 or 1e-5 is all that it says), and
#: DistilBERT's partitions (its learning rate on GLUE, RoBERTa's epochs: 1,000 examples are few).
PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("roberta", "emotion"): {"learning_rate": 1e-5, **_LONG},
    ("roberta", "ner"): {"learning_rate": 1e-5, **_LONG},
    ("roberta", "glue"): _GLUE,
    ("roberta", "partitions"): {"learning_rate": 1e-5, "epochs": 30},
    ("deberta-v2", "emotion"): {"learning_rate": 6e-6, "reweight": "sqrt-inverse", **_LONG},
    ("deberta-v2", "ner"): {"learning_rate": 1e-5, "reweight": "sqrt-inverse", **_LONG},
    ("distilbert", "glue"): _GLUE,
    ("distilbert", "partitions"): {"learning_rate": 2e-5, "epochs": 30},
    ("t5", "emotion-t5"): {"learning_rate": 1e-4, "max_steps": 50_000},
}

_ARCHITECTURE = re.compile(r"(Roberta|DebertaV2|DistilBert|T5)(Model|EncoderModel|Encoder|For\w+)")
_TYPES = {"Roberta": "roberta", "DebertaV2": "deberta-v2", "DistilBert": "distilbert", "T5": "t5"}


def defaults(architecture_or_model_type: str, suite: str) -> TrainingSettings:
    """The settings to train a model of a suite with: those of the paper where it has some.

    For any other pair (BERT, MiniLM, GPT-2, a suite of one's own): rate 5e-5, 3 epochs, linear decay.

    Args:
        architecture_or_model_type: ``architectures[0]`` or ``model_type`` of a ``config.json``.
        suite: ``emotion``, ``emotion-t5``, ``ner``, ``glue``, ``partitions``, …
    """
    match = _ARCHITECTURE.fullmatch(architecture_or_model_type)
    model_type = _TYPES[match[1]] if match else architecture_or_model_type
    return TrainingSettings(**PUBLISHED.get((model_type, suite), {}))
