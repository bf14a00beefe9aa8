"""A contributor with its files open: headers of its checkpoint and statistics, and its names beside the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merganser.checkpoints import AdapterCheckpoint, Checkpoint, TensorInfo, open_checkpoint
from merganser.checkpoints.reader import align
from merganser.errors import UserError, raise_all
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


@dataclass(frozen=True)
class Inputs:
    """The open files that a plan is made from and carried out with.

    Attributes:
        parents: the contributors.
        base: the base model, where there is one.
        reference: whose names and side files the result takes: the first contributor, or a ledger's base.
    """

    parents: tuple[Parent, ...]
    base: Parent | None
    reference: Parent

    @property
    def sources(self) -> list[Parent]:
        """Everything that tensors are read from."""
        return [*self.parents, *([self.base] if self.base else [])]


def open_inputs(recipe: Recipe) -> Inputs:
    """Open the files that a recipe names, reading headers only.

    Raises:
        UserError: what cannot be opened; several mistakes at once as ``Problems``.
    """
    problems: list[UserError] = []
    parents = open_parents(recipe, problems)
    raise_all(problems)
    base = open_base(recipe, list(parents[0].checkpoint.tensors), problems, parents)
    raise_all(problems)
    return Inputs(tuple(parents), base, parents[0])


def open_parents(recipe: Recipe, problems: list[UserError]) -> list[Parent]:
    """Open every contributor; what goes wrong is added to ``problems`` and the contributor left out.

    Adapters of one base share it, so that it is hashed once.
    """
    parents: list[Parent] = []
    known: dict[str, Checkpoint] = {}
    for contributor in recipe.contributors:
        checkpoint = _open(contributor.model, recipe, problems, known)
        if checkpoint is None:
            continue
        parents.append(Parent(contributor, checkpoint, _statistics(contributor, checkpoint, problems), {}))
    if not parents:
        return []
    first = parents[0].checkpoint.tensors
    return [replace(parent, names=align(first, parent.checkpoint.tensors)) for parent in parents]


def open_base(
    recipe: Recipe, names: list[str], problems: list[UserError], parents: Sequence[Parent] = ()
) -> Parent | None:
    """Open the base model that the recipe names; without one, that of the contributors, if all are adapters of it.

    Args:
        recipe: the merge.
        names: the first contributor's names of tensors.
        problems: receives what cannot be opened.
        parents: the open contributors.
    """
    if recipe.base is None:
        checkpoint = shared_base(parents)
    else:
        checkpoint = _open(recipe.base, recipe, problems, {})
    if checkpoint is None:
        return None
    contributor = Contributor.model_validate({"model": recipe.base or checkpoint.name})
    return Parent(contributor, checkpoint, None, align(names, checkpoint.tensors))


def shared_base(parents: Sequence[Parent]) -> Checkpoint | None:
    """The model that every contributor is an adapter of; None where they have no such base in common."""
    checkpoints = [parent.checkpoint for parent in parents]
    bases = [one.base for one in checkpoints if isinstance(one, AdapterCheckpoint)]
    places = {(base.path.resolve(), base.revision) for base in bases}
    return bases[0] if len(bases) == len(checkpoints) and len(places) == 1 else None


def _open(reference: str, recipe: Recipe, problems: list[UserError], known: dict[str, Checkpoint]) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(reference, allow_pickle=recipe.allow_pickle, known=known)
        _ = checkpoint.config  # malformed configurations are problems too
        return checkpoint
    except UserError as error:
        problems.append(error)
        return None


def _statistics(contributor: Contributor, checkpoint: Checkpoint, problems: list[UserError]) -> Statistics | None:
    place = Path(contributor.statistics) if contributor.statistics else checkpoint.home.path / FILE_NAME
    if contributor.statistics is None and not place.is_file():
        return None
    try:
        return Statistics.open(place)
    except UserError as error:
        problems.append(error)
        return None


def pin(model: str, revision: str) -> str:
    """A Hub reference at a commit."""
    return f"{model.rsplit('@', 1)[0]}@{revision}"
