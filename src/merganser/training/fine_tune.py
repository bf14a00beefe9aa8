"""Fine-tune a model for any task with transformers' Trainer, unpatched.

    from merganser.training import TrainingSettings, train
    train("org/encoder", MultiLabel(), rows, labels=["joy", "fear"], output="specialist", settings=settings)

The same arguments on the same machine give the same bytes. Several classifiers that are to be merged can start from one
base with one head: :func:`prepare_base`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merganser.checkpoints.writer import check_output
from merganser.errors import require
from merganser.files import new_folder
from merganser.tasks.base import Task
from merganser.tasks.classification import TextClassification
from merganser.tasks.data import Rows
from merganser.tasks.models import quiet
from merganser.training.heads import Start, load_start, open_start
from merganser.training.loop import Examples, OnStep, Ran, Run, run_trainer
from merganser.training.prepare import GivenColumns, prepare
from merganser.training.resume import clear, fingerprint, take_up
from merganser.training.settings import TrainingSettings

_SCRATCH = ".training"


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        path: the model folder.
        dev_scores: the score on development data after each epoch; empty where there were none.
        best_epoch: the epoch that was kept, counted from 1; None where it is simply the last.
        loss: the mean training loss of the epoch that was kept.
    """

    path: Path
    dev_scores: tuple[float, ...]
    best_epoch: int | None
    loss: float


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
        overwrite: replace an existing output.
        on_step: called with (steps done, steps in all); without it there is a progress bar on standard error.

    Raises:
        CheckpointError: the base cannot be used, or the output exists.
        DataError: data that do not fit the task, or a loss that is not finite.
        UserError: a setting that does not fit, or ``accelerate``, which the Trainer needs, is not installed.
    """
    output = Path(output)
    require("train", "training", "accelerate")
    check_place(output, base, overwrite)
    with quiet(), new_folder(output, overwrite=overwrite) as temporary:
        prepared = prepare(
            base,
            task,
            rows,
            labels,
            settings,
            dev=dev,
            metric=metric,
            columns=columns,
            check=partial(_save_tokenizer, temporary),
            allow_pickle=allow_pickle,
        )
        start, drawn = prepared.start, seed if head_seed is None else head_seed
        scratch, resume = temporary / _SCRATCH, None
        if work is not None:
            scratch = Path(work)
            key = fingerprint([(start, rows, dev)], settings, (seed, drawn, metric, str(columns)))
            resume = take_up(scratch, key)
        model = load_start(start, drawn, resume, allow_pickle=allow_pickle)
        saved_cache = _use_cache(model)
        run = Run(
            name=output.name,
            settings=settings,
            seed=seed,
            scratch=scratch,
            save=partial(save_model, model, saved_cache),
            score=None if dev is None else partial(prepared.score, model, settings),
            higher_is_better=prepared.higher_is_better,
            whole=work is not None,
            resume=resume,
            loss=prepared.loss,
            device=device,
            on_step=on_step,
        )
        ran = run_trainer(run, model, Examples(prepared.features), prepared.collate)
        keep(ran, run, temporary)
        shutil.rmtree(temporary / _SCRATCH, ignore_errors=True)
    if work is not None:
        clear(Path(work))
    return Trained(output, ran.scores, None if ran.best is None else ran.best + 1, kept_loss(ran))


def prepare_base(
    base: str | Path, *, label_names: Sequence[str], output: str | Path, seed: int = 1, overwrite: bool = False
) -> Path:
    """Save ``base`` with a classification head drawn from ``seed``: the common start of several specialists.

    Args:
        base: a model folder or a Hub name.
        label_names: the classes, in the order of the head's outputs.
        output: the folder to write: safetensors in float32, config with the label names, tokenizer.
        seed: of the head (the global random state is seeded with it).
        overwrite: replace an existing output.

    Raises:
        CheckpointError: the base cannot be loaded, or the output exists.
        DataError: fewer than two label names, or a repeated one.
    """
    output = Path(output)
    check_place(output, base, overwrite)
    with new_folder(output, overwrite=overwrite) as temporary, quiet():
        start = open_start(base, TextClassification(), label_names)
        load_start(start, seed).save_pretrained(temporary)
        start.tokenizer.save_pretrained(temporary)
    return output


def check_place(output: Path, base: str | Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written.

    Raises:
        CheckpointError: it exists and may not be replaced, or is the base.
    """
    problem = check_output(output, overwrite, [Path(base)])
    if problem is not None:
        raise problem


def save_model(model: Any, use_cache: bool | None, folder: Path) -> None:
    """Save a model, its configuration's ``use_cache`` as it was before the Trainer switched it off."""
    config, now = model.config, _use_cache(model)
    if use_cache is None and now is not None:
        del config.use_cache
    elif use_cache is not None:
        config.use_cache = use_cache
    try:
        with quiet():
            model.save_pretrained(folder)
    finally:
        if now is not None:
            config.use_cache = now


def keep(ran: Ran, run: Run, folder: Path) -> None:
    """Put the weights to keep into ``folder``: those of the best epoch, or the last ones."""
    if ran.folder is None:
        run.save(folder)
        return
    for path in sorted(ran.folder.iterdir()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.suffix in (".json", ".safetensors") and path.name != "trainer_state.json":
            shutil.copy2(path, folder / path.name)


def kept_loss(ran: Ran) -> float:
    """The mean training loss of the epoch that was kept."""
    return ran.losses[-1 if ran.best is None else ran.best]


def _use_cache(model: Any) -> bool | None:
    found: bool | None = getattr(model.config, "use_cache", None)
    return found


def _save_tokenizer(folder: Path, start: Start) -> None:
    start.tokenizer.save_pretrained(folder)
