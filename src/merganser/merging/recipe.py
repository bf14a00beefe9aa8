"""The recipe: what to merge and how, and the files that it names, opened.

A YAML file and the command line's flags mean the same.
"""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from merganser.checkpoints import AdapterCheckpoint, Checkpoint, TensorInfo, open_checkpoint
from merganser.checkpoints.model_view import ModelView, aligned, canonical_shapes, make_view, view_of
from merganser.checkpoints.sources import RenamedCheckpoint, Source
from merganser.documents import read_yaml
from merganser.errors import ErrorCollector, RecipeError, UserError, did_you_mean, raise_all, validated
from merganser.methods import METHODS
from merganser.methods.base import LARGEST
from merganser.paths import real
from merganser.statistics import FILE_NAME, Statistics

_LABELLED = re.compile(r"Classification|Detection|Segmentation")  # in the names of classes whose heads have labels


class Contributor(BaseModel):
    """A checkpoint that takes part in a merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="a model folder, or org/name@revision on the Hub")
    coefficient: float = Field(1.0, description="its weight in the merge, relative to the others'")
    statistics: str | None = Field(None, description="its statistics file; by default the one in its folder")
    labels: tuple[str, ...] | None = Field(None, description="the labels it votes on; by default all it knows")
    name: str | None = Field(None, description="what to call it; by default the folder's name")

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or Path(self.model.rsplit("@", 1)[0]).name


class Recipe(BaseModel):
    """A merge, as a value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contributors: tuple[Contributor, ...] = Field(description="the checkpoints to merge, at least one")
    method: str = Field("auto", description=f"auto, {', '.join(METHODS)}")
    base: str | None = Field(None, description="the pre-trained model that all of them started from")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    exclude: tuple[str, ...] = Field((), description="name patterns of tensors to average instead")
    keep_separate: tuple[str, ...] = Field((), description="name patterns of tensors that each contributor keeps")
    labels: Literal["same", "union"] = Field("same", description="union: a head that knows every label")
    vocabulary: Literal["same", "largest", "union"] = Field(
        "same", description="largest: that of the contributor that has every token; union: every token of any of them"
    )
    missing_rows: str = Field(
        "mean", description="whose row a token has that not every model knows: mean (of those that do), base, or a name"
    )
    config_from: str | None = Field(None, description="whose configuration is written where they differ, or base")
    tokenizer_from: str | None = Field(None, description="whose tokenizer, chat template and generation settings")
    dtype: Literal["F64", "F32", "F16", "BF16"] | None = Field(
        None, description="storage dtype of the result; by default the widest of the contributors'"
    )
    names: Literal["first", "canonical"] = Field(
        "first", description="of the result's tensors: the first contributor's, or those that transformers would save"
    )
    require_coverage: float | None = Field(
        None, ge=0, le=1, description="the share of the linear weights that the method has to reach"
    )
    max_shard_size: str = Field("5GB", description="largest weight file")
    accept_scales: bool = Field(
        False, description="merge statistics of another size than the others', of which one decides alone"
    )

    @field_validator("contributors", mode="before")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"model": str(item)} if isinstance(item, (str, Path)) else item for item in value]
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict):
            lists = {k: [v] for k, v in value.items() if k in ("exclude", "keep_separate") and isinstance(v, str)}
            return {**value, **lists}
        return value


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, all mistakes reported at once.

    Raises:
        RecipeError: unknown or malformed keys, coefficients that are no weights, no contributor.
        Problems: several of these.
    """
    problems = ErrorCollector()
    if "allow_pickle" in values:
        what = "a file cannot allow pickled weights: only who runs the merge can"
        problems.add(
            RecipeError(what, where=where, mend="leave out allow_pickle; if you trust the files, --allow-pickle")
        )
        values = {key: value for key, value in values.items() if key != "allow_pickle"}
    recipe = problems.catch(validated, Recipe, values, where)
    if recipe is None:
        raise_all(problems.found)
        raise RuntimeError("what is no recipe has a problem")
    if not recipe.contributors:
        problems.add(RecipeError("there is nothing to merge", where=where, mend="name at least one model"))
    problems.add(*coefficient_problems([contributor.coefficient for contributor in recipe.contributors], where))
    if recipe.method != "auto" and recipe.method not in METHODS:
        problems.add(
            RecipeError(
                f"unknown method {recipe.method!r}", where=where, mend=did_you_mean(recipe.method, [*METHODS, "auto"])
            )
        )
    problems.raise_all()
    return recipe


def coefficient_problems(coefficients: Sequence[float], where: str) -> Iterator[UserError]:
    """Coefficients that are no numbers, or that float32 sums of what they multiply cannot hold."""
    for coefficient in coefficients:
        if not math.isfinite(coefficient):
            what = f"coefficients {listed_coefficients(coefficients)} are not finite"
            yield RecipeError(what, where=where, mend=f"use numbers of at most {LARGEST:g}")
            return
        if coefficient and not 1 / LARGEST <= abs(coefficient) <= LARGEST:
            what = f"the coefficient {coefficient:g} is not between {1 / LARGEST:g} and {LARGEST:g}, nor 0"
            mend = "divide all of them by the largest: an average counts their ratios; give 0 for next to nothing"
            yield RecipeError(what, where=where, mend=mend)


def listed_coefficients(coefficients: Sequence[float]) -> str:
    """Some coefficients, for a message."""
    shown = ", ".join(f"{one:g}" for one in coefficients[:8])
    return f"[{shown}{', …' if len(coefficients) > 8 else ''}]"


def load_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe file.

    Raises:
        RecipeError: see :func:`read_mapping`.
    """
    return read_mapping(path, "a recipe", "'contributors:' and 'method:'")


def read_mapping(path: Path, what: str, keys: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: of the file.
        what: it is, such as ``a recipe``.
        keys: some that it could have, for the mend.

    Raises:
        RecipeError: unreadable, not YAML, refused (see :func:`merganser.documents.parse_yaml`), or not a mapping.
    """
    values = read_yaml(path, RecipeError)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{what} is a mapping, this is {type(values).__name__}", where=path, mend=f"write keys such as {keys}"
        )
    return values


def method_options(recipe: Recipe, method: str, where: str = "recipe") -> Any:
    """The validated options of ``method``.

    Raises:
        RecipeError: an option that the method does not have, or a value that it cannot take.
    """
    return validated(METHODS[method].options_type, recipe.options, f"{where}: options of {method}")


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
    """

    parents: tuple[Parent, ...]
    base: Parent | None
    reference: Parent

    @property
    def people(self) -> tuple[Parent, ...]:
        """Who has to fit together: the contributors, the first as the reference; of a ledger, its base before them."""
        if isinstance(self.reference.checkpoint, RenamedCheckpoint):
            return (self.reference, *self.parents[1:])
        return self.parents if self.reference in self.parents else (self.reference, *self.parents)

    @cached_property
    def alike(self) -> bool:
        """Whether all have tensors of the same names and shapes in one class, so that nothing has to be found."""
        return not _may_hold_copies(self.reference.checkpoint) and all(
            _same_files(self.reference.checkpoint, parent.checkpoint) for parent in self.people
        )

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

    Args:
        recipe: what to merge.
        allow_pickle: accept ``pytorch_model.bin`` (read with ``weights_only``); who runs the merge decides, no file.

    Raises:
        UserError: what cannot be opened; several mistakes at once as ``Problems``.
    """
    problems = ErrorCollector()
    parents = open_parents(recipe, problems, allow_pickle=allow_pickle)
    problems.raise_all()
    reference = parents[0]
    if recipe.names == "canonical":
        reference = _canonical(recipe, reference)
        parents = [replace(parent, sources=aligned(reference.view, parent.view)) for parent in parents]
    base = open_base(recipe, reference, problems, parents, allow_pickle=allow_pickle)
    problems.raise_all()
    return Inputs(tuple(parents), base, reference)


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


def _may_hold_copies(checkpoint: Checkpoint) -> bool:
    """Whether there could be second copies of tied tensors: several tables of one height, not said to be untied."""
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    if any(part.get("tie_word_embeddings") is False for part in parts):
        return False
    heights = Counter(info.shape[0] for info in checkpoint.tensors.values() if len(info.shape) == 2)
    sizes = [part.get("vocab_size") for part in parts]
    return any(type(size) is int and heights.get(size, 0) > 1 for size in sizes)


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
