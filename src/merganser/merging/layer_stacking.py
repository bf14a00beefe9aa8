"""Layers that are stacked, skipped or repeated: the result's tensors, and where each contributor has them.

The result is the model that its class builds of the configuration with the new depth, with the names that transformers
would save. A contributor's layer 7 that becomes layer 3 is seen through a view of it in which it lies there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from merganser.checkpoints import Checkpoint, TensorInfo
from merganser.checkpoints.layout import Place
from merganser.checkpoints.model_view import ModelView, canonical_shapes, make_view
from merganser.checkpoints.parts import depth_of, stacks_of
from merganser.checkpoints.sources import RenamedCheckpoint, Source
from merganser.errors import CheckpointError, ErrorCollector, RecipeError
from merganser.merging.layer_configuration import LayerOrigin, StackedModel, first_only, stacked_model, with_changes
from merganser.merging.recipe import LayerBlock, LayerSource, Recipe
from merganser.tensors import DTYPES

_TOWER = re.compile(r"vision|visual|audio|speech", re.IGNORECASE)


@dataclass(frozen=True)
class Scope:
    """The block of layers that a tensor of the result belongs to.

    Attributes:
        number: of the block.
        share: how deep in the block its layer lies, from 0 to 1.
        inside: whether it lies in a layer; else it lies before the first block, or behind the last.
    """

    number: int
    share: float
    inside: bool


class StackedCheckpoint(RenamedCheckpoint):
    """A checkpoint as it would be with other layers: for what is to be written. Its tensors are not read.

    Args:
        stored: the files of the model that the rest is taken from.
        infos: of the result's tensors.
        made: the configuration with the other layers.
    """

    def __init__(self, stored: Checkpoint, infos: Mapping[str, TensorInfo], made: StackedModel) -> None:
        Checkpoint.__init__(self, stored.name, stored.path, infos, revision=stored.revision)
        self._stored, self._sources, self._made = stored, {}, made

    @property
    def config(self) -> dict[str, Any]:
        """With what it says of the layers."""
        return self._made.values

    @property
    def per_layer(self) -> frozenset[str]:
        """The keys that say something of the layers."""
        return frozenset(".".join(path) for path in self._made.changes)

    def restacked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Another model's configuration with what this one says of the layers."""
        return with_changes(config, self._made.changes)


@dataclass(frozen=True)
class Stacking:
    """What becomes of the layers.

    Attributes:
        checkpoint: the result's tensors and configuration.
        sources: for each contributor, and for the base at last where there is one, where it has each of these tensors.
        scopes: the block that each tensor belongs to; none of another stack of layers.
        skipped: for each contributor, its stored tensors that the result has no place for, being of its layers.
        baseless: tensors of which it is not said which layer of the base they answer to.
    """

    checkpoint: StackedCheckpoint
    sources: tuple[Mapping[str, Source], ...]
    scopes: Mapping[str, Scope]
    skipped: tuple[frozenset[str], ...]
    baseless: frozenset[str]


@dataclass(frozen=True)
class _Layer:
    """A layer of the result: its block, how deep it lies in it, and each model's layer by the model's number."""

    scope: Scope
    origins: Mapping[int, int]


@dataclass(frozen=True)
class _Model:
    """One of the models.

    Attributes:
        title: what to call it.
        checkpoint, view: its files.
        other: where it has tensors that are no part of the model, by the first contributor's name.
    """

    title: str
    checkpoint: Checkpoint
    view: ModelView
    other: Mapping[str, Source]

    @property
    def model(self) -> nn.Module:
        if self.view.model is None:
            mend = "give models of a class that transformers has, or leave out layers"
            what = f"the layers of {self.title} are not known: {self.view.reason}"
            raise RecipeError(what, where="layers", mend=mend)
        return self.view.model

    @cached_property
    def stacks(self) -> dict[str, int]:
        return stacks_of(self.model)

    def own_name(self, stack: str) -> str:
        """What a stack is called in it: a model with a head has those of one without behind a prefix."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        for name in (stack, prefix + stack, stack.removeprefix(prefix), stack.partition(".")[2]):
            if name in self.stacks:
                return name
        raise RecipeError(f"{self.title} has no layers {stack}", where="layers", mend="give models of one architecture")


def stack_layers(
    recipe: Recipe,
    titles: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    views: Sequence[ModelView],
    sources: Sequence[Mapping[str, Source]],
) -> Stacking:
    """What becomes of the layers by a recipe.

    Args:
        recipe: with ``layers``.
        titles: what the contributors are called.
        checkpoints: of the contributors, and of the base at last where there is one.
        views: of these.
        sources: where each has the tensors of the first.

    Raises:
        UserError: layers that do not exist, or that do not fit together.
    """
    models = [_Model(*one) for one in zip([*titles, "base"], checkpoints, views, sources, strict=False)]
    return _StackingOf(recipe, titles, models).made()


class _StackingOf:
    """See :func:`stack_layers`."""

    def __init__(self, recipe: Recipe, titles: Sequence[str], models: Sequence[_Model]) -> None:
        self._recipe, self._models, self._count = recipe, models, len(titles)
        self._numbers: dict[str, int] = {}
        for number, (title, contributor) in enumerate(zip(titles, recipe.contributors, strict=True)):
            self._numbers.setdefault(title, number)
            self._numbers.setdefault(contributor.model, number)
        self._numbers.setdefault("base", self._count)

    def made(self) -> Stacking:
        first = self._models[0]
        problems = ErrorCollector()
        stacks = self._stacks(problems)
        problems.raise_all()
        origins = {
            stack: [[LayerOrigin(model, number) for model, number in layer.origins.items()] for layer in layers]
            for stack, layers in stacks.items()
        }
        for stack, count in first.stacks.items():  # the others stay as they are
            if stack not in stacks:
                for one in self._models[: self._count]:
                    if (has := one.stacks[one.own_name(stack)]) != count:
                        what, mend = (
                            f"{one.title} has {has} layers {stack}, not {count}",
                            f"add stack: {stack} to a block",
                        )
                        problems.add(CheckpointError(what, where="layers", mend=mend))
        problems.raise_all()
        names = [{stack: one.own_name(stack) for stack in stacks} for one in self._models]
        tensors = 2 * len(first.checkpoint.tensors) + sum(map(len, stacks.values())) * 64
        made = stacked_model(
            [one.checkpoint.config for one in self._models],
            [one.model for one in self._models],
            first.checkpoint.model_path,
            tensors,
            origins,
            names,
        )
        shapes = canonical_shapes(ModelView({}, made.model))
        view = make_view(made.values, shapes, first.checkpoint.model_path)
        self._check_widths(view, stacks)
        found = [self._sources(number, view, stacks, problems) for number in range(len(self._models))]
        problems.raise_all()
        nested = [name for name in first.checkpoint.tensors if "/" in name]
        for own, one in zip(found, self._models, strict=True):
            own |= {name: one.other[name] for name in nested if name in one.other}
        infos = {name: self._info(name, shape, found, view) for name, shape in shapes.items()}
        infos |= {name: first.checkpoint.tensors[name] for name in nested}
        scopes = {name: scope for name in shapes if (scope := self._scope(name, view, stacks)) is not None}
        return Stacking(
            StackedCheckpoint(first.checkpoint, infos, made),
            tuple(found),
            scopes,
            tuple(
                frozenset(_stored_in(one.view, [one.own_name(stack) for stack in stacks]))
                for one in self._models[: self._count]
            ),
            frozenset(
                name
                for name in shapes
                if (layer := self._layer_of(name, view, stacks)) is not None and self._count not in layer.origins
            ),
        )

    def _check_widths(self, view: ModelView, stacks: Mapping[str, Sequence[_Layer]]) -> None:
        """Refuse tensors outside the layers that have a part for each layer, which nobody says how to put together."""
        before = canonical_shapes(ModelView({}, self._models[0].model))
        for name, shape in view.shapes.items():
            if self._layer_of(name, view, stacks) is None and before.get(name, shape) != shape:
                what = f"{name} has a part for each layer: it would be {list(shape)} instead of {list(before[name])}"
                raise RecipeError(what, where="layers", mend="merge models of this class without layers:")

    def _stacks(self, problems: ErrorCollector) -> dict[str, list[_Layer]]:
        """The result's layers of each stack that the recipe speaks of."""
        found: dict[str, list[_Layer]] = {}
        for number, block in enumerate(self._recipe.layers):
            stack = problems.catch(self._stack, block, f"layers.{number}")
            if stack is None:
                continue
            wrong = [one for source in block.sources if (one := self._range_problem(source, stack, number))]
            problems.add(*wrong)
            for step in range(block.size) if not wrong else ():
                share = step / (block.size - 1) if block.size > 1 else 1.0
                origins = {self._numbers[source.contributor]: source.range[0] + step for source in block.sources}
                merged = {*origins.values()}
                if self._count < len(self._models) and self._count not in origins and len(merged) == 1:
                    (layer,) = merged
                    if layer < self._models[-1].stacks[self._models[-1].own_name(stack)]:
                        origins[self._count] = layer
                found.setdefault(stack, []).append(_Layer(Scope(number, share, True), origins))
        return found

    def _stack(self, block: LayerBlock, place: str) -> str:
        """The first model's name of the stack of layers that a block means."""
        known = self._models[0].stacks
        towers = [name for name in known if _TOWER.search(name)]
        if block.stack is None:
            usual = [name for name in known if name not in towers] or [*known]
            if len(usual) == 1:
                return usual[0]
            mend = f"say which with stack: {' or stack: '.join(usual)}" if usual else "leave out layers"
            raise RecipeError(f"this model has {len(usual)} stacks of layers", where=place, mend=mend)
        fitting = [n for n in known if n == block.stack] or [n for n in known if block.stack in n.split(".")]
        fitting = fitting or [name for name in known if block.stack in name]
        if len(fitting) != 1:
            mend = f"the stacks of layers are {', '.join(known)}"
            raise RecipeError(f"no stack of layers is meant by {block.stack!r} alone", where=place, mend=mend)
        return fitting[0]

    def _range_problem(self, source: LayerSource, stack: str, number: int) -> RecipeError | None:
        model = self._models[self._numbers[source.contributor]]
        count = model.stacks[model.own_name(stack)]
        if source.range[1] <= count:
            return None
        what = f"{source.contributor} has {count} layers, so that {list(source.range)} goes beyond them"
        return RecipeError(what, where=f"layers.{number}", mend=f"end at {count} at most")

    def _sources(
        self, number: int, view: ModelView, stacks: Mapping[str, Sequence[_Layer]], problems: ErrorCollector
    ) -> dict[str, Source]:
        """Where one of the models has each tensor of the result."""
        one = self._models[number]
        counts = {one.own_name(stack): one.stacks[one.own_name(stack)] for stack in stacks}
        places: dict[str, Place] = {}
        inside: dict[tuple[str, int], dict[str, Place]] = {}
        for parameter, place in one.view.places.items():
            if (depth := depth_of(parameter, counts)) is None:
                places[parameter] = place
            else:
                rest = parameter.removeprefix(f"{depth.stack}.{depth.number}.")
                inside.setdefault((depth.stack, depth.number), {})[rest] = place
        for stack, layers in stacks.items():
            own = one.own_name(stack)
            serving = first_only(one.model, own)
            for position, layer in enumerate(layers):
                if number not in layer.origins:
                    continue
                theirs = inside.get((own, layer.origins[number]), {})
                found_here = {rest: place for rest, place in theirs.items() if rest not in serving}
                if not position:
                    found_here |= {r: place for r, place in inside.get((own, 0), {}).items() if r in serving}
                places |= {f"{own}.{position}.{rest}": place for rest, place in found_here.items()}
        seen = replace(one.view, places=places)
        reachable = {stored for place in places.values() for stored in place.stored}
        found: dict[str, Source] = {}
        for name in view.shapes:
            source = view.source_in(seen, name)
            if source is not None and reachable.issuperset(source.tensors()):
                found[name] = source
            elif (mine := self._layer_of(name, view, stacks)) is not None and number in mine.origins:
                what = f"has nothing for {name!r} in its layer {mine.origins[number]}"
                problems.add(CheckpointError(what, where=one.checkpoint.name, mend="take another layer"))
        return found

    @staticmethod
    def _layer_of(name: str, view: ModelView, stacks: Mapping[str, Sequence[_Layer]]) -> _Layer | None:
        depth = view.parts[name].depth if name in view.parts else None
        return None if depth is None or depth.stack not in stacks else stacks[depth.stack][depth.number]

    def _info(
        self, name: str, shape: tuple[int, ...], found: Sequence[Mapping[str, Source]], view: ModelView
    ) -> TensorInfo:
        """A tensor of the result, with the dtype and shape that the first model has that has it."""
        for own, one in zip(found[: self._count], self._models, strict=False):
            if name in own:
                dtype = own[name].dtype(one.checkpoint)
                if view.parts[name].depth is None:
                    shape = own[name].shape(one.checkpoint)
                return TensorInfo(name, dtype, shape, "", 0, DTYPES[dtype].itemsize * prod(shape))
        dtype = next(iter(self._models[0].checkpoint.tensors.values())).dtype
        return TensorInfo(name, dtype, shape, "", 0, DTYPES[dtype].itemsize * prod(shape))

    def _scope(self, name: str, view: ModelView, stacks: Mapping[str, Sequence[_Layer]]) -> Scope | None:
        """The block that a tensor belongs to: outside the layers, the first one before them and the last one behind."""
        if (layer := self._layer_of(name, view, stacks)) is not None:
            return layer.scope
        if view.parts[name].depth is not None or view.model is None:
            return None
        order = {parameter: place for place, parameter in enumerate(_parameters(view.model))}
        uses = [use for use in view.uses[name] if use in order]
        others = [stack.rpartition(".")[0] for stack in self._models[0].stacks if stack not in stacks]
        if not uses or any(other and uses[0].startswith(f"{other}.") for other in others):
            return None
        for stack, layers in reversed([*stacks.items()]):
            above = stack.rpartition(".")[0]
            if len(stacks) > 1 and above and not uses[0].startswith(f"{above}."):
                continue
            start = min(place for parameter, place in order.items() if parameter.startswith(f"{stack}."))
            before = min(order[use] for use in uses) < start
            return replace(layers[0 if before else -1].scope, share=0.0, inside=False)
        return None


def _parameters(model: nn.Module) -> Iterator[str]:
    """The names of a model's parameters in its order, shared ones at every place."""
    return (name for name, _ in model.named_parameters(remove_duplicate=False))


def _stored_in(view: ModelView, stacks: Sequence[str]) -> Iterator[str]:
    """The stored tensors of some stacks of layers, and what no parameter is made of."""
    for stored, part in view.parts.items():
        if (part.depth is not None and part.depth.stack in stacks) or stored not in view.uses:
            yield stored
