"""One run of transformers' Trainer, unpatched: scores after each epoch, the best one kept, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from merganser import progress
from merganser.documents import read_json
from merganser.errors import DataError
from merganser.tasks.batches import Feature
from merganser.training.losses import Loss
from merganser.training.settings import TrainingSettings

#: Called after each optimiser step with the steps done and the steps in all.
OnStep = Callable[[int, int], None]

STATE = "trainer_state.json"  # the file of a checkpoint that the Trainer writes last


@dataclass(frozen=True)
class TrainingRun:
    """What is trained, and how.

    Attributes:
        name: for the progress bar.
        settings: hyper-parameters.
        seed: of the order of the examples and of dropout.
        scratch: a folder for checkpoints.
        save: writes the model into a folder.
        score: the model on development data, the more the better; None for none.
        whole: keep in ``scratch`` after each epoch all that a killed run needs to go on.
        resume: such a checkpoint to go on from.
        loss: instead of the model's own.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        on_step: instead of a progress bar.
    """

    name: str
    settings: TrainingSettings
    seed: int
    scratch: Path
    save: Callable[[Path], None]
    score: Callable[[], float] | None = None
    whole: bool = False
    resume: Path | None = None
    loss: Loss | None = None
    device: str = "auto"
    on_step: OnStep | None = None


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run went.

    Attributes:
        scores: on development data after each epoch.
        losses: the mean training loss of each epoch.
        best: the place of the best score, counted from 0; None where none was looked for or all are NaN.
        folder: the checkpoint with the best weights; None: the model itself has the weights to keep.
    """

    scores: tuple[float, ...]
    losses: tuple[float, ...]
    best: int | None
    folder: Path | None


class FeatureData(Dataset[dict[str, Any]]):
    """Features as the Trainer takes them: dictionaries with the tokens, whose number it may look at."""

    def __init__(self, features: Sequence[Feature], part: int = 0) -> None:
        self.features, self.part = features, part

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        feature = self.features[index]
        return {"input_ids": feature.input_ids, "feature": feature, "part": self.part}


class MixedBatches(Sampler[list[int]]):
    """Batches of one data set each, in an order that is shuffled over all of them.

    Every iteration is an epoch: each example comes once, so that a data set gives batches in proportion to
    its size.

    Args:
        sizes: of the data sets, whose examples are numbered one data set after the other.
        batch_size: examples in a batch; a data set's last one may be smaller.
        seed: of the order.

    Attributes:
        epoch: the next one, counted from 0.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed, self.epoch = tuple(sizes), batch_size, seed, 0

    def __len__(self) -> int:
        return sum(-(-size // self.batch_size) for size in self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        batches: list[list[int]] = []
        first = 0
        for size in self.sizes:
            order = (first + draw.permutation(size)).tolist()
            batches += [order[at : at + self.batch_size] for at in range(0, size, self.batch_size)]
            first += size
        for place in draw.permutation(len(batches)):
            yield batches[place]


def run_trainer(
    run: TrainingRun,
    model: nn.Module,
    examples: Dataset[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batches: MixedBatches | None = None,
) -> TrainingOutcome:
    """Train ``model`` in place.

    Args:
        run: see there.
        model: on the CPU; it returns there.
        examples: dictionaries with ``feature`` and ``input_ids``.
        collate: makes a batch of them.
        batches: the places of each batch's examples; by default drawn as the settings say.

    Raises:
        DataError: the loss is not finite.
    """
    settings, best = run.settings, run.score is not None and run.settings.best_epoch
    finished = _finished(run, best)
    if finished is not None:
        return finished
    if run.resume is not None and batches is not None:
        batches.epoch = round(state_of(run.resume)["epoch"])  # checkpoints are of whole epochs
    arguments = TrainingArguments(
        output_dir=str(run.scratch.absolute()),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=_warmup(settings, len(examples)),  # type: ignore[arg-type]
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        seed=run.seed,
        use_cpu=run.device == "cpu",
        train_sampling_strategy="group_by_length" if settings.batching == "by-length" else "random",
        eval_strategy="no" if run.score is None else "epoch",
        save_strategy="epoch" if run.whole else "best" if best else "no",
        save_only_model=not run.whole,
        save_total_limit=2 if run.whole and best else 1,  # the last one stays beside the best
        metric_for_best_model="score" if best else None,
        greater_is_better=True if best else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen
        remove_unused_columns=False,
        report_to="none",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    with _display(run.on_step, f"train {run.name}") as callback:
        trainer = _Trainer(
            run,
            batches,
            model=model,
            args=arguments,
            train_dataset=examples,
            eval_dataset=None if run.score is None else examples,  # asked for, though run.score has its own
            data_collator=collate,
            callbacks=[callback],
            compute_loss_func=None if run.loss is None else partial(_loss_of_logits, run.loss),
        )
        trainer.remove_callback(PrinterCallback)  # it prints on standard output, which is for data
        trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume.absolute()))
    model.to("cpu")
    return _outcome(run, trainer.state.log_history, trainer.state.best_global_step if best else None)


def _warmup(settings: TrainingSettings, examples: int) -> float:
    """The share of the steps that warms up; none where all of them would, and no step were left to fall."""
    steps = settings.max_steps or math.ceil(math.ceil(examples / settings.batch_size) * settings.epochs)
    return settings.warmup if math.ceil(steps * settings.warmup) < steps else 0


def _finished(run: TrainingRun, best: bool) -> TrainingOutcome | None:
    """The outcome, where the checkpoint to go on from is that of the last step; the Trainer would add one."""
    if run.resume is None:
        return None
    state = state_of(run.resume)
    if state["global_step"] < state["max_steps"]:
        return None
    return _outcome(run, state["log_history"], state["best_global_step"] if best else None)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What the Trainer knew when it wrote a checkpoint.

    Raises:
        UserError: it was not written whole.
    """
    found: dict[str, Any] = read_json(checkpoint / STATE, finite=False)
    return found


def _outcome(run: TrainingRun, history: Sequence[Mapping[str, Any]], step: int | None) -> TrainingOutcome:
    """The outcome from the Trainer's log and the step with the best score."""
    losses = tuple(float(entry["loss"]) for entry in history if "loss" in entry)
    scored = [entry for entry in history if "eval_score" in entry]
    place = next((i for i, entry in enumerate(scored) if step and entry["step"] == step), None)
    folder = None if place is None else run.scratch / f"checkpoint-{step}"
    return TrainingOutcome(tuple(float(entry["eval_score"]) for entry in scored), losses, place, folder)


def _loss_of_logits(loss: Loss, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss as the Trainer calls it."""
    return loss(outputs["logits"], labels)


class _Trainer(Trainer):
    """The Trainer with our scores, our way to save a model, and batches of our own where there are some."""

    def __init__(self, run: TrainingRun, batches: Sampler[list[int]] | None, **options: Any) -> None:
        super().__init__(**options)
        self.our_run, self.our_batches = run, batches
        self.control: Any  # the Trainer's; it gives no type

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """The score on development data, logged as the Trainer logs its own."""
        if self.our_run.score is None or self.model is None:
            raise RuntimeError("evaluated without development data")
        self.model.eval()
        metrics = {"eval_score": self.our_run.score()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the log, and stop where the loss is not finite."""
        if not math.isfinite(logs.get("loss", 0.0)):
            mend = f"lower the learning rate (now {self.args.learning_rate:g})"
            raise DataError(f"training diverged, its loss is {logs['loss']}", mend=mend)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.our_run.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are there already: whoever resumes has loaded them, in the layout of ``run.save``."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches as they are given, or as the Trainer draws them."""
        if self.our_batches is None:
            return super().get_train_dataloader()
        loader: DataLoader[Any] = self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=self.our_batches, collate_fn=self.data_collator)
        )
        return loader


class _Steps(TrainerCallback):
    """Tell the steps to a function."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps)


@contextmanager
def _display(on_step: OnStep | None, description: str) -> Iterator[_Steps]:
    """The callback for the caller's function, or for a bar of our own."""
    if on_step is not None:
        yield _Steps(on_step)
        return
    with progress.bar(0, description, "step") as shown:

        def advance(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield _Steps(advance)
