"""Multi-task learning: one encoder trained on several data sets, everything shared or a head for each task.

    train_multitask("org/encoder", parts, shared=False, output="both", settings=settings)
    # both/<name> opens with from_pretrained; the encoder is the same in each

With ``shared=True`` the label spaces agree, and the data are trained on as if they were one data set. With
``shared=False`` every batch is of one task, tasks are drawn in proportion to the sizes of their data sets,
and the order of the batches is shuffled anew in each epoch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from merganser.errors import CheckpointError, UserError, require
from merganser.tasks.models import quiet
from merganser.training.adapters import plain_model, save_model, with_adapter
from merganser.training.heads import PROBLEM_TYPES, Start, load_start
from merganser.training.loop import FeatureData, MixedBatches, OnStep, TrainingOutcome, TrainingRun, run_trainer
from merganser.training.losses import Loss, make_loss
from merganser.training.outputs import new_trained, trained_output
from merganser.training.prepare import Prepared, TrainingPart, prepare
from merganser.training.resume import clear, fingerprint, take_up
from merganser.training.settings import TrainingSettings

_SCRATCH = ".training"


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        paths: for each part its model folder; the same one for all where everything is shared.
        dev_scores: the score on development data after each epoch, of several parts the mean; empty where there
            were none.
        best_epoch: the epoch that was kept, counted from 1; None where it is simply the last.
        loss: the mean training loss of the epoch that was kept.
    """

    paths: Mapping[str, Path]
    dev_scores: tuple[float, ...]
    best_epoch: int | None
    loss: float

    @property
    def path(self) -> Path:
        """The model folder of the only part."""
        (path,) = self.paths.values()
        return path


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
    separate: Sequence[str] = (),
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
        separate: name patterns of the encoder's parameters that each part has to itself, as its head.
        work: a folder for checkpoints after each epoch, see :func:`merganser.training.train`.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        allow_pickle: accept a base whose weights are pickled (read with ``weights_only``).
        overwrite: replace what an earlier training has written; nothing else is ever replaced.
        on_step: called with (steps done, steps in all); without it there is a progress bar on standard error.

    Raises:
        CheckpointError: a base that cannot be used, encoders that differ, or an output that exists.
        DataError: data that do not fit their task, or a loss that is not finite.
        UserError: parts that cannot be trained together, or a setting that does not fit.
    """
    output, starts = Path(output), dict(starts or {})
    require("train", "training", "accelerate", *(["peft"] if settings.lora else []))
    _check_parts(parts, shared, starts)
    sources = [starts.get(part.name, base) for part in parts]
    place = trained_output(output, sources, overwrite=overwrite, work=work)
    place.raise_problem()
    if settings.best_epoch and all(part.dev is None for part in parts):
        what = "the best epoch is chosen on development data, and there are none"
        raise UserError(what, where="best_epoch", mend="give development data, or best_epoch: false")
    names = [""] if shared else [part.name for part in parts]  # of the models' folders
    with quiet(), new_trained(place) as temporary:
        prepared = [
            prepare(source, part, settings, temporary if shared else temporary / part.name, allow_pickle=allow_pickle)
            for part, source in zip(parts, sources, strict=True)
        ]
        for item, source in zip(prepared, sources, strict=True):
            if starts and not item.start.keeps_head:
                what = f"the head has other labels than the part: {', '.join(item.start.labels)}"
                raise UserError(what, where=source, mend="give the labels of the head, in its order")
        drawn = seed if head_seed is None else head_seed
        scratch, resume = temporary / _SCRATCH, None
        if work is not None:
            scratch = Path(work)
            data_of = [(item.start, part.rows, part.dev) for item, part in zip(prepared, parts, strict=True)]
            described = [(part.name, part.metric, str(part.columns)) for part in parts]
            more = (seed, drawn, shared, bool(starts), described, *([tuple(separate)] if separate else []))
            resume = take_up(scratch, fingerprint(data_of, settings, more))
        models = [
            _load(item.start, drawn, resume and resume / name, settings, allow_pickle)
            for item, name in zip(prepared, names, strict=False)  # the first alone, where one model is shared
        ]
        if not shared:
            _share_encoder(models, names, separate, same=bool(starts))
        caches = [getattr(model.config, "use_cache", None) for model in models]
        run = TrainingRun(
            name=output.name,
            settings=settings,
            seed=seed,
            scratch=scratch,
            save=partial(_save, models, caches, names),
            score=partial(_score, prepared, models, settings) if any(item.dev for item in prepared) else None,
            whole=work is not None,
            resume=resume,
            loss=_shared_loss(prepared, settings) if shared else None,
            device=device,
            on_step=on_step,
        )
        outcome = run_trainer(
            run,
            models[0] if shared else _Heads(models, [item.loss for item in prepared]),
            ConcatDataset([FeatureData(item.features, place) for place, item in enumerate(prepared)]),
            prepared[0].collate if shared else partial(_collate, prepared),
            None if shared else MixedBatches([len(item.features) for item in prepared], settings.batch_size, seed),
        )
        _keep(outcome, run, temporary)
        shutil.rmtree(temporary / _SCRATCH, ignore_errors=True)
    if work is not None:
        clear(Path(work))
    kept = -1 if outcome.best is None else outcome.best
    paths = {part.name: output if shared else output / part.name for part in parts}
    return Trained(paths, outcome.scores, None if outcome.best is None else kept + 1, outcome.losses[kept])


def _load(start: Start, seed: int, folder: Path | None, settings: TrainingSettings, allow_pickle: bool) -> Any:
    """The model to train, of a checkpoint of an earlier training where there is one; with its adapter, if any."""
    if settings.lora is None:
        return load_start(start, seed, folder, allow_pickle=allow_pickle)
    return with_adapter(load_start(start, seed, allow_pickle=allow_pickle), start, settings.lora, folder)


def _collate(prepared: Sequence[Prepared], examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the examples of one part, with the part's place."""
    (part,) = {example["part"] for example in examples}
    return {**prepared[part].collate(examples), "part": part}


class _Heads(nn.Module):
    """The models of all parts as one, with each part's loss."""

    def __init__(self, models: Sequence[nn.Module], losses: Sequence[Loss | None]) -> None:
        super().__init__()
        self.models, self.losses = nn.ModuleList(models), list(losses)

    def forward(self, part: int, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        model, loss = self.models[part], self.losses[part]
        if loss is None:
            return {"loss": model(**inputs, labels=labels).loss}
        return {"loss": loss(model(**inputs).logits, labels)}


def _share_encoder(models: Sequence[Any], names: Sequence[str], separate: Sequence[str], *, same: bool) -> None:
    """Make every parameter of the encoders that has the same name one parameter, but for those to be kept separate.

    Raises:
        CheckpointError: the architectures differ, or (where they must be the ``same``) their weights.
    """
    kept: dict[str, nn.Parameter] = {}
    for model, name in zip(models, names, strict=True):
        plain = plain_model(model)
        encoder, prefix = plain.base_model, plain.base_model_prefix
        for path, parameter in list(encoder.named_parameters(remove_duplicate=False)):
            if any(fnmatchcase(f"{prefix}.{path}", pattern) for pattern in separate):
                continue
            first = kept.setdefault(path, parameter)
            if first is parameter:
                continue
            if first.shape != parameter.shape or (same and not torch.equal(first, parameter)):
                what = f"the encoder of {name!r} differs from that of {names[0]!r} in {path}"
                mend = "start all parts from one base, or from the models of one merge"
                raise CheckpointError(what, where=name, mend=mend)
            owner, _, leaf = path.rpartition(".")
            setattr(encoder.get_submodule(owner), leaf, first)


def _shared_loss(prepared: Sequence[Prepared], settings: TrainingSettings) -> Loss | None:
    """The loss of all data together: label frequencies are those of the whole."""
    start = prepared[0].start
    features = [feature for item in prepared for feature in item.features]
    return make_loss(start.task.problem, features, len(start.labels), settings.reweight, "all parts")


def _score(prepared: Sequence[Prepared], models: Sequence[Any], settings: TrainingSettings) -> float:
    """The mean of the parts' scores; those of which less is better count as negative."""
    scores = []
    for place, item in enumerate(prepared):
        if item.dev is not None:
            score = item.score(models[min(place, len(models) - 1)].eval(), settings)
            scores.append(score if item.higher_is_better else -score)
    return float(np.mean(scores))


def _save(models: Sequence[Any], caches: Sequence[bool | None], names: Sequence[str], folder: Path) -> None:
    """Save models, ``use_cache`` in their configurations as it was before the Trainer switched it off."""
    for model, use_cache, name in zip(models, caches, names, strict=True):
        config, now = model.config, getattr(model.config, "use_cache", None)
        if use_cache is None and now is not None:
            del config.use_cache
        elif use_cache is not None:
            config.use_cache = use_cache
        try:
            with quiet():
                save_model(model, folder / name)
        finally:
            if now is not None:
                config.use_cache = now


def _keep(outcome: TrainingOutcome, run: TrainingRun, folder: Path) -> None:
    """Put the weights to keep into ``folder``: those of the best epoch, or the last ones."""
    if outcome.folder is None:
        run.save(folder)
        return
    for path in sorted(outcome.folder.iterdir()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.suffix in (".json", ".safetensors") and path.name != "trainer_state.json":
            shutil.copy2(path, folder / path.name)


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
                what = f"{part.name!r} has another task or other labels than {first.name!r}"
                raise UserError(what, where="parts", mend="give shared=False: a head for each part")
        return
    for part in parts:
        if part.task.problem not in PROBLEM_TYPES:
            raise UserError(f"{part.task.name} has no head of its own", where=part.name, mend="give shared=True")
    if starts and set(starts) != set(names):
        what = f"starts are given for {', '.join(sorted(starts))}, the parts are {', '.join(names)}"
        raise UserError(what, where="starts", mend="give a start for every part")
