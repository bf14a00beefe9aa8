"""A contributor with its files open: headers of its checkpoint and statistics, and its names beside the others'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from merganser.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from merganser.checkpoints.names import align
from merganser.errors import UserError
from merganser.merging.recipe import Contributor, Recipe
from merganser.statistics import FILE_NAME, Statistics


@dataclass(frozen=True)
class Parent:
    """An open contributor (or base model).

    Attributes:
        contributor: what the recipe says of it.
        checkpoint: its files.
        statistics: its statistics, where it has any.
        names: its own name of each tensor, by the name that the first contributor gives it.
    """

    contributor: Contributor
    checkpoint: Checkpoint
    statistics: Statistics | None
    names: dict[str, str]

    @property
    def title(self) -> str:
        """What to call it in messages."""
        return self.contributor.title

    def info(self, name: str) -> TensorInfo | None:
        """Its header entry of a tensor, by the first contributor's name."""
        own = self.names.get(name)
        return None if own is None else self.checkpoint.tensors[own]

    @property
    def label_names(self) -> list[str]:
        """The labels of its head, in order; empty where its configuration names none."""
        config = self.checkpoint.config
        table = config.get("id2label")
        if not isinstance(table, dict):
            classifies = any("Classification" in str(name) for name in config.get("architectures") or [])
            return ["LABEL_0", "LABEL_1"] if classifies else []  # transformers writes no default down
        return [str(table[key]) for key in sorted(table, key=lambda key: int(key))]


def open_parents(recipe: Recipe, problems: list[UserError]) -> list[Parent]:
    """Open every contributor; what goes wrong is added to ``problems`` and the contributor left out."""
    parents: list[Parent] = []
    for contributor in recipe.contributors:
        checkpoint = _open(contributor.model, recipe, problems)
        if checkpoint is None:
            continue
        parents.append(Parent(contributor, checkpoint, _statistics(contributor, checkpoint, problems), {}))
    if not parents:
        return []
    first = parents[0].checkpoint.tensors
    return [replace(parent, names=align(first, parent.checkpoint.tensors)) for parent in parents]


def open_base(recipe: Recipe, names: list[str], problems: list[UserError]) -> Parent | None:
    """Open the base model, if the recipe names one."""
    if recipe.base is None:
        return None
    checkpoint = _open(recipe.base, recipe, problems)
    if checkpoint is None:
        return None
    return Parent(
        Contributor.model_validate({"model": recipe.base}), checkpoint, None, align(names, checkpoint.tensors)
    )


def _open(reference: str, recipe: Recipe, problems: list[UserError]) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(reference, allow_pickle=recipe.allow_pickle)
        _ = checkpoint.config  # malformed configurations are problems too
        return checkpoint
    except UserError as error:
        problems.append(error)
        return None


def _statistics(
    contributor: Contributor, checkpoint: Checkpoint, problems: list[UserError]
) -> Statistics | None:
    place = Path(contributor.statistics) if contributor.statistics else checkpoint.path / FILE_NAME
    if contributor.statistics is None and not place.is_file():
        return None
    try:
        return Statistics.open(place)
    except UserError as error:
        problems.append(error)
        return None
