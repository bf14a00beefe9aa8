"""The files that a recipe names, opened: contributors and base, headers only."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from merganser.checkpoints import (
    AdapterCheckpoint,
    Checkpoint,
    NothingChanged,
    TensorInfo,
    lack_their_base,
    open_changes,
    open_checkpoint,
)
from merganser.checkpoints.model_view import ModelView, aligned, canonical_shapes, make_view, view_of
from merganser.checkpoints.sources import RenamedCheckpoint, Source
from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.layer_stacking import Stacking, stack_layers
from merganser.merging.recipe import Contributor, Recipe
from merganser.paths import real
from merganser.statistics import FILE_NAME, Statistics
from merganser.tensors import byte_view, is_floating

_LABELLED = re.compile(r"Classification|Detection|Segmentation")  # in the names of classes whose heads have labels
#: Keys of configurations that say where they come from, and in which dtype the weights are.
_ORIGIN = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"})


@dataclass(frozen=True)
class Parent:
    """An open contributor (or base model).

    Attributes:
        contributor: what the recipe says of it.
        checkpoint: its files.
        statistics: its statistics, where it has any.
        sources: where it has each tensor, by the name that the first contributor's files give it.
    """

    contributor: Contributor
    checkpoint: Checkpoint
    statistics: Statistics | None
    sources: dict[str, Source]

    @property
    def title(self) -> str:
        """What to call it in messages."""
        return self.contributor.title

    def info(self, name: str) -> TensorInfo | None:
        """Its header entry of a tensor, by the first contributor's name; of one made of parts, as if it lay so."""
        return self._infos.get(name)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        found, stored = {}, self.checkpoint.tensors
        for name, source in self.sources.items():
            if source.is_whole:
                found[name] = stored[source.tensor]
            else:
                shape = source.shape(self.checkpoint)
                found[name] = replace(stored[source.leaf.tensor], name=name, shape=shape)
        return found

    @cached_property
    def view(self) -> ModelView:
        """It as the model that opens from it."""
        return view_of(self.checkpoint)

    @property
    def copies(self) -> frozenset[str]:
        """Second copies of tied tensors, by their bytes; of files that are not here yet, what could be copies.

        transformers ties two tensors that are both stored only where they are equal.
        """
        checkpoint = self.checkpoint
        return frozenset(
            name
            for name, first in self.view.duplicates.items()
            if not checkpoint.is_here or checkpoint.hash(name, "blake3") == checkpoint.hash(first, "blake3")
        )

    @property
    def label_names(self) -> list[str]:
        """The labels of its head, in order; empty where its configuration names none."""
        config = self.checkpoint.config
        table = config.get("id2label")
        if not isinstance(table, dict):
            classifies = any(_LABELLED.search(str(name)) for name in config.get("architectures") or [])
            return ["LABEL_0", "LABEL_1"] if classifies else []  # transformers writes no default down
        return [str(table[key]) for key in sorted(table, key=lambda key: int(key))]


@dataclass(frozen=True)
class Inputs:
    """The open files that a plan is made from and carried out with.

    Attributes:
        parents: the contributors.
        base: the base model, where there is one.
        reference: whose names and side files the result takes: the first contributor, or a ledger's base.
        stacking: what becomes of the layers, where the recipe says it.
    """

    parents: tuple[Parent, ...]
    base: Parent | None
    reference: Parent
    stacking: Stacking | None = None

    @property
    def people(self) -> tuple[Parent, ...]:
        """Who has to fit together: the contributors, the first as the reference; of a ledger, its base before them."""
        if isinstance(self.reference.checkpoint, RenamedCheckpoint | NothingChanged):
            return (self.reference, *self.parents[1:])
        return self.parents if self.reference in self.parents else (self.reference, *self.parents)

    @cached_property
    def alike(self) -> bool:
        """Whether all, and the base, have tensors of the same names and shapes in one class with one configuration.

        Then nothing has to be found, if there are no second copies of tied tensors either.
        """
        first = self.reference.checkpoint
        others = [parent.checkpoint for parent in (*self.people, *([self.base] if self.base else []))]
        return (
            self.stacking is None
            and all(same_configurations(first, other) and _same_files(first, other) for other in others)
            and not _may_hold_copies(first)
        )

    @cached_property
    def trained_matrices(self) -> bool:
        """Whether names and shapes tell that every tensor is trained and one: no buffer, and no stack of experts.

        In the classes of transformers, what is called ``weight`` or ``bias`` and has no more than two dimensions is no
        stack, and a buffer only in a norm that has its statistics beside it.
        """
        stored = self.reference.checkpoint.tensors.items()
        floating = ((name, info.shape) for name, info in stored if is_floating(info.dtype))
        return all(name.rpartition(".")[2] in ("weight", "bias") and len(shape) < 3 for name, shape in floating)

    @property
    def without_base(self) -> bool:
        """Whether these are adapters without their base, of which the tensors are changes."""
        return isinstance(self.reference.checkpoint, NothingChanged)

    @property
    def of_ledger(self) -> bool:
        """Whether the names are those of a ledger's base."""
        return len(self.people) > len(self.parents)

    @property
    def sources(self) -> list[Parent]:
        """Everything that tensors are read from."""
        return [*self.parents, *([self.base] if self.base else [])]


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection for a while: tens of thousands of small values are made that all stay alive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collection()
def open_inputs(recipe: Recipe, *, allow_pickle: bool = False) -> Inputs:
    """Open the files that a recipe names, reading headers only.

    Where all are adapters and their base is not to be had, they are opened without it.

    Args:
        recipe: what to merge.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only``); who runs the merge decides, no file.

    Raises:
        UserError: what cannot be opened; several mistakes at once as ``Problems``.
    """
    problems, models = ErrorCollector(), [contributor.model for contributor in recipe.contributors]
    if recipe.without_base:
        return _inputs_without_base(recipe, models, allow_pickle)
    parents = open_parents(recipe, problems, allow_pickle=allow_pickle)
    if problems.found and recipe.base is None and lack_their_base(models, allow_pickle=allow_pickle):
        return _inputs_without_base(recipe, models, allow_pickle)
    problems.raise_all()
    reference = parents[0]
    if recipe.names == "canonical" and not recipe.layers:
        reference = _canonical(recipe, reference)
        parents = [replace(parent, sources=aligned(reference.view, parent.view)) for parent in parents]
    base = open_base(recipe, reference, problems, parents, allow_pickle=allow_pickle)
    for place, part in recipe.places() if base is None else ():
        if "base" in part.named and all(parent.title != "base" for parent in parents):
            problems.add(RecipeError("there is no base model", where=place, mend="add base: MODEL"))
    problems.raise_all()
    return _stacked(recipe, parents, base) if recipe.layers else Inputs(tuple(parents), base, reference)


def _stacked(recipe: Recipe, parents: Sequence[Parent], base: Parent | None) -> Inputs:
    """The models with their layers where the result has them.

    Raises:
        UserError: layers that do not exist or do not fit together, or a recipe that means the names in the files.
    """
    if recipe.keep_separate:
        what = "heads that are kept separate cannot go with layers that are stacked"
        raise RecipeError(what, where="keep_separate", mend="leave out keep_separate or layers")
    everyone = [*parents, *([base] if base else [])]
    found = stack_layers(
        recipe,
        [parent.title for parent in parents],
        [one.checkpoint for one in everyone],
        [one.view for one in everyone],
        [one.sources for one in everyone],
    )
    people = [replace(one, sources=dict(own)) for one, own in zip(everyone, found.sources, strict=True)]
    own = {name: Source(name) for name in found.checkpoint.tensors}
    reference = Parent(parents[0].contributor, found.checkpoint, None, own)
    return Inputs(tuple(people[: len(parents)]), people[-1] if base else None, reference, found)


def _inputs_without_base(recipe: Recipe, models: Sequence[str], allow_pickle: bool) -> Inputs:
    """Adapters beside a base of zeros; their statistics are of weights that are not here."""
    found = open_changes(models, base=recipe.base, allow_pickle=allow_pickle)

    def parent(contributor: Contributor, checkpoint: Checkpoint) -> Parent:
        return Parent(contributor, checkpoint, None, {name: Source(name) for name in checkpoint.tensors})

    parents = tuple(map(parent, recipe.contributors, found.adapters))
    base = parent(Contributor.model_validate({"model": found.base.name}), found.base)
    return Inputs(parents, base, parent(recipe.contributors[0], found.everything))


def _canonical(recipe: Recipe, first: Parent) -> Parent:
    """The first contributor as if its files had the names that transformers would write.

    Raises:
        RecipeError: there are no such names, or patterns of the recipe mean the names of the files.
    """
    where, view = "names", first.view
    if view.model is None:
        mend = "leave it out: the result has the first contributor's names"
        raise RecipeError(f"{first.title} has no canonical names: {view.reason}", where=where, mend=mend)
    if recipe.keep_separate:
        what = "keep_separate means the names in the files, which canonical names replace"
        raise RecipeError(what, where=where, mend="leave one of them out")
    wanted = make_view(first.checkpoint.config, canonical_shapes(view), first.checkpoint.model_path)
    checkpoint = RenamedCheckpoint(first.checkpoint, aligned(wanted, view))
    return Parent(first.contributor, checkpoint, None, {name: Source(name) for name in checkpoint.tensors})


def open_parents(recipe: Recipe, problems: ErrorCollector, *, allow_pickle: bool = False) -> list[Parent]:
    """Open every contributor; what goes wrong is added to ``problems`` and the contributor left out.

    Adapters of one base share it, so that it is hashed once.
    """
    parents: list[Parent] = []
    known: dict[str, Checkpoint] = {}
    for contributor in recipe.contributors:
        checkpoint = _open(contributor.model, recipe, problems, known, allow_pickle)
        if checkpoint is None:
            continue
        parents.append(Parent(contributor, checkpoint, _statistics(contributor, checkpoint, problems), {}))
    if not parents:
        return []
    return [replace(parent, sources=_sources(parents[0], parent)) for parent in parents]


def _sources(reference: Parent, parent: Parent) -> dict[str, Source]:
    """Where a model has each tensor of the reference; what is alike is not asked for in the model view."""
    if _same_files(reference.checkpoint, parent.checkpoint):
        return {name: Source(name) for name in parent.checkpoint.tensors}
    return aligned(reference.view, parent.view)


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether tensors and class have the same names, and tensors the same shapes."""
    classes = [[checkpoint.config.get(key) for key in ("model_type", "architectures")] for checkpoint in (one, other)]
    shapes = [{name: info.shape for name, info in checkpoint.tensors.items()} for checkpoint in (one, other)]
    return classes[0] == classes[1] and shapes[0] == shapes[1]


def same_configurations(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two configurations are the same, but for who wrote them, and for the dtype, which the result states."""
    said = [json.dumps(_without_origin(checkpoint.config), sort_keys=True) for checkpoint in (one, other)]
    return said[0] == said[1]  # as text, in which 1 is not true


def _without_origin(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_origin(inner) for key, inner in value.items() if key not in _ORIGIN}


def _may_hold_copies(checkpoint: Checkpoint) -> bool:
    """Whether there could be second copies of tied tensors: two of one shape that have the same row in their middle.

    Embeddings, heads and whole stacks of layers are tied to one another, so that it is enough to look at what lies
    outside of layers, and at the matrices of the first layers.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        numbers = {part for part in name.split(".") if part.isdecimal()}
        if info.shape and (not numbers or (numbers == {"0"} and len(info.shape) == 2)):
            groups.setdefault((info.dtype, info.shape), []).append(name)
    several = [(shape, names) for (_, shape), names in groups.items() if len(names) > 1]
    if several and not checkpoint.is_here:
        return True
    for shape, names in several:
        start, stop = (shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else (0, shape[0])
        rows = [checkpoint.read(name, start, stop) for name in names]
        if len({bytes(byte_view(row)) for row in rows}) < len(rows):
            return True
    return False


def open_base(
    recipe: Recipe,
    reference: Parent | None,
    problems: ErrorCollector,
    parents: Sequence[Parent] = (),
    *,
    allow_pickle: bool = False,
) -> Parent | None:
    """Open the base model that the recipe names; without one, that of the contributors, if all are adapters of it.

    Args:
        recipe: the merge.
        reference: whose names of tensors count; None: the base's own.
        problems: receives what cannot be opened.
        parents: the open contributors.
        allow_pickle: see :func:`open_inputs`.
    """
    if recipe.base is None:
        checkpoint = shared_base(parents)
    else:
        checkpoint = _open(recipe.base, recipe, problems, {}, allow_pickle)
    if checkpoint is None:
        return None
    contributor = Contributor.model_validate({"model": recipe.base or checkpoint.name})
    parent = Parent(contributor, checkpoint, None, {})
    return replace(parent, sources=_sources(reference or parent, parent))


def shared_base(parents: Sequence[Parent]) -> Checkpoint | None:
    """The model that every contributor is an adapter of; None where they have no such base in common."""
    checkpoints = [parent.checkpoint for parent in parents]
    bases = [one.base for one in checkpoints if isinstance(one, AdapterCheckpoint)]
    places = {(real(base.path), base.revision) for base in bases}
    return bases[0] if len(bases) == len(checkpoints) and len(places) == 1 else None


def _open(
    reference: str, recipe: Recipe, problems: ErrorCollector, known: dict[str, Checkpoint], allow_pickle: bool
) -> Checkpoint | None:
    checkpoint = problems.catch(open_checkpoint, reference, allow_pickle=allow_pickle, known=known, base=recipe.base)
    sound = checkpoint is not None and problems.catch(lambda: checkpoint.config) is not None
    return checkpoint if sound else None


def _statistics(contributor: Contributor, checkpoint: Checkpoint, problems: ErrorCollector) -> Statistics | None:
    folder = checkpoint.home.path
    if contributor.statistics is None and not (folder / FILE_NAME).is_file():
        return None
    return problems.catch(Statistics.open, contributor.statistics or folder)


def pin(model: str, revision: str) -> str:
    """A Hub reference at a commit."""
    return f"{model.rsplit('@', 1)[0]}@{revision}"
