"""The model view: a checkpoint as the model that opens from it.

The parameters are those of the model class that ``from_pretrained`` would make, on the meta device; where each lies on
disk is found with transformers' own tables (renaming, conversion, base-model prefix, ties). So contributors meet that
were saved by different versions, with a prefix or without, with experts packed or one by one. Where transformers
cannot build the model, the view is that of the names on disk, in which a matrix counts as a linear map, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from merganser.checkpoints.layers import BadConfiguration, Kind, Layer, build_empty, find_layers
from merganser.checkpoints.layout import Box, Place, find_places, seen_from, simplified, source_of, state_shapes, ties
from merganser.checkpoints.parts import Part, find_parts
from merganser.checkpoints.reader import Checkpoint, align
from merganser.checkpoints.sources import Source
from merganser.errors import CheckpointError

_KEPT = 8  # views that are remembered: contributors of one merge share theirs
_views: dict[str, ModelView] = {}


@dataclass(frozen=True)
class ModelView:
    """A checkpoint as a model.

    Attributes:
        shapes: of each stored tensor.
        model: on the meta device; None where transformers cannot build it.
        places: of each parameter and stored buffer of the model that is on disk.
        duplicates: stored tensors that the model ties to another stored one, by name, with the other's name.
        unused: stored tensors that the model has no place for.
        ignored: the same where transformers says nothing of it, such as buffers that older versions stored.
        missing: what the model needs and the files do not have.
        mismatched: parameters whose shape on disk is another, with both shapes.
        reason: why the view is that of the names on disk; None where there is a model.
        config: the values of ``config.json``.
        folder: that it belongs to.
        known_layers: the layers by their weight, where there is no model and they are known all the same.
    """

    shapes: Mapping[str, tuple[int, ...]]
    model: nn.Module | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    duplicates: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    reason: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    known_layers: Mapping[str, Layer] | None = None

    @cached_property
    def heads(self) -> dict[str, int]:
        """The stored tensors with a row for each label, and how many they have beside: one more label shows them."""
        if self.model is None:
            return {}
        count = int(getattr(self.model.config, "num_labels", 0))
        names = {str(number): f"LABEL_{number}" for number in range(count + 1)}
        values = {key: value for key, value in self.config.items() if key != "num_labels"}
        ids = {label: int(number) for number, label in names.items()}
        grown = {**values, "id2label": names, "label2id": ids}
        try:
            larger = state_shapes(build_empty(grown, self.folder, len(self.shapes)))
        except CheckpointError:
            return {}
        found: dict[str, int] = {}
        for name, shape in state_shapes(self.model).items():
            larger_shape, place = larger.get(name), self.places.get(name)
            if place and place.is_whole and shape and larger_shape == (shape[0] + 1, *shape[1:]):
                found[place.stored[0]] = shape[0] - count
        return found

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Stored tensors that are no parameters: nothing trains them."""
        if self.model is None:
            return frozenset()
        named = (self.places.get(name) for name, _ in self.model.named_buffers())
        return frozenset(stored for place in named if place is not None for stored in place.stored)

    @cached_property
    def uses(self) -> dict[str, list[str]]:
        """The parameters that each stored tensor is a part of."""
        found: dict[str, list[str]] = {}
        for name, place in self.places.items():
            for stored in place.stored:
                found.setdefault(stored, []).append(name)
        return found

    def place_of(self, parameter: str) -> Place | None:
        """Where a parameter lies, or another one that the model ties to it.

        A model with a head has the parameters of one without behind a prefix of its own.
        """
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        spellings = [parameter, f"{prefix}{parameter}", parameter.removeprefix(prefix)]
        names = [*spellings, *(twin for name in spellings for twin in self._twins.get(name, ()))]
        return next((self.places[name] for name in names if name in self.places), None)

    @cached_property
    def _twins(self) -> dict[str, list[str]]:
        return {} if self.model is None else {name: group for group in ties(self.model) for name in group}

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The linear map that each stored tensor is the weight of, or a part of it, by the tensor's name."""
        if self.known_layers is not None:
            return dict(self.known_layers)
        if self.model is None:
            return _plain_layers(self.shapes, self.shapes)
        found = find_layers(self.model, self.places, self.shapes)
        layers: dict[str, Layer] = {}
        for layer in sorted(found, key=lambda layer: layer.kind != "embedding"):  # a tied head is an embedding
            layers.setdefault(layer.weight, layer)
        return layers

    @cached_property
    def parts(self) -> dict[str, Part]:
        """What each stored tensor is for, and in which layer it lies, by its name."""
        return find_parts(self.model, self.shapes, self.uses, self.layers)

    def source_in(self, other: ModelView, name: str) -> Source | None:
        """Where another view of this model has what this one stores as ``name``; None: it has no such thing."""
        if other is self:
            return Source(name)
        by_name = Source(name) if name in other.shapes else None  # what one of the models has no parameter for
        if name not in self.uses:
            return by_name
        boxes: dict[tuple[tuple[int, int], ...], Box] = {}
        for parameter in self.uses[name]:
            ours, theirs = self.places[parameter], other.place_of(parameter)
            if theirs is None:
                continue
            if ours.is_whole and theirs.is_whole:  # whose shapes may differ: heads and vocabularies
                return Source(theirs.stored[0])
            if ours.boxes is None or theirs.boxes is None:
                twin = _twin(ours, theirs, name)
                return by_name if twin is None else Source(twin)
            for mine in ours.boxes:
                if mine.tensor == name:
                    boxes |= {box.at: box for its in theirs.boxes if (box := seen_from(mine, its)) is not None}
        whole = self.shapes[name]
        single = boxes.get(tuple((0, size) for size in whole))
        found = source_of([single] if single else list(boxes.values()), whole)
        return by_name if found is None else simplified(found, lambda stored: other.shapes[stored])


def view_of(checkpoint: Checkpoint) -> ModelView:
    """The view of a checkpoint, from its configuration and headers alone."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if checkpoint.known_layers is not None:
        return ModelView(shapes, known_layers=checkpoint.known_layers, folder=checkpoint.path)
    return make_view(checkpoint.config, shapes, checkpoint.model_path)


def make_view(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> ModelView:
    """The view of files with this configuration and tensors of these shapes; the same object for the same files.

    Args:
        config: the values of ``config.json``.
        shapes: of the stored tensors.
        folder: that the configuration belongs to.

    Raises:
        BadConfiguration: transformers knows the architecture, and cannot make a model of this configuration.
    """
    key = json.dumps([config, list(shapes.items())], sort_keys=True)
    if key not in _views:
        while len(_views) >= _KEPT:
            _views.pop(next(iter(_views)))
        _views[key] = _new_view(config, shapes, folder)
    return _views[key]


def canonical_shapes(view: ModelView) -> dict[str, tuple[int, ...]]:
    """Names and shapes as ``save_pretrained`` of this version of transformers would write them; tied tensors once."""
    from transformers.core_model_loading import revert_weight_conversion

    if view.model is None:
        return {}
    tied = getattr(view.model, "all_tied_weights_keys", {})
    kept = {name: value.detach() for name, value in view.model.state_dict().items() if name not in tied}
    found: dict[str, Any] = revert_weight_conversion(view.model, kept)
    return {name: tuple(value.shape) for name, value in found.items()}


def aligned(reference: ModelView, other: ModelView) -> dict[str, Source]:
    """Where another checkpoint has each tensor that the reference stores; what it does not have is absent."""
    if reference is other:
        return {name: Source(name) for name in reference.shapes}
    if reference.model is None or other.model is None:
        return {name: Source(own) for name, own in align(reference.shapes, other.shapes).items()}
    found = ((name, reference.source_in(other, name)) for name in reference.shapes)
    return {name: source for name, source in found if source is not None}


def _new_view(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> ModelView:
    try:
        model = build_empty(config, folder, len(shapes))
    except BadConfiguration:
        raise
    except CheckpointError as error:
        return ModelView(shapes, reason=error.what)
    plain = {name: shape for name, shape in shapes.items() if "/" not in name}
    places, unused, mismatched = find_places(model, plain)
    if 2 * len(unused) > len(plain):
        return ModelView(shapes, reason="its tensors are not those of the model that its configuration names")
    missing, unexpected = _without_ignored(model, _absent(model, places), unused)
    return ModelView(
        shapes,
        model,
        places,
        duplicates=_duplicates(model, places),
        unused=frozenset(unexpected),
        ignored=unused - unexpected,
        missing=tuple(sorted(missing)),
        mismatched=mismatched,
        config=config,
        folder=folder,
    )


def _duplicates(model: nn.Module, places: Mapping[str, Place]) -> dict[str, str]:
    """Stored tensors that the model ties to another stored one."""
    found: dict[str, str] = {}
    for group in ties(model):
        stored = list(dict.fromkeys(places[name].stored for name in group if name in places))
        found |= {other[0]: stored[0][0] for other in stored[1:] if len(other) == len(stored[0]) == 1}
    return found


def _without_ignored(model: Any, missing: Iterable[str], unused: Iterable[str]) -> tuple[set[str], set[str]]:
    """Missing and unused names without those that transformers says nothing of, such as buffers of old versions."""
    report = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unused))
    model._adjust_missing_and_unexpected_keys(report)
    return report.missing_keys, report.unexpected_keys


def _absent(model: nn.Module, places: Mapping[str, Place]) -> set[str]:
    """Parameters that are neither stored nor tied to one that is."""
    absent = {name for name in state_shapes(model) if name not in places}
    for group in ties(model):
        if any(name in places for name in group):
            absent -= set(group)
    return absent


def _twin(ours: Place, theirs: Place, name: str) -> str | None:
    """Of two parameters that are made in the same way of as many tensors, the other's tensor in the same place."""
    if len(ours.stored) != len(theirs.stored) or (ours.boxes is None) != (theirs.boxes is None):
        return None
    return theirs.stored[ours.stored.index(name)]


def _plain_layers(names: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, Layer]:
    """Matrices that are called weights, as linear maps."""
    found = {}
    for name in names:
        if len(shapes[name]) == 2 and name.endswith("weight"):
            module = name.removesuffix(".weight")
            bias = f"{module}.bias"
            fits = tuple(shapes.get(bias, ())) == (shapes[name][0],)
            kind: Kind = "embedding" if "embed" in name else "linear"
            found[name] = Layer(module, kind, name, bias if fits else None, False)
    return found
