"""What a loaded model says of rows: tokenise, batch, run, align to a label space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from merganser.errors import CheckpointError
from merganser.tasks.base import Task
from merganser.tasks.batches import Feature, make_batches
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import blamed, choose_length

_TRUTHS = ("labels", "decoder_attention_mask")  # what a model that is asked must not see


@dataclass(frozen=True)
class Prediction:
    """What a model said of a data set.

    Attributes:
        aligned: what :meth:`Task.align` made of its outputs.
        truncated: how many examples were longer than ``max_length`` and were cut.
        max_length: in tokens.
    """

    aligned: Any
    truncated: int
    max_length: int


def predict(
    model: nn.Module,
    tokenizer: Any,
    config: Mapping[str, Any],
    task: Task,
    rows: Rows,
    columns: Columns,
    space: LabelSpace | None = None,
    *,
    name: str = "model",
    batch_size: int = 32,
    max_length: int | None = None,
    bar: Any = None,
) -> Prediction:
    """Run a model on rows.

    Args:
        model: in eval mode, on its device.
        tokenizer: of the model.
        config: its ``config.json``.
        task: of the data.
        rows: the data; truths are not read.
        columns: as :meth:`Task.columns` found them.
        space: the labels to align the outputs to; the model's own by default.
        name: of the model, for messages.
        batch_size: examples in a batch.
        max_length: tokens at which a text is cut; by default 128, and never more than the model takes.
        bar: a progress bar, advanced by examples.

    Raises:
        CheckpointError: outputs that are not finite.
        DataError: a text that is missing or malformed, with file and line.
    """
    own = task.space(config)
    length = choose_length(max_length, config, tokenizer, pairs=columns.text_pair is not None)
    encoded = task.encode(rows, tokenizer, config, columns, length)
    batches = make_batches(encoded.features, task.collation(tokenizer, config), batch_size)
    place = next(model.parameters()).device
    outputs: list[Any] = [None] * len(encoded.features)  # in the order of the data
    for indices, tensors in batches:
        inputs = {key: value.to(place) for key, value in tensors.items() if key not in _TRUTHS}
        with blamed("the model cannot be run", name, "check that config.json, weights and tokenizer belong together"):
            found = task.outputs(model, inputs, [encoded.features[index] for index in indices], tokenizer)
        for index, output in zip(indices, found, strict=True):
            outputs[index] = output
        if bar is not None:
            bar.update(len(indices))
    _check_finite(outputs, encoded.features, name, rows)
    return Prediction(task.align(outputs, own, space or own), encoded.truncated, length)


def _check_finite(outputs: Sequence[Any], features: Sequence[Feature], name: str, rows: Rows) -> None:
    for index, (output, feature) in enumerate(zip(outputs, features, strict=True)):
        if isinstance(output, np.ndarray):
            seen = output if feature.words is None else output[np.array(feature.words, np.int64) >= 0]
            if not np.isfinite(seen).all():
                what = f"the model's outputs are not finite ({rows.where(index)})"
                raise CheckpointError(what, where=name, mend="look for NaN in the weights with merganser inspect")
