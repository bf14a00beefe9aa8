"""Multi-task learning: one encoder trained on several data sets, everything shared or a head for each task.

    train_multitask("org/encoder", parts, shared=False, output="both", settings=settings)
    # both/<name> opens with from_pretrained; the encoder is the same in each

With ``shared=True`` the label spaces agree, and the data are trained on as if they were one data set. With
``shared=False`` every batch is of one task, tasks are drawn in proportion to the sizes of their data sets,
and the order of the batches is shuffled anew in each epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.errors import UserError
from merganser.training.fine_tune import check_place
from merganser.training.fit import Trained, fit
from merganser.training.heads import PROBLEM_TYPES
from merganser.training.loop import OnStep
from merganser.training.prepare import TrainingPart
from merganser.training.settings import TrainingSettings


def train_multitask(
    base: str | Path,
    parts: Sequence[TrainingPart],
    *,
    shared: bool,
    output: str | Path,
    settings: TrainingSettings,
    seed: int = 1,
    head_seed: int | None = None,
    starts: Mapping[str, str | Path] | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Trained:
    """Train one encoder on several data sets.

    Args:
        base: a model folder or a Hub name; with ``shared``, a head of the same labels is kept, so that a
            merged model can be tuned further.
        parts: the data sets.
        shared: share everything, the head too: one model in ``output``. Otherwise a head for each part, and
            a model for each part in ``<output>/<name>``, all with the same encoder.
        output: the folder to write, whole or not at all.
        settings: hyper-parameters; ``batching`` has no effect with a head for each part.
        seed: of the order of the batches and of dropout.
        head_seed: of new heads; by default ``seed``.
        starts: for each part a model folder to start from instead of ``base``: their encoders are the same
            and their heads are kept, as in a merge that left the heads apart.
        work: a folder for checkpoints after each epoch, see :func:`merganser.training.train`.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        allow_pickle: accept a base whose weights are pickled (read with ``weights_only``).
        overwrite: replace an existing output.
        on_step: called with (steps done, steps in all); without it there is a progress bar on standard error.

    Raises:
        CheckpointError: a base that cannot be used, encoders that differ, or an output that exists.
        DataError: data that do not fit their task, or a loss that is not finite.
        UserError: parts that cannot be trained together, or a setting that does not fit.
    """
    output, starts = Path(output), dict(starts or {})
    _check_parts(parts, shared, starts)
    sources = [starts.get(part.name, base) for part in parts]
    _check_place(output, [Path(source) for source in sources], overwrite)
    return fit(
        sources,
        parts,
        shared=shared,
        own_heads=bool(starts),
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


def _check_parts(parts: Sequence[TrainingPart], shared: bool, starts: Mapping[str, Any]) -> None:
    names = [part.name for part in parts]
    if not parts:
        raise UserError("there is nothing to train on", where="parts", mend="give at least one part")
    if len(set(names)) < len(names):
        raise UserError("two parts have the same name", where="parts", mend="name each part once")
    for name in names:
        if not name or name != Path(name).name or name.startswith("."):
            raise UserError(f"{name!r} cannot name a folder", where="parts", mend="give a plain name")
    first = parts[0]
    if shared:
        if starts:
            raise UserError("one shared model has one start", where="starts", mend="give it as the base")
        for part in parts[1:]:
            if part.task != first.task or tuple(part.labels) != tuple(first.labels):
                raise UserError(
                    f"{part.name!r} has another task or other labels than {first.name!r}",
                    where="parts",
                    mend="give shared=False: a head for each part",
                )
        return
    for part in parts:
        if part.task.problem not in PROBLEM_TYPES:
            raise UserError(f"{part.task.name} has no head of its own", where=part.name, mend="give shared=True")
    if starts and set(starts) != set(names):
        raise UserError(
            f"starts are given for {', '.join(sorted(starts))}, the parts are {', '.join(names)}",
            where="starts",
            mend="give a start for every part",
        )


def _check_place(output: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that cannot be written; a folder of nothing but model folders may be replaced."""
    inside = list(output.iterdir()) if output.is_dir() else []
    ours = bool(inside) and all((path / "config.json").is_file() for path in inside)
    taken = any(source.resolve().is_relative_to(output.resolve()) for source in sources)
    if not (overwrite and ours and not taken):
        check_place(output, sources, overwrite)
