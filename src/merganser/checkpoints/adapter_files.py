"""Putting an adapter on its base: what the names in a PEFT weight file mean, checked against the base's headers.

All of it is data from a stranger. Everything that does not fit is found from headers, all at once, before a weight is
read: factors without their twin, ranks that differ, layers or shapes that the base lacks, kinds of adapters whose
effect is not a sum of low-rank products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merganser.checkpoints.adapter_configuration import find_changes, grown, resize, untied
from merganser.checkpoints.adapter_places import (
    OTHER_BASE,
    Changed,
    Names,
    Target,
    check_shape,
    convert,
    no_place,
    on_disk,
    stays_tied,
    stored_twins,
)
from merganser.checkpoints.adapter_settings import MERGE_FIRST, AdapterSettings, read_settings
from merganser.checkpoints.adapters import CONFIG, WEIGHTS, AdapterCheckpoint
from merganser.checkpoints.changes import Change
from merganser.checkpoints.layout import Place, ties
from merganser.checkpoints.model_view import make_view
from merganser.checkpoints.reader import Checkpoint, read_json
from merganser.errors import CheckpointError, ErrorCollector, UserError, raise_all
from merganser.tensors import is_floating

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_OTHER_PARTS = ("lora_magnitude_vector", "lora_E", "ranknum")
_WRAPPERS = ("modules_to_save", "base_layer", "token_adapter")
_MOST_NAMED = 8  # problems of one sort that are spelt out


@dataclass
class Found:
    """The adapter's tensors of one module: names in the file, by what they are."""

    factors: dict[str, str] = field(default_factory=dict)
    vector: str | None = None
    rows: str | None = None
    whole: dict[str, str] = field(default_factory=dict)


def combine(name: str, base: Checkpoint, adapter: Checkpoint) -> AdapterCheckpoint:
    """An adapter on its base, everything checked from headers.

    Args:
        name: as the user gave it.
        base: a full checkpoint.
        adapter: the files of a PEFT folder.

    Raises:
        UserError: the adapter is no plain LoRA, malformed, or not of this base; several at once.
    """
    settings = read_settings(adapter)
    errors = ErrorCollector()
    modules = find_modules(adapter, errors)
    if settings.tokens and not any(found.rows for found in modules.values()):
        what = f"{CONFIG} names trained tokens (trainable_token_indices), and the weights have none"
        errors.add(CheckpointError(what, mend="save the adapter again, whole"))
    fitting = _Fitting(base, adapter, settings, modules, errors)
    fitting.place()
    raise_all(shortened_problems(errors.found, adapter))
    raw = read_json(adapter.path / CONFIG, missing={})
    return AdapterCheckpoint(name, base, adapter, fitting.changes, fitting.names, raw, fitting.config)


class _Fitting:
    """The way of an adapter's changes to the tensors of its base.

    Args:
        base: a full checkpoint.
        adapter: the files of a PEFT folder.
        settings: of the adapter.
        modules: what its file has of each module.
        errors: receives what does not fit.

    Attributes:
        changes: what the adapter does, by tensor of the result.
        names: the base's name of each of the result's tensors; those that the adapter brings are not among them.
        config: what ``config.json`` says differently.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Checkpoint,
        settings: AdapterSettings,
        modules: Mapping[str, Found],
        errors: ErrorCollector,
    ) -> None:
        self._base, self._adapter, self._settings, self._errors = base, adapter, settings, errors
        self._modules = modules
        self._shapes = {own: info.shape for own, info in base.tensors.items()}
        self.changes: dict[str, list[Change]] = {}
        self.names = {own: own for own in base.tensors}
        self.config: dict[str, Any] = {}
        spelled = [f"{module}.{kind}" for module, found in modules.items() for kind in kinds_of(found)]
        self._twins = stored_twins(spelled, base)
        self._changed: dict[str, Changed] = {}  # by parameter
        self._absent: list[str] = []

    def place(self) -> None:
        """Find everything, and what is wrong."""
        brought = self._choose_class()
        older = self._read_changes()
        self._convert(older)
        self._grow()
        self._tie()
        added = [problem for one in self._changed.values() if (problem := self._errors.catch(self._put, one))]
        if brought or added:
            self._follow_class()
        if self._absent:
            self._errors.add(_absent(self._base, self._absent))

    def _view(self) -> Names:
        """The base as a model of the class and configuration that are known by now."""
        view = make_view({**self._base.config, **self.config}, self._shapes, self._base.model_path)
        return Names(view, self._settings)

    def _choose_class(self) -> bool:
        """Find the class of model, and the labels of its head; whether the adapter brings one that the base lacks."""
        names = self._names = self._disk = self._view()
        wholes = {f"{m}.{kind}": key for m, found in self._modules.items() for kind, key in found.whole.items()}

        def lacking(name: str) -> bool:
            parameter = names.parameter(name)
            stored = name in self._twins if parameter is None else names.view.place_of(parameter) is not None
            return "/" not in name and not stored and self._settings.saves(name)

        brought = any(lacking(name) for name in wholes)
        found = self._errors.catch(find_changes, self._base, self._adapter, self._settings, wholes, brought)
        if found:
            self.config |= found
            self._names = self._disk = self._view()
        return brought

    def _read_changes(self) -> dict[str, Change]:
        """The change of each parameter; returns those of tensors that other versions had, by their names."""
        older: dict[str, Change] = {}

        def read(module: str, found: Found, kind: str) -> None:
            target = self._names.target(module, kind, factors=bool(found.factors))
            change = change_of(self._adapter, self._settings, target, found, kind)
            if "/" in target.name and target.name not in self._base.tensors and change.whole:
                self.changes[target.name] = [change]  # of sentence-transformers, beside the adapter and not in the base
            elif target.parameter is not None:
                place = Place.whole(target.name, self._names.wanted[target.parameter])
                self._changed[target.parameter] = Changed(target.parameter, place, {target.name: change})
            elif (stored := self._twins.get(target.name)) is not None:
                self._put_by_name(target, stored, change)
            else:
                older[target.name] = change

        for module, found in self._modules.items():
            for kind in kinds_of(found):
                self._errors.catch(read, module, found, kind)
        return older

    def _put_by_name(self, target: Target, stored: str, change: Change) -> None:
        """A change of a stored tensor that no parameter of the model is called like.

        Raises:
            CheckpointError: it does not fit.
        """
        shape = self._shapes[stored]
        if change.a and change.b and change.transposed is False:
            out, wide = self._adapter.tensors[change.b].shape[0], self._adapter.tensors[change.a].shape[1]
            turned = (wide, out) == shape and ((out, wide) != shape or self._settings.transposed)
            change = replace(change, transposed=turned)
        changed = Changed(stored, Place.whole(target.name, shape), {target.name: change})
        check_shape(changed, shape, stored, self._base, self._adapter)
        self.changes[stored] = [change]

    def _convert(self, older: Mapping[str, Change]) -> None:
        """Put together what other versions had in parts."""
        found = convert(self._names, older, self._adapter)
        self._changed |= {one.name: one for one in found}
        used = {name for one in found for name in one.changes}
        self._absent += [name for name in older if name not in used]

    def _grow(self) -> None:
        """Follow a vocabulary that was resized before training."""
        sizes = grown(self._names, self._changed, self._adapter)
        if sizes is not None:
            whole = resize({**self._base.config, **self.config}, *sizes)
            self.config |= {key: value for key, value in whole.items() if self._base.config.get(key) != value}
            self._names = self._view()

    def _tie(self) -> None:
        """Keep tied what PEFT keeps tied, and give each of the others a tensor of its own."""
        model = self._names.view.model
        groups = [] if model is None else ties(model)
        parted = [group for group in groups if not stays_tied(self._names, group, self._changed, self._settings)]
        for group in groups:
            self._give_base(group) if group in parted else self._share(group)
        together = self._untie(parted) if parted else groups
        for group in groups:
            self._errors.catch(self._part, group, together)

    def _share(self, group: Sequence[str]) -> None:
        """What is done to one parameter that stays tied is done to all that it is tied to."""
        ours = next((self._changed[name] for name in group if name in self._changed), None)
        if ours is not None:
            self._changed |= {name: replace(ours, name=name) for name in group}

    def _give_base(self, group: Sequence[str]) -> None:
        """A tied tensor that was saved as it is, because the vocabulary grew, is everybody's before the adapter."""
        wholes = (change for name in group if name in self._changed and (change := self._changed[name].whole))
        plain = next((c.whole for c in wholes if c.whole and not self._settings.saves(c.whole)), None)
        for name in group if plain else ():
            place = Place.whole(name, self._names.wanted[name])
            mine = self._changed.get(name, Changed(name, place, {name: Change()}))
            if (change := mine.whole) is not None and change.whole is None:
                changes = {mine.place.stored[0]: replace(change, whole=plain)}
                self._changed[name] = replace(mine, changes=changes)

    def _untie(self, parted: Sequence[Sequence[str]]) -> list[list[str]]:
        """Say in the configuration that embeddings are not tied, unless the class does not listen; returns its ties.

        A class that ties whatever its configuration says lets those be that are stored with other values.
        """
        whole = untied({**self._base.config, **self.config})
        view = make_view(whole, self._shapes, self._base.model_path)
        together = [] if view.model is None else ties(view.model)
        for group in parted:
            for new in together:
                if len({self._doing(name) for name in group if name in new}) > 1:
                    return [*map(list, parted)] if self._names.view.model is None else ties(self._names.view.model)
        self.config |= {key: value for key, value in whole.items() if self._base.config.get(key) != value}
        self._names = self._view()
        return together

    def _doing(self, name: str) -> tuple[Change, ...]:
        """What is done to a parameter."""
        return tuple(self._changed[name].changes.values()) if name in self._changed else ()

    def _part(self, group: Sequence[str], together: Sequence[Sequence[str]]) -> None:
        """Give a tensor to each of the parameters that were tied and are no longer.

        Raises:
            CheckpointError: they are not one stored tensor.
        """
        places = self._disk.view.places
        first = next((name for name in group if name in places), None)
        for name in group:
            if first is None or name in places:
                continue
            tied = next((new for new in together if name in new), [name])
            leader = first if first in tied and self._doing(first) == self._doing(name) else name
            if leader == name and first not in tied:
                leader = next(twin for twin in [*(n for n in tied if n in places), *tied] if twin in group)
            if leader == name:
                self._add(name, places[first])
            else:
                self._changed.pop(name, None)

    def _add(self, name: str, place: Place) -> None:
        """Store a parameter that was tied to another one.

        Raises:
            CheckpointError: the other is no stored tensor as it is.
        """
        changed = self._changed.pop(name, None)
        if not place.is_whole:
            raise no_place(changed or Changed(name, Place.whole(name, ()), {}))
        self.names[name] = self.names[place.stored[0]]
        if changed is not None:
            check_shape(changed, self._wanted(changed, place), place.stored[0], self._base, self._adapter)
            self.changes[name] = [*changed.changes.values()]

    def _wanted(self, changed: Changed, place: Place) -> Sequence[int]:
        """The shape that a change should have: the model's, and the stored tensor's where that is added to."""
        change = changed.whole
        if place.is_whole and (change is None or not change.replaces):
            return self._shapes[place.stored[0]]
        return self._names.wanted[changed.name]

    def _put(self, changed: Changed) -> bool:
        """Put a parameter's changes on the tensors that it is made of; whether it is new.

        Raises:
            CheckpointError: it does not fit.
        """
        place, change = self._disk.view.place_of(changed.name), changed.whole
        if place is None:
            if change is not None and change.whole and self._settings.saves(changed.place.stored[0]):
                check_shape(changed, self._names.wanted[changed.name], changed.name, self._base, self._adapter)
                self.changes[changed.name] = [change]
                return True
            self._absent.append(changed.place.stored[0])
            return False
        stored = place.stored[0] if place.is_whole else changed.name
        check_shape(changed, self._wanted(changed, place), stored, self._base, self._adapter)
        found = on_disk(changed, place, self._shapes)
        if found is None:
            raise no_place(changed)
        for own, changes in found.items():
            self.changes.setdefault(own, []).extend(changes)
        return False

    def _follow_class(self) -> None:
        """Call the base's tensors as its class with a head does, without the heads that this class has not."""
        view = self._disk.view
        if view.model is None:
            return
        gone = view.unused | view.ignored
        called = {own: self._called(own) for own in self.names if own not in gone}
        self.names = {called[own]: stored for own, stored in self.names.items() if own in called}
        self.changes = {called.get(own, own): changes for own, changes in self.changes.items()}

    def _called(self, own: str) -> str:
        """The name of a stored tensor with the prefix that the model has before it."""
        uses = self._disk.view.uses.get(own, [])
        return next((name for name in uses if name.endswith(f".{own}") and self._disk.view.places[name].is_whole), own)


def find_modules(adapter: Checkpoint, errors: ErrorCollector) -> dict[str, Found]:
    """The adapter's tensors by module, in the model's own names."""
    modules: dict[str, Found] = {}
    for key, info in adapter.tensors.items():
        parts = key.removeprefix("base_model.model.").split(".")
        if "original_module" in parts:  # the head before training, which some versions also save
            continue
        if not is_floating(info.dtype) or not _place(key, parts, modules):
            errors.add(CheckpointError(f"tensor {key!r} is no part of a LoRA adapter", mend=MERGE_FIRST))
    return modules


def _place(key: str, parts: list[str], modules: dict[str, Found]) -> bool:
    """Note one tensor under its module; False where its name means nothing here."""
    if any(part in _OTHER_PARTS for part in parts) or len(parts) < 2:
        return False
    if parts[-1] == "trainable_tokens_delta":
        modules.setdefault(".".join(part for part in parts[:-1] if part not in _WRAPPERS), Found()).rows = key
        return True
    role = next((part for part in parts if part in _FACTORS), None)
    if role is not None:
        at = parts.index(role)
        module, rest = ".".join(parts[:at]), parts[at + 1 :]
        kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
        if not module or len(rest) > 1:  # one component may be the adapter's name
            return False
        found = modules.setdefault(module, Found())
        if kind == "bias":
            found.vector = key
            return role == "lora_B"
        found.factors[role] = key
        return True
    rest = [part for part in parts if part not in _WRAPPERS]
    if "modules_to_save" in parts and parts[parts.index("modules_to_save") + 1] == "default":
        rest.pop(parts.index("modules_to_save"))
    modules.setdefault(".".join(rest[:-1]), Found()).whole[rest[-1]] = key
    return True


def kinds_of(found: Found) -> list[str]:
    kinds = dict.fromkeys(found.whole)
    if found.factors or found.rows:
        kinds["weight"] = None
    if found.vector:
        kinds["bias"] = None
    return list(kinds)


def change_of(adapter: Checkpoint, settings: AdapterSettings, target: Target, found: Found, kind: str) -> Change:
    """What happens to one parameter of a module.

    Raises:
        CheckpointError: the adapter contradicts itself.
    """
    module = target.module
    change = Change(whole=found.whole.get(kind))

    def wrong(what: str, mend: str = "save the adapter again, whole") -> CheckpointError:
        return CheckpointError(f"{module}: {what}", mend=mend)

    if kind == "bias" and found.vector:
        rank = settings.rank_of(module)
        return replace(change, vector=found.vector, scale=settings.scale_of(module, rank))
    if kind == "weight" and found.rows:
        tokens = settings.tokens_of(module)
        if found.factors or len(set(tokens)) != len(tokens):
            raise wrong("trained tokens beside factors, or one token twice", MERGE_FIRST)
        return replace(change, rows=found.rows, tokens=tokens)
    if kind != "weight" or not found.factors:
        return change
    embedding = any(role.startswith("lora_embedding") for role in found.factors)
    roles = _FACTORS[2:] if embedding else _FACTORS[:2]
    if set(found.factors) != set(roles):
        raise wrong(f"{', '.join(sorted(found.factors))} without {', '.join(sorted(set(roles) - set(found.factors)))}")
    a, b = (found.factors[role] for role in roles)
    shape_a, shape_b = adapter.tensors[a].shape, adapter.tensors[b].shape
    if len(shape_a) != 2 or len(shape_b) != 2:
        raise wrong(
            f"the factors {list(shape_a)} and {list(shape_b)} are no matrices: "
            "only linear, Conv1D and embedding layers can be adapted",
            MERGE_FIRST,
        )
    experts = target.experts or 1
    rank, several = shape_a[0] // experts, f" for each of {experts} experts" if target.experts else ""
    if shape_a[0] != shape_b[1] or shape_a[0] % experts:
        raise wrong(f"A {list(shape_a)} is of rank {shape_a[0]}, B {list(shape_b)} of rank {shape_b[1]}{several}")
    if rank == 0:
        raise wrong(f"rank 0: {a} is {list(shape_a)}", "gather the shards of a sharded training before saving")
    if rank != settings.rank_of(module):
        raise wrong(
            f"A {list(shape_a)} is of rank {rank}{several}, {CONFIG} says {settings.rank_of(module)}",
            "give the configuration that belongs to these weights (r, rank_pattern)",
        )
    scale, transposed = settings.scale_of(module, rank), embedding or bool(target.transposed)
    return replace(change, a=a, b=b, scale=scale, transposed=transposed, experts=target.experts)


def _absent(base: Checkpoint, names: Sequence[str]) -> UserError:
    """One problem for all that the base lacks."""
    more = f" and {len(names) - _MOST_NAMED} more tensors like these" if len(names) > _MOST_NAMED else ""
    listing = ", ".join(map(repr, names[:_MOST_NAMED]))
    return CheckpointError(f"the adapter changes {listing}{more}, which {base.name} lacks", mend=OTHER_BASE)


def shortened_problems(problems: Sequence[UserError], adapter: Checkpoint) -> list[UserError]:
    """The first problems, each with its file; the number of the others."""
    where = adapter.path / WEIGHTS
    found: list[UserError] = [CheckpointError(one.what, where=where, mend=one.mend) for one in problems[:_MOST_NAMED]]
    if len(problems) > _MOST_NAMED:
        mend = problems[-1].mend
        found.append(CheckpointError(f"{len(problems) - _MOST_NAMED} more tensors like these", where=where, mend=mend))
    return found
