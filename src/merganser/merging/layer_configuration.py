"""The configuration of a model whose layers are stacked, skipped or repeated, found through its own class.

Which key says how many layers a stack has is found by trying: the model class is asked on the meta device what another
number changes. What a configuration says layer by layer (``layer_types``, ``no_rope_layers``) follows the layers, and
so do lists of layers' numbers (``mlp_only_layers``). At the end each layer of the result has to be built as the layer
that it comes from; what cannot be said by the configuration is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from merganser.checkpoints.layers import build_empty, make_config
from merganser.checkpoints.parts import stacks_of
from merganser.errors import CheckpointError, RecipeError

Path_ = tuple[str, ...]  # of keys, from the outermost
_INDEX = re.compile(r"(^|_)(idx|index|id|ids|number|num|depth)$")  # attributes that tell layers apart and do nothing
_LISTS_OF_NUMBERS = re.compile(r"layers|layer_ids|idx|indices|indexes")
_SCALARS = re.compile(r"dense|sparse|step|every|interval|freq|period|offset|pattern|window_layers|shared")
_MOST_BUILDS = 300


@dataclass(frozen=True)
class LayerOrigin:
    """The layer of a model that a layer of the result comes from.

    Attributes:
        model: which of the models.
        number: of its layer, from 0.
    """

    model: int
    number: int


@dataclass(frozen=True)
class StackedModel:
    """A model with other layers, and what its configuration says.

    Attributes:
        values: of ``config.json``.
        model: on the meta device.
        changes: what the configuration says of the layers, by its place.
    """

    values: dict[str, Any]
    model: nn.Module
    changes: dict[Path_, Any]


def with_changes(values: Mapping[str, Any], changes: Mapping[Path_, Any]) -> dict[str, Any]:
    """Values of a configuration with others in some places."""
    found = dict(values)
    for (key, *rest), value in changes.items():
        found[key] = with_changes(found.get(key) or {}, {tuple(rest): value}) if rest else value
    return found


def stacked_model(
    configurations: Sequence[Mapping[str, Any]],
    models: Sequence[nn.Module],
    folder: Path,
    tensors: int,
    stacks: Mapping[str, Sequence[Sequence[LayerOrigin]]],
    names: Sequence[Mapping[str, str]],
) -> StackedModel:
    """The model that the first one becomes with other layers.

    Args:
        configurations: of the models, as their files have them.
        models: on the meta device.
        folder: of the first configuration.
        tensors: about how many the result has.
        stacks: for each stack of the first model, for each layer of the result the layers that it comes from; they have
            to be built alike.
        names: for each model, what each of these stacks is called in it.

    Raises:
        RecipeError: what the layers are cannot be said by the configuration.
        CheckpointError: there is no such model.
    """
    values, changes = dict(configurations[0]), dict[Path_, Any]()
    resolved = [make_config(one, folder).to_dict() for one in configurations]
    for stack, layers in stacks.items():
        found = _depth_key(values, resolved[0], stack, folder, tensors)
        depths = [len(_layers(one, own[stack])) for one, own in zip(models, names, strict=True)]
        changes |= _said(found, resolved, layers, depths)
    aliases = getattr(type(make_config(values, folder)), "attribute_map", {})
    for path in [*changes]:
        for alias, meant in aliases.items():
            if path[-1] == meant and len(path) == 1:
                values.pop(alias, None)
    values = with_changes(values, changes)
    model = _built(values, folder, tensors)
    if not (differing := _differing(model, models, stacks, names)):
        return StackedModel(values, model, changes)

    def tried(more: Mapping[Path_, Any]) -> tuple[nn.Module | None, list[tuple[str, int, str]]]:
        try:
            other = _built(with_changes(values, more), folder, tensors)
        except CheckpointError:
            return None, []
        return other, _differing(other, models, stacks, names)

    depth = max(map(len, stacks.values()))
    for more in _attempts(make_config(values, folder).to_dict(), dict.fromkeys(changes, depth), tried):
        other, left = tried(more)
        if other is not None and not left:
            return StackedModel(with_changes(values, more), other, {**changes, **more})
    stack, number, what = differing[0]
    raise RecipeError(
        f"layer {number} of {stack} would be built otherwise than the layer that it comes from ({what}), and the "
        "configuration cannot say it",
        where="layers",
        mend="put layers where the model has layers of this kind, such as a whole period of its pattern",
    )


def _built(values: Mapping[str, Any], folder: Path, tensors: int) -> nn.Module:
    return build_empty(values, folder, tensors)


def _places(values: Mapping[str, Any], prefix: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _places(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _at(values: Mapping[str, Any], path: Path_) -> Any:
    found: Any = values
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _depth_key(values: Mapping[str, Any], resolved: Mapping[str, Any], stack: str, folder: Path, tensors: int) -> Path_:
    """The key that says how many layers a stack has: one more changes this stack and no other."""
    before = stacks_of(_built(values, folder, tensors))
    count = before[stack]
    candidates = [path for path, value in _places(resolved) if value == count and type(value) is int]
    candidates.sort(key=lambda path: ("layer" not in path[-1], len(path)))
    for path in candidates:
        beside = [(p, v) for p, v in _places(resolved) if p[:-1] == path[:-1] and isinstance(v, list)]
        longer = {p: [*v, v[-1]] for p, v in beside if len(v) == count and not _is_index(v, count)}
        others = {p: v for p, v in _places(resolved) if p != path and p in candidates and p[:-1] == path[:-1]}
        try:
            after = stacks_of(_built(with_changes(values, {**others, **longer, path: count + 1}), folder, tensors))
        except CheckpointError:
            continue
        if after == {**before, stack: count + 1}:
            return path
    raise RecipeError(
        f"no key of the configuration says how many layers {stack} has",
        where="layers",
        mend="merge models of this class layer by layer, without layers:",
    )


def _is_index(value: Sequence[Any], count: int) -> bool:
    """Whether a list holds numbers of layers, in order."""
    numbers = all(type(one) is int and 0 <= one < count for one in value)
    return numbers and all(a < b for a, b in pairwise(value)) and (len(value) != 1 or count > 1)


def _said(
    path: Path_, resolved: Sequence[Mapping[str, Any]], layers: Sequence[Sequence[LayerOrigin]], depths: Sequence[int]
) -> dict[Path_, Any]:
    """The depth, and every list beside it that goes layer by layer or holds layers' numbers."""
    first = [origins[0] for origins in layers]
    changes: dict[Path_, Any] = {path: len(layers)}
    for place, value in _places(resolved[0]):
        if place[:-1] != path[:-1] or not isinstance(value, list):
            continue
        theirs = [_at(one, place) for one in resolved]
        if _is_index(value, depths[0]) and (value or _LISTS_OF_NUMBERS.search(place[-1])):
            if _LISTS_OF_NUMBERS.search(place[-1]):
                changes[place] = [n for n, one in enumerate(first) if one.number in (theirs[one.model] or ())]
        elif len(value) == depths[0] and all(
            isinstance(own, list) and len(own) == depths[n] for n, own in enumerate(theirs)
        ):
            changes[place] = [theirs[one.model][one.number] for one in first]
    return changes


def _attempts(
    resolved: Mapping[str, Any],
    depths: Mapping[Path_, int],
    tried: Callable[[Mapping[Path_, Any]], tuple[nn.Module | None, list[tuple[str, int, str]]]],
) -> Iterator[dict[Path_, Any]]:
    """Other values that might say of the layers what they are: single numbers, and lists of the layers that differ.

    Args:
        resolved: the configuration as its class has it.
        depths: the number of layers, by what is said of them already.
        tried: the layers that are built otherwise with other values.
    """
    places, depth = [*_places(resolved)], max(depths.values())
    lists = [p for p, v in places if isinstance(v, list) and p[-1].endswith("layers") and (not v or type(v[0]) is int)]
    scalars = [p for p, v in places if type(v) is int and _SCALARS.search(p[-1]) and depths.get(p) is None]
    builds = 0
    for first in [dict[Path_, Any](), *({scalar: 1} for scalar in scalars)]:
        for place in lists:
            built, differing = tried({**first, place: []})
            builds += 2
            if built is not None and builds < _MOST_BUILDS:
                yield {**first, place: sorted({number for _, number, _ in differing})}
    for scalar in scalars:
        for number in range(depth + 1):
            if (builds := builds + 1) < _MOST_BUILDS:
                yield {scalar: number}


def _differing(
    model: nn.Module,
    models: Sequence[nn.Module],
    stacks: Mapping[str, Sequence[Sequence[LayerOrigin]]],
    names: Sequence[Mapping[str, str]],
) -> list[tuple[str, int, str]]:
    """Layers that are built otherwise than a layer that they come from: stack, the layer's number, and what differs."""
    found = []
    for stack, layers in stacks.items():
        built = _layers(model, stack)
        if len(built) != len(layers):
            return [(stack, len(built), f"there are {len(built)} layers instead of {len(layers)}")]
        serving = first_only(model, stack)
        theirs = [_signatures(one, own[stack]) for one, own in zip(models, names, strict=True)]
        for number, (layer, origins) in enumerate(zip(built, layers, strict=True)):
            mine = _signature(layer, serving)
            for origin in origins:
                its = theirs[origin.model][origin.number]
                if mine != its:
                    keys = [key for key in dict.fromkeys([*mine, *its]) if mine.get(key) != its.get(key)]
                    found.append((stack, number, ", ".join(key or "its class" for key in keys[:3])))
                    break
    return found


def _signatures(model: nn.Module, stack: str) -> list[dict[str, Any]]:
    serving = first_only(model, stack)
    return [_signature(layer, serving) for layer in _layers(model, stack)]


def _layers(model: nn.Module, stack: str) -> list[nn.Module]:
    return [*model.get_submodule(stack).children()]


def first_only(model: nn.Module, stack: str) -> frozenset[str]:
    """Parameters that only the first layer of a stack has and that serve all of it, such as T5's position biases.

    Its other parameters are those of every other layer; otherwise the first layer is one of another kind.
    """
    layers = [{name for name, _ in layer.named_parameters()} for layer in _layers(model, stack)]
    if len(layers) < 2 or not all(layers[0] > layer == layers[1] for layer in layers[1:]):
        return frozenset()
    return frozenset(layers[0] - layers[1])


def _signature(layer: nn.Module, left_out: frozenset[str]) -> dict[str, Any]:
    """How a layer is built: classes, shapes and simple attributes of its modules, but for its number."""
    found: dict[str, Any] = {}
    holders = {name.rpartition(".")[0] for name in left_out}
    flags = {name.rpartition(".")[2] for name in holders}
    for name, module in layer.named_modules():
        if name in holders:
            continue
        found[name] = type(module).__name__
        for key, value in vars(module).items():
            simple = value is None or isinstance(value, (bool, int, float, str))
            if simple and not _INDEX.search(key) and not any(flag and flag in key for flag in flags):
                found[f"{name}.{key}".lstrip(".")] = value
    for name, parameter in layer.named_parameters():
        if name not in left_out:
            found[f"{name}: shape"] = tuple(parameter.shape)
    return found
