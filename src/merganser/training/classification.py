"""Fine-tune an encoder for text classification with transformers' Trainer, unpatched.

    from merganser.training import fine_tune, prepare_base
    prepare_base("org/encoder", label_names=["no", "yes"], output="base", seed=1)
    fine_tune("base", texts, labels, label_names=["no", "yes"], output="specialist", epochs=3)

Specialists that start from one prepared base share their head's initialisation, and have the base's tensor
names.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from merganser import progress
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.writer import check_output, new_folder
from merganser.errors import CheckpointError, DataError, UserError
from merganser.tasks.models import quiet

#: Called after each optimiser step with the steps done and the steps in all.
OnStep = Callable[[int, int], None]


def prepare_base(
    base: str | Path,
    *,
    label_names: Sequence[str],
    output: str | Path,
    seed: int = 1,
    overwrite: bool = False,
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
    _check_names(label_names)
    _check_place(output, base, overwrite)
    with new_folder(output, overwrite=overwrite) as temporary, quiet():
        model, tokenizer = _load(base, label_names, seed)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return output


def fine_tune(
    base: str | Path,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    label_names: Sequence[str],
    output: str | Path,
    epochs: float = 3,
    learning_rate: float = 5e-5,
    batch_size: int = 16,
    max_length: int = 128,
    warmup: float = 0.06,
    seed: int = 1,
    on_step: OnStep | None = None,
    overwrite: bool = False,
) -> Path:
    """Train all weights of ``base`` on labelled texts and save a plain ``from_pretrained`` folder.

    AdamW with linear decay, float32, batches of texts of similar length. A base that has a head of the same
    labels keeps it; otherwise a new head is drawn from ``seed``. The same arguments on the same machine give
    the same weights. The global random state is seeded.

    Args:
        base: a model folder or a Hub name.
        texts: the training texts.
        labels: for each text an index into ``label_names``.
        label_names: the classes, in the order of the head's outputs.
        output: the folder to write, whole or not at all.
        epochs: passes over the data; a fraction is allowed.
        learning_rate: the peak of the schedule.
        batch_size: texts a step (on each device).
        max_length: tokens at which a text is cut.
        warmup: share of the steps over which the learning rate rises.
        seed: of a new head, the order of the texts and dropout.
        on_step: called with (steps done, steps in all); without it there is a progress bar on standard error.
        overwrite: replace an existing output.

    Raises:
        CheckpointError: the base cannot be loaded, or the output exists.
        DataError: no data, texts and labels that do not match, a label outside ``label_names``, a loss that
            is NaN.
        UserError: ``accelerate``, which the Trainer needs, is not installed, or a setting is out of its
            range.
    """
    output = Path(output)
    _check_names(label_names)
    _check_data(texts, labels, label_names)
    _check_settings(epochs, learning_rate, batch_size, max_length, warmup)
    _check_place(output, base, overwrite)
    with new_folder(output, overwrite=overwrite) as temporary, quiet():
        model, tokenizer = _load(base, label_names, seed)
        use_cache = getattr(model.config, "use_cache", None)  # the Trainer switches it off
        tokenizer.save_pretrained(temporary)  # before encoding, which leaves truncation settings in it
        encoded = tokenizer(list(texts), truncation=True, max_length=_limit(max_length, model, tokenizer))
        examples = [
            {**{key: values[index] for key, values in encoded.items()}, "labels": int(label)}
            for index, label in enumerate(labels)
        ]
        arguments = TrainingArguments(
            output_dir=str(temporary),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            warmup_steps=warmup,
            seed=seed,
            train_sampling_strategy="group_by_length",
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # a loss that is not finite must be seen
            report_to="none",
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        with _display(on_step, f"fine-tune {output.name}") as callback:
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=examples,
                data_collator=DataCollatorWithPadding(tokenizer),
                processing_class=tokenizer,
                callbacks=[callback],
            )
            trainer.remove_callback(PrinterCallback)  # it prints on standard output, which is for data
            loss = trainer.train().training_loss
        if not math.isfinite(loss):
            raise DataError(
                f"training diverged, its loss is {loss}",
                mend=f"lower the learning rate (now {learning_rate:g})",
            )
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.to("cpu").save_pretrained(temporary)
    return output


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


def _load(
    base: str | Path, label_names: Sequence[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 with a head for the labels (a new one drawn from ``seed``), and its tokenizer."""
    set_seed(seed)
    names = dict(enumerate(label_names))
    checkpoint = open_checkpoint(base)
    checkpoint.fetch()
    folder = checkpoint.path
    try:
        config = AutoConfig.from_pretrained(folder)
        same_head = list(config.id2label.values()) == list(label_names)
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        config.problem_type = "single_label_classification"
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=not same_head,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot be loaded for text classification: {error}",
            where=str(base),
            mend="give a model folder with config, safetensors weights and tokenizer, or a Hub name",
        ) from error
    return model, tokenizer


def _limit(max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The asked length, or what the tokenizer and the position embeddings allow when that is less."""
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    return int(min(max_length, tokenizer.model_max_length, positions))


def _check_place(output: Path, base: str | Path, overwrite: bool) -> None:
    problem = check_output(output, overwrite, [Path(base)])
    if problem is not None:
        raise problem


def _check_names(label_names: Sequence[str]) -> None:
    if isinstance(label_names, str) or len(label_names) < 2 or len(set(label_names)) < len(label_names):
        raise DataError(
            f"labels must be at least two distinct names, but are {label_names!r}",
            mend="name every class once",
        )


def _check_data(texts: Sequence[str], labels: Sequence[int], label_names: Sequence[str]) -> None:
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts but {len(labels)} labels", mend="give one label for each text")
    if not texts:
        raise DataError("there is no text to train on", mend="give at least one text")
    for index, label in enumerate(labels):
        if not 0 <= label < len(label_names):
            raise DataError(
                f"label {label} of text {index} is outside 0 … {len(label_names) - 1} "
                f"({', '.join(label_names)})",
                mend="name every class in label_names",
            )


def _check_settings(
    epochs: float, learning_rate: float, batch_size: int, max_length: int, warmup: float
) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("training needs accelerate", mend="pip install 'merganser[train]'")
    for name, fits, rule in (
        ("epochs", epochs > 0, "above 0"),
        ("learning_rate", 0 < learning_rate < math.inf, "above 0"),
        ("batch_size", batch_size >= 1, "at least 1"),
        ("max_length", max_length >= 1, "at least 1"),
        ("warmup", 0 <= warmup < 1, "a share: 0 or more and below 1"),
    ):
        if not fits:
            raise UserError(f"{name} must be {rule}", where=name, mend="give another value")
