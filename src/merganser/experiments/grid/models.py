"""The models of a grid: taken from the zoo, trained when absent, with their statistics and outputs beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints import open_checkpoint
from merganser.errors import CheckpointError, UserError
from merganser.experiments.grid.cells import Cell, ModelSpec
from merganser.experiments.grid.config import ExperimentConfig, ModelArgs
from merganser.experiments.grid.data import Data, data_of, digest
from merganser.experiments.grid.outputs import load_prediction, save_prediction
from merganser.experiments.zoo import Entry, Zoo
from merganser.tasks import Task
from merganser.tasks.collect import collect
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import load_model, load_tokenizer, open_model, prepare_padding
from merganser.tasks.predict import Prediction, predict
from merganser.tasks.suite import DEV, TRAIN
from merganser.training.fine_tune import train
from merganser.training.multitask import Part, train_multitask
from merganser.training.settings import TrainingSettings, defaults, make_settings


class Models:
    """Everything that the cells of an experiment ask for models.

    Args:
        config: of the experiment.
        zoo: where models are kept.
    """

    def __init__(self, config: ExperimentConfig, zoo: Zoo) -> None:
        self.config, self.zoo = config, zoo
        self.data: Data = data_of(config.suite.model_dump_json())
        self._keys: dict[ModelSpec, dict[str, Any]] = {}

    # -- what a model is made of -------------------------------------------------------------------------

    def settings(self, args: ModelArgs | None = None) -> TrainingSettings:
        """The published hyper-parameters with the configuration's changes.

        Raises:
            UserError: an unknown hyper-parameter, or a value that it cannot take.
        """
        name = "partitions" if self.config.layout == "partitions" else self.config.suite.name
        published = defaults(self._architecture(), name)
        changes = {**self.config.training, **(args.training if args else {})}
        return make_settings(**{**published.model_dump(), **changes})

    def _architecture(self) -> str:
        if self.config.pretrained.architecture:
            return self.config.pretrained.architecture
        return str(open_checkpoint(self.config.pretrained.model).config.get("model_type", ""))

    def rows(self, spec: ModelSpec) -> Rows:
        """The training rows of a contributor."""
        if spec.part is None:
            return self.data.rows(spec.set, TRAIN)
        return self.data.part(spec.set, spec.part, spec.part_seed or 0, self.config.partitions)

    def key(self, spec: ModelSpec) -> dict[str, Any]:
        """What a contributor's model depends on: its address in the zoo."""
        if spec not in self._keys:
            self._keys[spec] = self._key(spec)
        return self._keys[spec]

    def _key(self, spec: ModelSpec) -> dict[str, Any]:
        args = self._args(spec)
        return {
            "kind": "model",
            "suite": self.config.suite.name,
            "options": json.loads(json.dumps(self.config.suite.options)),
            "set": spec.set,
            "seed": spec.seed,
            "model": self.config.pretrained.title,
            "base": base_sha256(self.config.pretrained.model),
            "train": digest(self.rows(spec)),
            "dev": self.data.digest(spec.set, DEV),
            "labels": list(self.data.suite.labels(spec.set)),
            "training": self.settings(args).model_dump(mode="json"),
            **({} if spec.part is None else {"part": f"{spec.part + 1}/{self.config.partitions.parts}"}),
        }

    def _args(self, spec: ModelSpec) -> ModelArgs:
        return self.config.contributors[spec.name if spec.part is None else spec.name.rsplit("/", 1)[0]]

    # -- models ------------------------------------------------------------------------------------------

    def find(self, spec: ModelSpec) -> Entry | None:
        """The contributor's model where it is there already, without training anything."""
        args = self._args(spec)
        if args.checkpoint is not None:
            return self.zoo.get(self._checkpoint_key(args.checkpoint))
        if args.zoo_filter:
            wanted = {
                "kind": "model",
                "model": self.config.pretrained.title,
                "set": spec.set,
                "seed": spec.seed,
            }
            found = self.zoo.find(**{**wanted, **args.zoo_filter})
            if found:
                return max(found, key=lambda entry: (entry.created, entry.id))
        return self.zoo.get(self.key(spec))

    def model(self, spec: ModelSpec) -> Entry:
        """The contributor's model, trained when the zoo does not hold it.

        Raises:
            UserError: the configuration says that the zoo must hold it, and it does not; or anything that
                training raises.
        """
        args = self._args(spec)
        if args.checkpoint is not None:
            return self._adopt(args.checkpoint)
        found = None if args.load_from_zoo == "no" else self.find(spec)
        if found is not None:
            return found
        if args.load_from_zoo == "yes":
            raise UserError(
                f"the zoo holds no model of {spec.name} (seed {spec.seed}) with these settings"
                + (f" and {args.zoo_filter}" if args.zoo_filter else ""),
                where=f"contributors.{spec.name}",
                mend="set load_from_zoo: maybe to train it, or look with: merganser zoo ls",
            )
        key = self.key(spec)

        def make(folder: Path) -> Mapping[str, Any]:
            task = self.data.suite.task(spec.set)
            done = train(
                self.config.pretrained.model,
                task,
                self.rows(spec),
                labels=self.data.suite.labels(spec.set),
                output=folder / "trained",
                settings=self.settings(args),
                seed=spec.seed,
                dev=self.data.rows(spec.set, DEV),
                metric=self.data.suite.metric(spec.set),
                work=self.zoo.work(key),
            )
            _lift(folder)
            return _facts(done.dev_scores, done.best_epoch, folder)

        return self.zoo.build(key, make)

    def multitask(self, cell: Cell) -> Entry:
        """One encoder trained on the data of every contributor of a cell."""
        shared = "separate" not in self.config.heads
        settings = self.settings()
        key = {
            "kind": "multitask",
            "shared": shared,
            "parts": [self.key(spec) for spec in cell.contributors],
            "set": "+".join(spec.name for spec in cell.contributors),
            "seed": cell.seed,
            "suite": self.config.suite.name,
            "model": self.config.pretrained.title,
        }

        def make(folder: Path) -> Mapping[str, Any]:
            done = train_multitask(
                self.config.pretrained.model,
                [self.part(spec) for spec in cell.contributors],
                shared=shared,
                output=folder / "trained",
                settings=settings,
                seed=cell.seed,
                work=self.zoo.work(key),
            )
            _lift(folder)
            return _facts(done.dev_scores, done.best_epoch, folder / next(_subfolders(folder), ""))

        return self.zoo.build(key, make)

    def part(self, spec: ModelSpec, examples: Rows | None = None) -> Part:
        """A contributor's share of multi-task training."""
        return Part(
            folder_name(spec.name),
            self.data.suite.task(spec.set),
            examples or self.rows(spec),
            self.data.suite.labels(spec.set),
            self.data.rows(spec.set, DEV),
            self.data.suite.metric(spec.set),
        )

    def _checkpoint_key(self, reference: str) -> dict[str, Any]:
        return {"kind": "checkpoint", "reference": reference, "weights": base_sha256(reference)}

    def _adopt(self, reference: str) -> Entry:
        def make(folder: Path) -> Mapping[str, Any]:
            checkpoint = open_checkpoint(reference)
            checkpoint.fetch()
            shutil.copytree(checkpoint.path, folder, dirs_exist_ok=True)
            return {"weights": checkpoint.manifest_sha256()}

        return self.zoo.build(self._checkpoint_key(reference), make)

    # -- what is kept beside them ------------------------------------------------------------------------

    def statistics(self, spec: ModelSpec, kind: str) -> Path:
        """The Gram matrices (``gram``) or Fisher information (``fisher``) of a contributor's training data."""
        entry, wanted = self.model(spec), self.config.statistics
        rows, length = self.rows(spec), self.settings(self._args(spec)).max_length
        examples = wanted.examples if kind == "gram" else wanted.fisher_examples
        settings = {"rows": digest(rows), "examples": examples, "max_length": length}
        if kind == "fisher":
            settings["fisher"] = wanted.fisher
        task = self.data.suite.task(spec.set)

        def make(path: Path) -> None:
            collect(
                entry.path,
                rows,
                task=task,
                grams=kind == "gram",
                fisher=wanted.fisher if kind == "fisher" else None,
                fisher_examples=None,
                limit=examples,
                output=path,
                max_length=length,
                label=f"{self.config.suite.name}/{spec.name}",
                overwrite=True,
            )

        return self.zoo.attach(entry, f"statistics/{kind}-{_short(settings)}.safetensors", make)

    def prediction(self, entry: Entry, set_name: str, split: str, subfolder: str = "") -> Prediction:
        """What a model of the zoo says of a test or development set, run at most once."""
        task = self.data.suite.task(set_name)
        settings = {
            "rows": self.data.digest(set_name, split),
            "task": task.name,
            "options": asdict(task),
            "max_length": self.settings().max_length,
            "subfolder": subfolder,
        }

        def make(path: Path) -> None:
            reference = entry.path / subfolder if subfolder else entry.path
            save_prediction(self.predict(reference, set_name, split), path)

        return load_prediction(self.zoo.attach(entry, f"outputs/{_short(settings)}.npz", make))

    def predict(self, reference: str | Path, set_name: str, split: str) -> Prediction:
        """What any model says of a test or development set."""
        return self.predict_all(reference, [(set_name, split)])[0]

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
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        found = []
        for set_name, split in tests:
            task, rows = self.data.suite.task(set_name), self.data.rows(set_name, split)
            found.append(
                predict(
                    network,
                    tokenizer,
                    opened.config,
                    task,
                    rows,
                    task.columns(rows, Columns()),
                    self.space(set_name, task, opened.config),
                    name=str(reference),
                    batch_size=self.config.batch_size,
                    max_length=self.settings().max_length,
                )
            )
        return found

    def space(self, set_name: str, task: Task, config: Mapping[str, Any] | None = None) -> LabelSpace:
        """The labels that a data set is scored over."""
        labels = self.data.suite.labels(set_name)
        return LabelSpace(tuple(labels)) if labels else task.space(config or {})


@lru_cache(maxsize=32)
def base_sha256(reference: str) -> str:
    """The hash of all weights of a checkpoint.

    Raises:
        CheckpointError: it is neither on this machine nor to be had; says what to download and where to put it.
    """
    try:
        checkpoint = open_checkpoint(reference)
        checkpoint.fetch()
    except CheckpointError as error:
        raise CheckpointError(
            f"the pretrained model cannot be had: {error.what}",
            where=reference,
            mend=f"where there is a network, run: hf download {reference} --local-dir models/{Path(reference).name}; "
            f"copy the folder here and set pretrained.model to it (--templates base=… in the named configurations), "
            "or fill the Hugging Face cache ($HF_HOME)",
        ) from error
    return checkpoint.manifest_sha256()


def folder_name(name: str) -> str:
    """A contributor's name as a folder."""
    return name.replace("/", "-")


def _lift(folder: Path) -> None:
    """Training writes a folder whole; its content is the entry's."""
    inner = folder / "trained"
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def _subfolders(folder: Path) -> Any:
    return iter(
        [] if (folder / "config.json").exists() else sorted(p.name for p in folder.iterdir() if p.is_dir())
    )


def _facts(scores: Sequence[float], best: int | None, folder: Path) -> dict[str, Any]:
    """What the zoo remembers of a training; epochs count from 1, and without a best one the last is kept."""
    return {
        "dev_scores": [round(float(score), 6) for score in scores],
        "best_epoch": best,
        "score": round(float(scores[(best or 0) - 1]), 6) if scores else None,
        "weights": open_checkpoint(folder).manifest_sha256(),
    }


def _short(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
