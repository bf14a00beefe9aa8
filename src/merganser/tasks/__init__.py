"""Tasks: columns of the data, a model head, metrics; one file each. A new one is registered below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merganser.errors import UserError, did_you_mean
from merganser.tasks.base import Task, architecture
from merganser.tasks.causal_lm import CausalLM
from merganser.tasks.classification import TextClassification
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows, read_rows
from merganser.tasks.embedding import STS, Retrieval
from merganser.tasks.feature_extraction import FeatureExtraction
from merganser.tasks.images import ImageFeatures, ImageTextFeatures
from merganser.tasks.multi_label import MultiLabel
from merganser.tasks.regression import Regression
from merganser.tasks.seq2seq import Seq2Seq
from merganser.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Columns", "Rows", "Task", "read_rows", "task_for"]

_ALL = (
    MultiLabel, Regression, TextClassification, TokenClassification, Seq2Seq, CausalLM, ImageFeatures,
    ImageTextFeatures, FeatureExtraction, STS, Retrieval,
)  # fmt: skip
#: Every task by name. ``task_for("auto", …)`` asks them in this order.
TASKS: dict[str, Task] = {task.name: task() for task in _ALL}


def task_for(task: str | Task, config: Mapping[str, Any], **options: Any) -> Task:
    """A task by name, or the one that a model was made for.

    Args:
        task: a name of :data:`TASKS`, ``auto``, or a task itself.
        config: the model's ``config.json``; ``auto`` decides by its ``architectures`` and ``problem_type``.
        options: of the task, such as ``threshold_on`` of ``multi-label``.

    Raises:
        UserError: an unknown name or option, or an architecture that no task is made for.
    """
    if isinstance(task, Task):
        return task.with_options(options)
    if task == "auto":
        found = next((known for known in TASKS.values() if known.fits(config)), None)
        if found is None:
            what = f"no task is known for the architecture {architecture(config) or '(none is named)'}"
            raise UserError(what, where="config.json", mend=f"name the task with --task: {', '.join(TASKS)}")
        return found.with_options(options)
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}", where="--task", mend=did_you_mean(task, ["auto", *TASKS]))
    return TASKS[task].with_options(options)
