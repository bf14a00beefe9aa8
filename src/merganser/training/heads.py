"""What a training starts from: a base model with the head that the task needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from merganser.checkpoints import QuantisedCheckpoint
from merganser.checkpoints.layers import load_config
from merganser.errors import CheckpointError, DataError, UserError
from merganser.tasks.base import Task
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import (
    Opened,
    first_line,
    from_pretrained,
    load_model,
    load_tokenizer,
    open_model,
    prepare_padding,
    quiet,
)

#: Task.problem -> ``problem_type`` in the configuration; tasks that are not here keep the pretrained head.
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "tokens": None,
}
_MAPPINGS = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


@dataclass(frozen=True)
class Start:
    """A base model before its weights are loaded.

    Attributes:
        opened: the base.
        task: what it is to learn.
        labels: the head's outputs; empty for tasks that keep the pretrained head.
        keeps_head: whether the base's own head is kept, as it has these labels.
        config: the base's ``config.json`` with the labels.
        tokenizer: of the base.
    """

    opened: Opened
    task: Task
    labels: tuple[str, ...]
    keeps_head: bool
    config: Mapping[str, Any]
    tokenizer: Any


def open_start(base: str | Path, task: Task, labels: Sequence[str] = (), *, allow_pickle: bool = False) -> Start:
    """Find out, from the headers alone, what a training of ``task`` starts from.

    Args:
        base: a model folder or a Hub name.
        task: see :mod:`merganser.tasks`.
        labels: the head's outputs in order. A base that has the task's head and these labels keeps its head;
            no labels mean those of the base's own head.
        allow_pickle: accept a base whose weights are pickled (read with ``weights_only``).

    Raises:
        CheckpointError: the base cannot be used.
        DataError: labels that are missing or repeated.
        UserError: a task that has nothing to learn.
    """
    if task.problem is None:
        raise UserError(f"{task.name} has nothing to learn", where="task", mend="choose a task with labels or targets")
    opened = open_model(base, allow_pickle=allow_pickle)
    config = dict(opened.config)
    if task.problem not in PROBLEM_TYPES:
        task.check_head(opened)
        return Start(opened, task, (), True, config, load_tokenizer(opened))
    own = LabelSpace.of(config).names if task.has_head(config) else ()
    names = tuple(labels) if not isinstance(labels, str) else (labels,)
    if not names:
        names = ("LABEL_0",) if task.problem == "regression" else own
    _check_labels(names, task)
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    config["problem_type"] = PROBLEM_TYPES[task.problem]
    keeps = own == names or (task.problem == "regression" and len(own) == 1)
    return Start(opened, task, names, keeps, config, load_tokenizer(opened))


def _check_labels(labels: Sequence[str], task: Task) -> None:
    least, most, wanted = 2, math.inf, "at least two distinct names"
    if task.problem == "regression":
        least, most, wanted = 1, 1, "one name"
    elif task.problem == "multi_label":
        least, wanted = 1, "distinct names"
    if (
        not least <= len(labels) <= most
        or len(set(labels)) < len(labels)
        or not all(isinstance(n, str) for n in labels)
    ):
        mend = "name every label once"
        raise DataError(f"labels of {task.name} must be {wanted}, but are {list(labels)!r}", mend=mend)


def load_start(start: Start, seed: int, folder: Path | None = None, *, allow_pickle: bool = False) -> Any:
    """The model in float32, a new head drawn from ``seed``; the global random state is seeded.

    The draws depend on the architecture and the labels only, not on what head the base had before.

    Args:
        start: what :func:`open_start` returned.
        seed: of what is not in the base.
        folder: load this checkpoint of an earlier training instead of the base.
        allow_pickle: accept a base whose weights are pickled.

    Raises:
        CheckpointError: weights that do not fit the architecture.
    """
    transformers.set_seed(seed)
    task, opened = start.task, start.opened
    if task.problem not in PROBLEM_TYPES:
        source = opened if folder is None else open_model(folder)
        return load_model(source, task.model_class(source.config), complete=task.complete, allow_pickle=allow_pickle)
    opened.checkpoint.fetch()
    place = opened.root / opened.subfolder if folder is None else folder
    try:
        with quiet():
            dequantised = folder is None and isinstance(opened.checkpoint, QuantisedCheckpoint)
            config: Any = (
                load_config(opened.checkpoint)
                if dequantised
                else transformers.AutoConfig.from_pretrained(str(place), trust_remote_code=False)
            )
            config.id2label = dict(enumerate(start.labels))
            config.label2id = {name: index for index, name in enumerate(start.labels)}
            config.problem_type = start.config["problem_type"]
            keep = start.keeps_head or folder is not None
            model = _load_head(start, config, place, keep=keep, allow_pickle=allow_pickle)
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged weights or a stranger's configuration provoke
        what = f"cannot be loaded for {task.name}: {first_line(error)}"
        mend = "give a model folder with config, safetensors weights and tokenizer, or a Hub name"
        raise CheckpointError(what, where=str(place), mend=mend) from None
    prepare_padding(model, start.tokenizer)
    return model


def _load_head(start: Start, config: Any, place: Path, *, keep: bool, allow_pickle: bool) -> Any:
    """The architecture with the task's head; where it is not to be kept, the base's own head is left out."""
    auto_class = start.task.model_class(start.config)
    checkpoint = start.opened.checkpoint
    if not keep:
        model_class: Any = getattr(transformers, _MAPPINGS[auto_class])[type(config)]
        prefix = f"{model_class.base_model_prefix}."
        inner = [name for name in checkpoint.tensors if name.startswith(prefix)]
        if 0 < len(inner) < len(checkpoint.tensors):
            tensors = {name: checkpoint.read(name) for name in inner}
            return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    if place == start.opened.root / start.opened.subfolder:
        return from_pretrained(start.opened, auto_class, allow_pickle, config=config)
    return getattr(transformers, auto_class).from_pretrained(
        str(place),
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=None if allow_pickle else True,
    )
