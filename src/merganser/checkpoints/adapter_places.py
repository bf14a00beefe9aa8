"""Where an adapter's changes go: from the names in its file to the model's parameters, and on to the base's tensors.

The names are those of the model class that the adapter was trained in, of this or of an older version of transformers;
its own renamings and converters apply to them as they do to the names of weights on disk. From the parameter on, the
model view knows which boxes of which stored tensors it is made of. Where transformers knows no such model, names and
shapes on disk have to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from merganser.checkpoints.adapter_settings import MERGE_FIRST, AdapterSettings
from merganser.checkpoints.changes import Change
from merganser.checkpoints.layout import Box, Place, Renaming, find_places, seen_from, ties
from merganser.checkpoints.model_view import ModelView
from merganser.checkpoints.reader import Checkpoint, align, renamed
from merganser.errors import CheckpointError
from merganser.tensors import is_floating

OTHER_BASE = "give the base that the adapter was trained on, as base+adapter"


@dataclass(frozen=True)
class Target:
    """What one entry of an adapter's file changes.

    Attributes:
        name: of the tensor, as the file spells it.
        module: the name by which the patterns of rank and alpha find it.
        parameter: of the model; None: a tensor of another version, which a parameter is made of, or of no model.
        experts: how many matrices the parameter is a stack of.
        transposed: whether it is (in, out); None: its shape tells.
    """

    name: str
    module: str
    parameter: str | None = None
    experts: int | None = None
    transposed: bool | None = None


class Names:
    """The names in an adapter's file, as those of the model that it is put on.

    Args:
        view: of the base, as a model of the class that the adapter was trained in.
        settings: of the adapter.
    """

    def __init__(self, view: ModelView, settings: AdapterSettings) -> None:
        self.view, self._settings = view, settings
        self._rename = None if view.model is None else Renaming(view.model)

    @property
    def wanted(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the model's parameters; empty without a model."""
        return {} if self._rename is None else self._rename.wanted

    def target(self, module: str, kind: str, *, factors: bool) -> Target:
        """What a module's entry changes.

        Args:
            module: its name in the file; those of bare parameters have a ``base_layer`` for each one around them.
            kind: ``weight`` or ``bias``.
            factors: whether it has factors.
        """
        bare = self._bare(module) if factors and kind == "weight" else None
        if bare is not None:
            return bare
        name = f"{module}.{kind}"
        parameter = self.parameter(name)
        if parameter is None:
            return Target(name, module)
        return Target(name, module, parameter, transposed=_is_conv1d(self._owner(parameter)))

    def parameter(self, name: str) -> str | None:
        """The parameter that a name means as a whole."""
        if self._rename is None or name in self.wanted:
            return name if name in self.wanted else None
        found, pattern = self._rename(name)
        return found if pattern is None and found in self.wanted else None

    def _bare(self, module: str) -> Target | None:
        """The bare parameter that factors belong to: PEFT wraps the parameters of a module one around the other."""
        stem = module
        while stem.endswith(".base_layer"):
            stem = stem.removesuffix(".base_layer")
        depth = (len(module) - len(stem)) // len(".base_layer")
        leaves = {end.rpartition(".")[2] for end in self._settings.parameters}
        spelled = {f"{stem}.{leaf}" for leaf in leaves}
        spelled = {name for name in spelled if any(f".{name}".endswith(f".{e}") for e in self._settings.parameters)}
        found = {parameter: name for name in spelled if (parameter := self.parameter(name)) is not None}
        if not found:
            return None
        owner = self._owner(next(iter(found)))
        order = [name for name, _ in owner.named_parameters(recurse=False)]
        inner_first = sorted(found, key=lambda parameter: order.index(parameter.rpartition(".")[2]))
        if depth >= len(inner_first):
            return None
        parameter = inner_first[-1 - depth]
        stacked = len(self.wanted[parameter]) == 3
        transposed = stacked and bool(getattr(owner, "is_transposed", False))
        experts = self.wanted[parameter][0] if stacked else None
        return Target(found[parameter], found[parameter], parameter, experts, transposed)

    def _owner(self, parameter: str) -> nn.Module:
        if self.view.model is None:
            raise RuntimeError("there is no model")
        return self.view.model.get_submodule(parameter.rpartition(".")[0])

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The parameters with a row for each token: input and output embeddings, and what is tied to them."""
        model: Any = self.view.model
        if model is None:
            return frozenset()
        found = set[int]()
        for get in ("get_input_embeddings", "get_output_embeddings"):
            try:
                module = getattr(model, get)()
            except (AttributeError, NotImplementedError):
                continue
            found |= {id(value) for value in module.parameters(recurse=False)} if module is not None else set()
        named = [name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in found]
        groups = [group for group in ties(model) if not {*group}.isdisjoint(named)]
        return frozenset([*named, *(name for group in groups for name in group)])

    @cached_property
    def input_embedding(self) -> str | None:
        """The weight of the input embedding."""
        model: Any = self.view.model
        try:
            weight = model.get_input_embeddings().weight
        except (AttributeError, NotImplementedError):
            return None
        named = model.named_parameters(remove_duplicate=False)
        return next((name for name, value in named if value is weight), None)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@dataclass(frozen=True)
class Changed:
    """A parameter of the model, or a stored tensor that none is known for, with what an adapter does to it.

    Attributes:
        name: of the parameter, or of the stored tensor.
        place: where it lies among the tensors that the adapter's file names.
        changes: of each of these.
    """

    name: str
    place: Place
    changes: Mapping[str, Change]

    @property
    def whole(self) -> Change | None:
        """The change, where there is one of all of it."""
        return self.changes[self.place.stored[0]] if self.place.is_whole else None


def stored_twins(names: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """The base's on-disk name of each of these, by the names alone; old spellings count."""
    wanted = [*names]
    twins = align(wanted, base.tensors)
    for name in wanted:
        if name not in twins:
            old = align(renamed(name), base.tensors)
            twins.update(zip([name], old.values(), strict=False))
    return twins


def shape_of(change: Change, adapter: Checkpoint) -> tuple[int, ...] | None:
    """The shape of the tensor that a change fits; None: it fits any with these rows."""
    if change.whole or change.vector:
        return adapter.tensors[str(change.whole or change.vector)].shape
    if change.a and change.b:
        out, wide = adapter.tensors[change.b].shape[0], adapter.tensors[change.a].shape[1]
        matrix = (wide, out) if change.transposed else (out, wide)
        return matrix if change.experts is None else (change.experts, *matrix)
    return None


def convert(names: Names, changes: Mapping[str, Change], adapter: Checkpoint) -> list[Changed]:
    """What older versions named as parts of a parameter, such as single experts, put together to the parameter.

    Args:
        names: of the model.
        changes: by the name of a tensor of the older version.
        adapter: the adapter's files.
    """
    if names.view.model is None or not changes:
        return []
    shapes = {name: shape for name, change in changes.items() if (shape := shape_of(change, adapter)) is not None}
    places, _, _ = find_places(names.view.model, shapes)
    fitting = {name: place for name, place in places.items() if place.boxes and _extent(place) == names.wanted[name]}
    return [Changed(name, place, {own: changes[own] for own in place.stored}) for name, place in fitting.items()]


def _extent(place: Place) -> tuple[int, ...]:
    spans = [[box.at[dim][1] for box in place.boxes or ()] for dim in range(len((place.boxes or ())[0].at))]
    return tuple(max(span) for span in spans)


def on_disk(changed: Changed, place: Place, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Change]] | None:
    """The changes of the stored tensors that a parameter is made of; None where they cannot be told apart.

    Args:
        changed: the parameter.
        place: where it lies on disk.
        shapes: of the stored tensors.
    """
    if changed.whole is not None and place.is_whole:
        return {place.stored[0]: [changed.whole]}
    if changed.place.boxes is None or place.boxes is None:
        return None
    found: dict[str, list[Change]] = {}
    for mine in place.boxes:
        for its in changed.place.boxes:
            box = seen_from(mine, its)
            if box is None:
                continue
            change = changed.changes[box.tensor]
            if change.rows is not None or len(shapes[mine.tensor]) != len(box.at) or not _is_plain(change, box):
                return None
            found.setdefault(mine.tensor, []).append(_boxed(change, box, shapes[mine.tensor]))
    return found


def _boxed(change: Change, box: Box, shape: Sequence[int]) -> Change:
    straight = box.dims == tuple(range(len(shape))) and box.part == box.at == tuple((0, size) for size in shape)
    return change if straight else replace(change, box=box)


def _is_plain(change: Change, box: Box) -> bool:
    """Whether a box of a low-rank product is one of its matrices, a part of one, or a stack of them."""
    if change.a is None:
        return True
    if len(box.at) < 2 or box.dims[-1] is None or box.dims[-2] is None:
        return False
    first = 0 if change.experts is None else 1
    return {box.dims[-1], box.dims[-2]} == {first, first + 1} and len(box.at) <= 3


def check_shape(changed: Changed, shape: Sequence[int], stored: str, base: Checkpoint, adapter: Checkpoint) -> None:
    """A change of a whole tensor fits its shape.

    Args:
        changed: the parameter, or stored tensor.
        shape: that it should have.
        stored: the base's tensor.
        base: the base's files.
        adapter: the adapter's files.

    Raises:
        CheckpointError: it does not.
    """
    change = changed.whole
    if change is None:
        return
    module = changed.place.stored[0].rpartition(".")[0]

    def wrong(what: str) -> CheckpointError:
        said = f"{module}: {what}, tensor {stored!r} of {base.name} is {list(shape)}"
        return CheckpointError(said, mend=OTHER_BASE)

    info = base.tensors.get(stored)
    if info is not None and not is_floating(info.dtype):
        raise CheckpointError(
            f"{module}: tensor {stored!r} of {base.name} is {info.dtype}, a quantised weight",
            mend="give the base in full precision, as base+adapter",
        )
    for part in (change.whole, change.vector):
        if part and adapter.tensors[part].shape != tuple(shape):
            raise wrong(f"{part} is {list(adapter.tensors[part].shape)}")
    if change.a and (product := shape_of(replace(change, whole=None), adapter)) != tuple(shape):
        matrix = product[-2:][::-1] if product and change.transposed else product and product[-2:]
        raise wrong(f"B·A is {list(matrix or ())}")
    if change.rows and (change.tokens and max(change.tokens) >= shape[0]):
        raise wrong(f"token {max(change.tokens)} is trained")
    if change.rows and adapter.tensors[change.rows].shape != (len(change.tokens), *shape[1:]):
        raise wrong(f"{change.rows} is {list(adapter.tensors[change.rows].shape)} for {len(change.tokens)} tokens")


def stays_tied(names: Names, group: Sequence[str], changed: Mapping[str, Changed], settings: AdapterSettings) -> bool:
    """Whether parameters that the model ties are still tied with the adapter on, as they are in PEFT.

    PEFT wraps a module without regard to what its weight is tied to, unless it is asked to (``ensure_weight_tying``);
    tensors that are saved as they are, because the vocabulary grew, are loaded into the tied weight.
    """
    ours = {name: change for name in group if name in changed and (change := changed[name].whole) is not None}
    if settings.tied or not any(name in changed for name in group):
        return True
    if len(ours) != sum(name in changed for name in group):
        return False
    if all(change.rows for change in ours.values()):
        return names.input_embedding in ours and len({change.tokens for change in ours.values()}) == 1
    wrapped = (
        change.a or change.rows or settings.saves(changed[name].place.stored[0]) for name, change in ours.items()
    )
    return not any(wrapped)


def no_place(changed: Changed) -> CheckpointError:
    """The error for a parameter that is not made of boxes of stored tensors."""
    what = f"{changed.place.stored[0]}: the base stores this weight in another layout, which the adapter cannot follow"
    return CheckpointError(what, mend=MERGE_FIRST)
