"""Fine-tune an encoder for text classification: :func:`merganser.training.train` on lists of texts.

    from merganser.training import fine_tune, prepare_base
    prepare_base("org/encoder", label_names=["no", "yes"], output="base", seed=1)
    fine_tune("base", texts, labels, label_names=["no", "yes"], output="specialist", epochs=3)

Specialists that start from one prepared base share their head's initialisation, and have the base's tensor
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merganser.errors import DataError
from merganser.files import new_folder
from merganser.tasks.classification import TextClassification
from merganser.tasks.data import Rows
from merganser.tasks.models import quiet
from merganser.training.fine_tune import check_place, train
from merganser.training.heads import load_start, open_start
from merganser.training.loop import OnStep
from merganser.training.settings import make_settings


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
    check_place(output, base, overwrite)
    with new_folder(output, overwrite=overwrite) as temporary, quiet():
        start = open_start(base, TextClassification(), label_names)
        load_start(start, seed).save_pretrained(temporary)
        start.tokenizer.save_pretrained(temporary)
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
    _check_names(label_names)
    _check_data(texts, labels, label_names)
    settings = make_settings(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        warmup=warmup,
        batching="by-length",
    )
    examples = zip(texts, labels, strict=True)
    rows = Rows(
        "texts",
        tuple({"text": text, "label": label_names[label]} for text, label in examples),
        tuple(("texts", number) for number in range(1, len(texts) + 1)),
        by_line=False,
    )
    trained = train(
        base,
        TextClassification(),
        rows,
        labels=label_names,
        output=output,
        settings=settings,
        seed=seed,
        overwrite=overwrite,
        on_step=on_step,
    )
    return trained.path


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
