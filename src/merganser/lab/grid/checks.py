"""Everything that a run would stumble over hours later, found before it starts: data, models, values."""

from __future__ import annotations

import torch

from merganser.errors import ErrorCollector, RecipeError, UserError
from merganser.lab.grid.cells import expand
from merganser.lab.grid.compute import scored_on
from merganser.lab.grid.models import Models
from merganser.lab.grid.pretrained import half_precision, weights_sha256
from merganser.lab.suites.base import DEV, TRAIN
from merganser.methods import METHODS


def check_inputs(models: Models) -> None:
    """Read all data once, hash the given models and try all values.

    Raises:
        UserError: what is missing, malformed or does not fit together, all at once.
    """
    errors = ErrorCollector()
    for reference in _references(models):
        errors.catch(weights_sha256, reference, models.allow_pickle)
    errors.catch(_check_device, models)
    for args in models.config.contributors.values():
        errors.catch(models.settings, args)
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
            errors.catch(models.data.truth, name, split)
    if len(errors.found) == before:  # what follows reads the data again
        errors.catch(_check_heads, models)
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
    wanted = "multitask" in config.comparators or any(METHODS[m.method].needs.base for m in config.methods)
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
