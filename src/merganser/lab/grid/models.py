"""The models of a grid: taken from the zoo, trained when absent, with their statistics and outputs beside them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merganser.checkpoints import open_checkpoint
from merganser.collection import collect
from merganser.errors import UserError
from merganser.lab.grid.cells import Cell, ModelSpec
from merganser.lab.grid.config import ExperimentConfig, Finetune, ModelArgs
from merganser.lab.grid.data import Cut, Data, data_of
from merganser.lab.grid.pretrained import copy_model, weights_sha256
from merganser.lab.suites.base import DEV, TRAIN
from merganser.lab.zoo import Entry, Zoo, id_of
from merganser.lab.zoo.keys import explain
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.models import load_model, load_tokenizer, open_model, prepare_padding
from merganser.tasks.predict import Prediction, predict
from merganser.training.adapters import CONFIG as ADAPTER_CONFIG
from merganser.training.fine_tune import train
from merganser.training.multitask import train_multitask
from merganser.training.prepare import TrainingPart
from merganser.training.settings import TrainingSettings, defaults, with_changes

#: What statistics are: a new number collects them again. 2: Fisher information of annotated labels alone.
STATISTICS = 2

logger = logging.getLogger(__name__)


class Models:
    """Everything that the cells of an experiment ask for models.

    Args:
        config: of the experiment.
        zoo: where models are kept.
        allow_pickle: accept pickled weights of the pretrained model and of models of one's own.
        fresh: the name of the results for which contributors with ``load_from_zoo: no`` are trained anew; empty where
            there are none yet.
    """

    def __init__(self, config: ExperimentConfig, zoo: Zoo, *, allow_pickle: bool = False, fresh: str = "") -> None:
        self.config, self.zoo, self.allow_pickle, self.fresh = config, zoo, allow_pickle, fresh
        self.data: Data = data_of(config.suite.model_dump_json())
        self.device = choose_device(config.resources.device)
        self._keys: dict[ModelSpec, dict[str, Any]] = {}
        self._found: dict[ModelSpec, Entry] = {}

    # -- what a model is made of -------------------------------------------------------------------------

    def settings(self, args: ModelArgs | None = None) -> TrainingSettings:
        """The published hyper-parameters with the configuration's changes.

        Raises:
            UserError: an unknown hyper-parameter, or a value that it cannot take.
        """
        name = "partitions" if self.config.layout == "partitions" else self.config.suite.name
        settings = with_changes(defaults(self._architecture(), name), self.config.training)
        return with_changes(settings, args.training if args else {}, where="contributors.*.training")

    def tuned(self, finetune: Finetune) -> TrainingSettings:
        """The hyper-parameters of a fine-tuning after the merge.

        Raises:
            UserError: see :meth:`settings`.
        """
        own, below = finetune.training, {"best_epoch": False, "lora": None}  # a merge is a model, not an adapter
        return with_changes(self.settings(), below, own, where="methods.*.finetune.training")

    def _architecture(self) -> str:
        if self.config.pretrained.architecture:
            return self.config.pretrained.architecture
        opened = open_checkpoint(self.config.pretrained.model, allow_pickle=self.allow_pickle)
        return str(opened.config.get("model_type", ""))

    def rows(self, spec: ModelSpec) -> Rows:
        """The training rows of a contributor."""
        return self.data.rows(*self._place(spec))

    def _place(self, spec: ModelSpec) -> tuple[str, str, Cut | None]:
        """Where a contributor's training rows are found: the same for all seeds, but for parts."""
        return spec.set, TRAIN, None if spec.part is None else (spec.part, spec.part_seed or 0, self.config.partitions)

    def key(self, spec: ModelSpec) -> dict[str, Any]:
        """What a contributor's model depends on: its address in the zoo.

        Options that only change how outputs are scored are no part of it, and do not choose the best epoch either.
        """
        if spec not in self._keys:
            args = self.args(spec)
            fresh = {"trained_for": self.fresh} if args.load_from_zoo == "no" else {}
            settings = self.settings(args)
            made = self._made("model", spec.set, spec.seed, settings, [spec.set])
            self._keys[spec] = {**made, **self._data_key(spec), **fresh}
        return self._keys[spec]

    def _made(
        self, kind: str, named: str, seed: int, settings: TrainingSettings, sets: Sequence[str]
    ) -> dict[str, Any]:
        """What every key of a training says; metrics only where the best epoch is chosen by them."""
        metrics = [self.data.training_suite.metric(name) for name in sets]
        return {
            "kind": kind,
            "suite": self.config.suite.name,
            "set": named,
            "seed": seed,
            "model": self.config.pretrained.title,
            "base": self.base,
            "training": settings.model_dump(mode="json"),
            **({"metrics": metrics} if settings.best_epoch else {}),
        }

    @property
    def base(self) -> str:
        """The hash of the pretrained model."""
        return weights_sha256(self.config.pretrained.model, self.allow_pickle)

    def _data_key(self, spec: ModelSpec) -> dict[str, Any]:
        part = {} if spec.part is None else {"part": f"{spec.part + 1}/{self.config.partitions.parts}"}
        return {
            "train": self.data.digest(*self._place(spec)),
            "dev": self.data.digest(spec.set, DEV),
            "labels": list(self.data.suite.labels(spec.set)),
            **part,
        }

    def args(self, spec: ModelSpec) -> ModelArgs:
        """What the configuration says of a contributor."""
        return self.config.contributors[spec.name if spec.part is None else spec.name.rsplit("/", 1)[0]]

    def address(self, spec: ModelSpec) -> str:
        """The id of the model that stands for a contributor: what its cells' names are made of."""
        args = self.args(spec)
        if args.checkpoint is not None:
            return id_of(self._checkpoint_key(args.checkpoint))
        found = self.find(spec) if args.zoo_filter else None
        return id_of(self.key(spec)) if found is None else found.id

    # -- models ------------------------------------------------------------------------------------------

    def find(self, spec: ModelSpec) -> Entry | None:
        """The contributor's model where it is there already, without training anything."""
        found = self._found.get(spec) or self._find(spec, self.args(spec))
        if found is not None:
            self._found[spec] = found
        return found

    def _find(self, spec: ModelSpec, args: ModelArgs) -> Entry | None:
        if args.checkpoint is not None:
            return self.zoo.get(self._checkpoint_key(args.checkpoint))
        if args.zoo_filter and args.load_from_zoo != "no":
            found = self.zoo.find(**self._wanted(spec, args))
            if found:
                return max(found, key=lambda entry: (entry.created, entry.id))
            if args.load_from_zoo == "yes":
                return None
        return None if args.load_from_zoo == "no" and not self.fresh else self.zoo.get(self.key(spec))

    def _wanted(self, spec: ModelSpec, args: ModelArgs) -> dict[str, Any]:
        """What a zoo's entry must have to stand for a contributor with a ``zoo_filter``."""
        wanted = {"kind": "model", "model": self.config.pretrained.title, "set": spec.set, "seed": spec.seed}
        return {**wanted, **args.zoo_filter}

    def model(self, spec: ModelSpec) -> Entry:
        """The contributor's model, trained when the zoo does not hold it.

        Raises:
            UserError: the configuration says that the zoo must hold it, and it does not; or anything that
                training raises.
        """
        args = self.args(spec)
        found = self.find(spec)
        if found is not None:
            return found
        if (given := args.checkpoint) is not None:

            def copy(folder: Path) -> Mapping[str, Any]:
                return {"weights": copy_model(given, folder, self.allow_pickle)}

            return self.zoo.build(self._checkpoint_key(given), copy)
        if args.load_from_zoo == "yes":
            raise self.absent(spec)
        part = self.part(spec)
        run = partial(
            train,
            self.config.pretrained.model,
            part.task,
            part.rows,
            labels=part.labels,
            settings=self.settings(args),
            seed=spec.seed,
            dev=part.dev,
            metric=part.metric,
        )
        entry = self._trained(self.key(spec), run)
        scores = entry.facts["dev_scores"]
        if entry.facts["best_epoch"] is not None and len(scores) > 1 == len(set(scores)):
            told = "%s (seed %s): every epoch scores %.3f on development data, so the first is kept"
            logger.warning(told, spec.name, spec.seed, scores[0])
        return entry

    def _trained(self, key: dict[str, Any], run: Callable[..., Any]) -> Entry:
        """The model of a key, made by ``run`` where the zoo does not hold it; it is told where and on what device."""

        def make(folder: Path) -> Mapping[str, Any]:
            output = folder / "trained"
            device = self.config.resources.device
            done = run(output=output, work=self.zoo.work(key), device=device, allow_pickle=self.allow_pickle)
            for path in output.iterdir():  # training writes a folder whole; its content is the entry's
                path.rename(folder / path.name)
            output.rmdir()
            scores, best = [round(float(score), 6) for score in done.dev_scores], done.best_epoch
            inside = folder if (folder / "config.json").exists() else min(p for p in folder.iterdir() if p.is_dir())
            weights = open_checkpoint(self._reference(inside)).manifest_sha256()
            return {
                "dev_scores": scores,
                "best_epoch": best,
                "score": scores[(best or 0) - 1] if scores else None,  # without a best epoch the last is kept
                "weights": weights,
            }

        return self.zoo.build(key, make)

    def absent(self, spec: ModelSpec) -> UserError:
        """The error for a contributor that must be in the zoo and is not; says what is there."""
        args = self.args(spec)
        what = f"the zoo holds no model of {spec.name} (seed {spec.seed})"
        mend = "set load_from_zoo: maybe to train it, or look with: merganser zoo ls"
        if args.zoo_filter:
            there = explain([entry.key for entry in self.zoo.scan()[0]], self._wanted(spec, args))
            what, mend = f"{what} and {args.zoo_filter}: {there.what}", f"{there.mend}; or {mend}"
        else:
            what += " with these settings"
        return UserError(what, where=f"contributors.{spec.name}", mend=mend)

    def multitask_key(self, cell: Cell) -> dict[str, Any]:
        """What multi-task training on a cell's data depends on; not on the seeds of the single models."""
        named = "+".join(spec.name for spec in cell.contributors)
        return {
            **self._made("multitask", named, cell.seed, self.settings(), [spec.set for spec in cell.contributors]),
            "shared": cell.heads != "separate",
            **self._separate(cell),
            "parts": [self._data_key(spec) for spec in cell.contributors],
        }

    def multitask(self, cell: Cell) -> Entry:
        """One encoder trained on the data of every contributor of a cell."""
        key, base, settings = self.multitask_key(cell), self.config.pretrained.model, self.settings()
        parts, shared = [self.part(spec) for spec in cell.contributors], key["shared"]
        options = {"shared": shared, "settings": settings, "seed": cell.seed, **self._separate(cell)}
        run = partial(train_multitask, base, parts, **options)
        return self._trained(key, run)

    def _separate(self, cell: Cell) -> dict[str, Any]:
        """What multi-task training keeps separate beside the heads, as a merge does; empty for nothing."""
        kept = cell.heads == "separate" and self.config.separate
        return {"separate": list(self.config.separate)} if kept else {}

    def reference(self, entry: Entry, subfolder: str = "") -> str:
        """A model of the zoo as every command takes it: an adapter together with the pretrained model below it.

        Args:
            entry: of the zoo.
            subfolder: of one head of several.
        """
        return self._reference(entry.path / subfolder if subfolder else entry.path)

    def _reference(self, folder: Path) -> str:
        adapted = (folder / ADAPTER_CONFIG).is_file()
        return f"{self.config.pretrained.model}+{folder}" if adapted else str(folder)

    def part(self, spec: ModelSpec, examples: Rows | None = None) -> TrainingPart:
        """A contributor's share of multi-task training."""
        suite, name = self.data.training_suite, spec.set
        rows, dev = examples or self.rows(spec), self.data.rows(name, DEV)
        return TrainingPart(folder_name(spec.name), suite.task(name), rows, suite.labels(name), dev, suite.metric(name))

    def _checkpoint_key(self, reference: str) -> dict[str, Any]:
        weights = weights_sha256(reference, self.allow_pickle)
        return {"kind": "checkpoint", "reference": reference, "weights": weights}

    def merge_device(self, method: str) -> str:
        """Where a method merges; where there is no GPU to share, on the processor."""
        if self.device == "cpu":
            return "cpu"
        wanted = self.config.resources.merge_devices
        return wanted.get(method, wanted.get("*", self.device))

    # -- what is kept beside them ------------------------------------------------------------------------

    def statistics(self, spec: ModelSpec, kind: str) -> Path:
        """Of a contributor's training data: Gram matrices (``gram``), with output gradients (``kfac``), or Fisher
        information (``fisher``)."""
        entry, wanted, settings = self.model(spec), self.config.statistics, self.statistics_key(spec, kind)
        task = self.data.suite.task(spec.set)

        def make(path: Path) -> None:
            collect(
                self.reference(entry),
                self.rows(spec),
                task=task,
                grams=kind != "fisher",
                fisher=wanted.fisher if kind == "fisher" else None,
                kfac="auto" if kind == "kfac" else None,
                fisher_examples=wanted.fisher_examples if kind == "kfac" else None,
                limit=settings["examples"],
                output=path,
                max_length=settings["max_length"],
                device=self.device,
                label=f"{self.config.suite.name}/{spec.name}",
                overwrite=True,
            )

        return self.zoo.attach(entry, self.statistics_name(spec, kind), make)

    def statistics_key(self, spec: ModelSpec, kind: str) -> dict[str, Any]:
        """What the statistics of a contributor depend on beside its model."""
        wanted = self.config.statistics
        key = {
            "version": STATISTICS,
            "rows": self.data.digest(*self._place(spec)),
            "examples": wanted.fisher_examples if kind == "fisher" else wanted.examples,
            "max_length": self.settings(self.args(spec)).max_length,
        }
        more: dict[str, dict[str, Any]] = {
            "fisher": {"fisher": wanted.fisher},
            "kfac": {"gradients": wanted.fisher_examples},
        }
        return {**key, **more.get(kind, {})}

    def statistics_name(self, spec: ModelSpec, kind: str) -> str:
        """The file of a contributor's statistics beside its model."""
        return f"statistics/{kind}-{_short(self.statistics_key(spec, kind))}.safetensors"

    def prediction(self, entry: Entry, set_name: str, split: str, subfolder: str = "") -> Prediction:
        """What a model of the zoo says of a test or development set, run at most once, however it is scored."""
        task = self.data.training_suite.task(set_name)
        settings = {
            "rows": self.data.digest(set_name, split),
            "task": task.name,
            "options": asdict(task),
            "max_length": self.settings().max_length,
            "subfolder": subfolder,
        }

        def make(path: Path) -> None:
            reference = self.reference(entry, subfolder)
            save_prediction(self.predict_all(reference, [(set_name, split)])[0], path)

        return load_prediction(self.zoo.attach(entry, f"outputs/{_short(settings)}.npz", make))

    def predict_all(self, reference: str | Path, tests: list[tuple[str, str]]) -> list[Prediction]:
        """What a model says of several sets; it is loaded once.

        Args:
            reference: a folder, or ``folder::heads/name``.
            tests: (data set, split).
        """
        opened = open_model(reference)
        tokenizer = load_tokenizer(opened)
        task = self.data.suite.task(tests[0][0])
        network = load_model(opened, task.model_class(opened.config), complete=task.complete)
        prepare_padding(network, tokenizer)
        network.to(self.device)
        said = partial(
            predict,
            network,
            tokenizer,
            opened.config,
            name=str(reference),
            batch_size=self.config.batch_size,
            max_length=self.settings().max_length,
        )
        found = []
        for set_name, split in tests:
            task, rows = self.data.suite.task(set_name), self.data.rows(set_name, split)
            found.append(said(task, rows, task.columns(rows, Columns()), self.data.space(set_name, opened.config)))
        return found


def choose_device(wanted: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is a GPU where this machine has one."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def folder_name(name: str) -> str:
    """A contributor's name as a folder."""
    return name.replace("/", "-")


def _short(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_prediction(prediction: Prediction, path: Path) -> None:
    """Write a prediction as an ``.npz`` without pickles: an array, a list of arrays, or a list of texts."""
    aligned = prediction.aligned
    facts: dict[str, Any] = {"truncated": prediction.truncated, "max_length": prediction.max_length}
    arrays: dict[str, np.ndarray] = {}
    if isinstance(aligned, np.ndarray):
        facts["kind"], arrays["values"] = "array", aligned
    elif aligned and isinstance(aligned[0], np.ndarray):
        facts["kind"], arrays["values"] = "arrays", np.concatenate(aligned)
        arrays["lengths"] = np.array([len(one) for one in aligned], np.int64)
    else:
        facts["kind"], facts["texts"] = "texts", list(aligned)
    arrays["facts"] = np.frombuffer(json.dumps(facts, ensure_ascii=False).encode(), np.uint8)
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def load_prediction(path: Path) -> Prediction:
    """The prediction of :func:`save_prediction`."""
    with np.load(path, allow_pickle=False) as stored:
        facts: dict[str, Any] = json.loads(stored["facts"].tobytes().decode())
        if facts["kind"] == "array":
            aligned: Any = stored["values"]
        elif facts["kind"] == "arrays":
            ends = np.cumsum(stored["lengths"])[:-1]
            aligned = np.split(stored["values"], ends)
        else:
            aligned = facts["texts"]
    return Prediction(aligned, int(facts["truncated"]), int(facts["max_length"]))
