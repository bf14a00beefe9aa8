"""Everything that a run would stumble over hours later, found before it starts: data, models, values."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from merganser.checkpoints import open_checkpoint
from merganser.errors import ErrorCollector, RecipeError, UserError, did_you_mean, require
from merganser.files import is_url
from merganser.lab.grid.cells import expand
from merganser.lab.grid.compute import scored_on
from merganser.lab.grid.models import Models
from merganser.lab.grid.pretrained import half_precision, weights_sha256
from merganser.lab.suites.base import DEV, TRAIN
from merganser.lab.zoo.keys import flatten
from merganser.tasks.models import open_model


def check_inputs(models: Models) -> None:
    """Read all data once, hash the given models and try all values.

    Raises:
        UserError: what is missing, malformed or does not fit together, all at once.
    """
    errors = ErrorCollector()
    for reference in _references(models):
        errors.catch(weights_sha256, reference, models.allow_pickle)
    errors.catch(_check_device, models)
    errors.catch(_check_place, models)
    errors.catch(_check_architecture, models)
    errors.catch(_check_methods, models)
    for args in models.config.contributors.values():
        settings = errors.catch(models.settings, args)
        if settings is not None and settings.lora is not None:
            errors.catch(require, "train", "a LoRA adapter", "peft", where="training.lora")
    for method in models.config.methods:
        if method.finetune is not None:
            errors.catch(models.tuned, method.finetune)
    before, wanted = len(errors.found), sorted(splits_of(models))
    there = set(models.data.suite.sets())
    absent = list(dict.fromkeys(name for name, _ in wanted if name not in there))
    if absent:  # one folder that is not there is one mistake
        errors.add(models.data.suite.missing(*absent))
    for name, split in wanted:
        if name in there:
            errors.catch(models.data.check, name, split)
    if len(errors.found) == before:  # what follows reads the data again
        errors.catch(_check_heads, models)
        errors.catch(_check_given, models)
        errors.catch(_check_patterns, models)
        errors.catch(_check_filters, models)
        parts = {spec for cell in expand(models.config) for spec in cell.contributors if spec.part is not None}
        for spec in sorted(parts, key=str):
            errors.catch(models.rows, spec)
    errors.raise_all()


def remarks(models: Models) -> list[str]:
    """What holds of the inputs of a run and may not be expected."""
    sets = dict.fromkeys(name for name, _ in sorted(splits_of(models)))
    return [
        *models.config.remarks(),
        *filter(None, (half_precision(reference, models.allow_pickle) for reference in _references(models))),
        *(remark for name in sets for remark in models.data.suite.remarks(name)),
    ]


def splits_of(models: Models) -> set[tuple[str, str]]:
    """Every (data set, split) that a run reads."""
    cells = expand(models.config)
    found = {(name, split) for cell in cells for name, split, _ in scored_on(models.config, cell)}
    return found | {(spec.set, split) for cell in cells for spec in cell.contributors for split in (TRAIN, DEV)}


def _references(models: Models) -> list[str]:
    """The pretrained model, where anything is made from it, and the models of one's own."""
    config = models.config
    given = [args.checkpoint for args in config.contributors.values()]
    wanted = "multitask" in config.comparators or any(m.needs.base for m in config.methods)
    base = [config.pretrained.model] if wanted or None in given else []
    return list(dict.fromkeys([*base, *(one for one in given if one is not None)]))


def _check_device(models: Models) -> None:
    if models.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here", where="resources.device", mend="give cpu or auto")


def _check_heads(models: Models) -> None:
    """Heads that are merged are those of one task with one list of labels."""
    config, suite = models.config, models.data.suite
    if config.layout == "partitions" or set(config.heads) == {"separate"}:
        return
    first, *others = config.ordered
    for other in others:
        one, two = config.set_of(first), config.set_of(other)
        if suite.labels(one) != suite.labels(two) or type(suite.task(one)) is not type(suite.task(two)):
            first_labels, others_labels = (", ".join(suite.labels(name)) for name in (one, two))
            what = (
                f"{one} and {two} are different tasks ({first_labels} and {others_labels}): their heads can be neither "
                "merged nor averaged"
            )
            mend = "give heads: separate, with which each contributor keeps its own"
            raise RecipeError(what, where="heads", mend=mend)


def _check_place(models: Models) -> None:
    """The zoo can lie where it is to lie."""
    place = models.zoo.url
    if not is_url(place) and Path(place).exists() and not Path(place).is_dir():
        raise UserError("the zoo's place is no folder", where=place, mend="give a folder with --zoo or local_zoo_dir")


def _check_architecture(models: Models) -> None:
    """The architecture that chooses the published hyper-parameters is the pretrained model's."""
    said, model_type = models.config.pretrained.architecture, _model_type(models.config.pretrained.model, models)
    if said is None or model_type is None or said == model_type:
        return
    what = f"the pretrained model is of type {model_type!r}, not {said!r}"
    raise RecipeError(what, where="pretrained.architecture", mend=f"give {model_type}, or leave it out")


def _model_type(reference: str, models: Models) -> str | None:
    """The type of a model; None where it cannot be opened, which is said elsewhere."""
    try:
        return str(open_checkpoint(reference, allow_pickle=models.allow_pickle).config.get("model_type"))
    except UserError:
        return None


def _check_methods(models: Models) -> None:
    """Methods have their packages, and as many contributors as they merge."""
    errors, cells = ErrorCollector(), expand(models.config)
    for config in models.config.methods:
        needs = config.needs
        where = f"methods: {config.key}"
        if needs.package is not None and find_spec(needs.package[0]) is None:
            what = f"method {config.method!r} needs {needs.package[1]}, which is not installed"
            errors.add(RecipeError(what, where=where, mend=f"pip install {needs.package[1]}"))
        counts = {len(cell.contributors) for cell in cells if cell.method == config.key}
        if needs.models is not None and counts - {needs.models}:
            what = f"method {config.method!r} merges exactly {needs.models} models"
            errors.add(RecipeError(what, where=where, mend="give layout: pairs, or leave this method out"))
    errors.raise_all()


def _check_given(models: Models) -> None:
    """Models of one's own are of the pretrained model's type, with a head for the data set's labels."""
    config, errors = models.config, ErrorCollector()
    wanted = _model_type(config.pretrained.model, models)
    for name, args in config.contributors.items():
        if args.checkpoint is None:
            continue
        where, found = f"contributors.{name}.checkpoint", _model_type(args.checkpoint, models)
        if found is not None and wanted is not None and found != wanted:
            what = f"a model of type {found!r}, and the pretrained model is of type {wanted!r}"
            errors.add(RecipeError(what, where=where, mend="give a fine-tune of the pretrained model"))
        elif found is not None and (labels := models.data.suite.labels(config.set_of(name))):
            outputs = open_checkpoint(args.checkpoint, allow_pickle=models.allow_pickle).config.get("id2label")
            if isinstance(outputs, dict) and len(outputs) != len(labels):
                what = f"its head has {len(outputs)} labels, {config.set_of(name)} has {len(labels)}"
                errors.add(RecipeError(what, where=where, mend=f"give a model with a head for {_few(labels)}"))
    errors.raise_all()


def _check_patterns(models: Models) -> None:
    """Tensors that a method is to leave out are there: a pattern that means none is a mistake, as in any merge."""
    config, errors = models.config, ErrorCollector()
    wanted = [(f"methods: {method.key}: exclude", one) for method in config.methods for one in method.exclude]
    wanted += [("separate", pattern) for pattern in config.separate]
    names = _tensor_names(models) if wanted else frozenset()
    for where, pattern in wanted:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            what = f"no tensor of the fine-tuned models is called {pattern!r}"
            mend = f"use a name or a pattern with *, such as {min(names)!r}"
            errors.add(RecipeError(what, where=where, mend=mend))
    errors.raise_all()


def _tensor_names(models: Models) -> frozenset[str]:
    """Names of a fine-tuned model's tensors: the pretrained model's, and those of the task's class; none if unknown."""
    try:
        opened = open_model(models.config.pretrained.model, allow_pickle=models.allow_pickle)
    except UserError:  # which is said elsewhere
        return frozenset()
    names = set(opened.checkpoint.tensors)
    classes = {
        models.data.suite.task(models.config.set_of(name)).model_class(opened.config)
        for name in models.config.contributors
    }
    for name in sorted(one for one in classes if one.startswith("Auto")):  # others are the pretrained model's own
        try:
            config = transformers.AutoConfig.from_pretrained(opened.root / opened.subfolder)
            with torch.device("meta"):
                names |= set(getattr(transformers, name).from_config(config).state_dict())
        except (OSError, ValueError):  # an architecture that is not transformers' own
            return frozenset()
    return frozenset(names)


def _check_filters(models: Models) -> None:
    """A zoo_filter names what keys of the zoo have: nothing is ever found by another name."""
    errors = ErrorCollector()
    specs = {spec.name: spec for cell in expand(models.config) for spec in cell.contributors}
    known: set[str] = set()
    for args, spec in ((models.args(spec), spec) for spec in specs.values() if models.args(spec).zoo_filter):
        known = known or {name for entry in models.zoo.ls() for name in flatten(entry.key)}
        names = known | set(flatten(models.key(spec)))
        for name in args.zoo_filter:
            if name not in names:
                what = f"no key of a model has the name {name!r}"
                errors.add(RecipeError(what, where="zoo_filter", mend=did_you_mean(name, names)))
    errors.raise_all()


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
