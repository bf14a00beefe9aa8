"""Fine-tune a model for any task with transformers' Trainer, unpatched.

    from merganser.training import TrainingSettings, train
    train("org/encoder", MultiLabel(), rows, labels=["joy", "fear"], output="specialist", settings=settings)

The same arguments on the same machine give the same bytes. Several classifiers that are to be merged can start from one
base with one head: :func:`prepare_base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merganser.tasks.base import Task
from merganser.tasks.classification import TextClassification
from merganser.tasks.data import Rows
from merganser.tasks.models import quiet
from merganser.training.heads import load_start, open_start
from merganser.training.loop import OnStep
from merganser.training.multitask import Trained, train_multitask
from merganser.training.outputs import new_trained, trained_output
from merganser.training.prepare import GivenColumns, TrainingPart
from merganser.training.settings import TrainingSettings


def train(
    base: str | Path,
    task: Task,
    rows: Rows,
    *,
    labels: Sequence[str] = (),
    output: str | Path,
    settings: TrainingSettings,
    seed: int = 1,
    dev: Rows | None = None,
    metric: str | None = None,
    columns: GivenColumns = None,
    head_seed: int | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Trained:
    """Train all weights of ``base`` and save a plain ``from_pretrained`` folder in float32.

    Labels that are not annotated (NaN in multi-label data) do not enter the loss. The global random state is
    seeded.

    Args:
        base: a model folder or a Hub name. A head of the same labels is kept; otherwise a new one is drawn.
            Sequence to sequence and causal tasks keep the pretrained language-modelling head.
        task: see :mod:`merganser.tasks`.
        rows: the training data.
        labels: the head's outputs in order; by default those of the base's own head.
        output: the folder to write, whole or not at all.
        settings: hyper-parameters.
        seed: of the order of the examples and of dropout.
        dev: development data, scored after each epoch. ``settings.best_epoch`` needs them; of epochs with
            equal scores it keeps the earliest.
        metric: of the development score; by default the task's key metric.
        columns: names of the columns; what is not given is found by its usual name.
        head_seed: of a new head; by default ``seed``.
        work: a folder for checkpoints after each epoch, from which the same training, killed, goes on to the
            same weights. What it holds of another training is removed; it is removed at the end.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        allow_pickle: accept a base whose weights are pickled (read with ``weights_only``).
        overwrite: replace what an earlier training has written; nothing else is ever replaced.
        on_step: called with (steps done, steps in all); without it there is a progress bar on standard error.

    Raises:
        CheckpointError: the base cannot be used, or the output exists.
        DataError: data that do not fit the task, or a loss that is not finite.
        UserError: a setting that does not fit, or ``accelerate``, which the Trainer needs, is not installed.
    """
    trained = train_multitask(
        base,
        [TrainingPart("model", task, rows, labels, dev, metric, columns)],
        shared=True,
        output=output,
        settings=settings,
        seed=seed,
        head_seed=head_seed,
        work=work,
        device=device,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        on_step=on_step,
    )
    if (metric or task.key_metric) in task.lower_is_better:
        return replace(trained, dev_scores=tuple(-score for score in trained.dev_scores))
    return trained


def prepare_base(
    base: str | Path, *, label_names: Sequence[str], output: str | Path, seed: int = 1, overwrite: bool = False
) -> Path:
    """Save ``base`` with a classification head drawn from ``seed``: the common start of several specialists.

    Args:
        base: a model folder or a Hub name.
        label_names: the classes, in the order of the head's outputs.
        output: the folder to write: safetensors in float32, config with the label names, tokenizer.
        seed: of the head (the global random state is seeded with it).
        overwrite: replace what an earlier training has written; nothing else is ever replaced.

    Raises:
        CheckpointError: the base cannot be loaded, or the output exists.
        DataError: fewer than two label names, or a repeated one.
    """
    output = Path(output)
    place = trained_output(output, [base], overwrite=overwrite)
    place.raise_problem()
    with new_trained(place) as temporary, quiet():
        start = open_start(base, TextClassification(), label_names)
        load_start(start, seed).save_pretrained(temporary)
        start.tokenizer.save_pretrained(temporary)
    return output
