"""Adapters without their base: what each changes, as tensors, so that adapters can be merged with one another.

Of each adapted weight the tensor is its change ΔW = s·BA, whose base is a tensor of zeros; of a module that is trained
as a whole it is the whole tensor, whose change nobody knows without the base. An adapter that does not adapt a weight
that another one does changes it by zero. As everywhere, a product exists only for the rows that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.adapter_files import Found, change_of, find_modules, kinds_of, shortened_problems
from merganser.checkpoints.adapter_places import Target, shape_of
from merganser.checkpoints.adapter_settings import AdapterSettings, read_settings
from merganser.checkpoints.adapters import CONFIG
from merganser.checkpoints.changes import Change, apply
from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.layers import Layer
from merganser.checkpoints.opening import is_adapter, names_missing_base, open_files, pair_of
from merganser.checkpoints.reader import HASHES, Checkpoint, align, read_json
from merganser.errors import CheckpointError, ErrorCollector, UserError, raise_all
from merganser.paths import expanded, is_name
from merganser.text import listed

_WITH_BASE = "give the base too, as base+adapter"
_TIED = ("embed_tokens", "lm_head")  # what PEFT looks for
_COPY = "base_layer"  # of an embedding that is adapted: PEFT saves the base's beside the factors


class ChangesCheckpoint(Checkpoint):
    """What one adapter changes, beside others. Made by :func:`open_changes`.

    Args:
        name: as the user gave it.
        adapter: its files.
        changes: what it does, by tensor: a low-rank product, a vector that is added, or a whole tensor.
        shapes: of every change of any of the adapters; those that this one lacks are zero.
        settings: ``adapter_config.json``.
        layers: the layers with a change, by the name of their weight.
    """

    def __init__(
        self,
        name: str,
        adapter: Checkpoint,
        changes: Mapping[str, Change],
        shapes: Mapping[str, tuple[int, ...]],
        settings: Mapping[str, Any],
        layers: Mapping[str, Layer],
    ) -> None:
        self.adapter, self.changes, self.settings = adapter, dict(changes), dict(settings)
        self.known_layers = layers
        wholes = {own: adapter.tensors[change.whole] for own, change in changes.items() if change.whole}
        infos = {own: TensorInfo(own, "F32", shape, "", 0, self._size(own, shape)) for own, shape in shapes.items()}
        for own, info in wholes.items():
            infos[own] = TensorInfo(own, info.dtype, info.shape, "", 0, info.nbytes)
        super().__init__(name, adapter.path, infos, revision=adapter.revision)

    def _size(self, name: str, shape: Sequence[int]) -> int:
        """The bytes that are read of the adapter for a change."""
        parts = self.changes[name].parts.values() if name in self.changes else ()
        return sum(self.adapter.tensors[part].nbytes for part in parts)

    @property
    def config(self) -> dict[str, Any]:
        """None: an adapter's files describe no model."""
        return {}

    @property
    def is_here(self) -> bool:
        """Whether the weights can be read without a download."""
        return self.adapter.is_here

    def fetch(self) -> None:
        """Download an adapter that is on the Hub."""
        self.adapter.fetch()
        self.path = self.adapter.path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A change in float32 or wider, or a whole tensor as it is stored, or rows ``start:stop``."""
        change = self.changes.get(name)
        if change is not None and change.whole:
            return self.adapter.read(change.whole, start, stop)
        shape = self.tensors[name].shape
        stop = shape[0] if stop is None else min(stop, shape[0])
        dtypes = () if change is None else (self.adapter.read(part, 0, 1).dtype for part in change.parts.values())
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        tensor = torch.zeros((stop - start, *shape[1:]), dtype=wide)
        if change is not None:
            apply(change, self.adapter, tensor, start)
        return tensor

    def prefetch(self, name: str) -> None:
        """Nothing: factors are small."""

    def observe(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Nothing: a change is known by the hashes of its parts."""

    def hash(self, name: str, kind: str, tensor: Tensor | None = None) -> str:
        """The hash of a change's parts (factors, scale, orientation); of a whole tensor, its own."""
        change = self.changes.get(name)
        if change is not None and change.whole:
            return self.adapter.hash(change.whole, kind)
        parts: dict[str, object] = {}
        if change is not None:
            parts = {role: self.adapter.hash(part, kind) for role, part in change.parts.items()}
            parts |= {"scale": change.scale, "transposed": change.transposed}
        text = json.dumps(parts, sort_keys=True)
        return HASHES[kind](f"change without a base\n{text}\n".encode()).hexdigest()

    def manifest_hash(self, kind: str) -> str:
        """The hash over everything that this adapter changes, whatever the others do."""
        lines = "".join(f"{name} {self.hash(name, kind)}\n" for name in sorted(self.changes))
        return HASHES[kind](lines.encode()).hexdigest()


class NothingChanged(Checkpoint):
    """The base that adapters are merged with one another beside: tensors of zeros, of which none is stored.

    Args:
        name: of the base, as it is to be written down.
        like: whose folder is named in errors.
        infos: of its tensors.
        layers: see :class:`ChangesCheckpoint`.
        revision: the commit of the base, where the adapters name one.
    """

    def __init__(
        self,
        name: str,
        like: Checkpoint,
        infos: Mapping[str, TensorInfo],
        layers: Mapping[str, Layer],
        revision: str | None = None,
    ) -> None:
        super().__init__(name, like.path, infos, revision=revision)
        self.known_layers = layers

    @property
    def config(self) -> dict[str, Any]:
        """None."""
        return {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Zeros."""
        shape = self.tensors[name].shape
        height = len(range(shape[0])[start:stop]) if shape else 0
        return torch.zeros((height, *shape[1:]) if shape else (), dtype=torch.float32)

    def prefetch(self, name: str) -> None:
        """Nothing."""

    def observe(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Nothing."""


@dataclass(frozen=True)
class OpenChanges:
    """Adapters that are open without their base.

    Attributes:
        adapters: in the order in which they were named.
        base: zeros for every change, by the name of the base that the adapters were trained on.
        everything: zeros of all tensors, changes and whole ones, named like the first adapter.
    """

    adapters: tuple[ChangesCheckpoint, ...]
    base: NothingChanged
    everything: NothingChanged


def lack_their_base(references: Sequence[str], *, allow_pickle: bool = False) -> bool:
    """Whether all of these are adapters, and none is named with its base or names one that is to be had."""
    tried: dict[str, bool] = {}
    for reference in references:
        if _pair(reference) is not None:
            return False
        try:
            files = open_files(reference, allow_pickle)
            if not is_adapter(files) or not names_missing_base(files, tried, allow_pickle=allow_pickle):
                return False
        except UserError:
            return False
    return True


def open_changes(references: Sequence[str], *, base: str | None = None, allow_pickle: bool = False) -> OpenChanges:
    """Open adapters without their base, reading headers only.

    Args:
        references: folders or Hub references of adapters; of ``base+adapter`` the base is only a name.
        base: its name, where the adapters name none or different ones.
        allow_pickle: accept ``adapter_model.bin``.

    Raises:
        UserError: no adapters, kinds whose effect is no change that is known without the base, adapters of different
            bases or of layers whose shapes differ; several at once.
    """
    problems, opened, bases = ErrorCollector(), list[_Adapter](), dict[str, str | None]()
    for reference in references:
        one = problems.catch(_open, reference, allow_pickle)
        if one is not None:
            opened.append(one)
            bases[reference] = one.base
    problems.raise_all()
    named = {name for name in bases.values() if name is not None}
    if base is None and len(named) != 1:
        listing = "; ".join(f"{reference}: {name or 'none'}" for reference, name in bases.items())
        what = f"the adapters name different bases ({listing})" if named else "the adapters name no base"
        problems.add(CheckpointError(what, mend="if all were trained on one, say what to call it: --base NAME"))
    ties = [one for one in opened if one.raw.get("ensure_weight_tying")]
    if ties and (parts := [one for one in opened if one not in ties and one.touches_embeddings]):
        what = f"it adapts an embedding without keeping it tied (ensure_weight_tying), and {ties[0].name} keeps them"
        problems.add(CheckpointError(what, where=parts[0].name, mend=_WITH_BASE))
    vectors = [one.name for one in opened if any(change.vector for change in one.changes.values())]
    if vectors and any(layer.kind == "embedding" for one in opened for layer in one.layers.values()):
        what = "adapted embeddings beside vectors on biases (lora_bias), which PEFT cannot have in one adapter"
        problems.add(CheckpointError(what, where=vectors[0], mend=f"{_WITH_BASE}, and write a full checkpoint"))
    shapes = _common_shapes(opened, problems)
    problems.raise_all()
    name, _, revision = (base or named.pop()).partition("@")
    layers = {own: layer for one in opened for own, layer in one.layers.items()}
    found = [ChangesCheckpoint(one.name, one.files, one.changes, shapes, one.raw, layers) for one in opened]
    infos = {own: TensorInfo(own, "F32", shape, "", 0, 4 * prod(shape)) for own, shape in shapes.items()}
    wholes = {own: info for one in reversed(found) for own, info in one.tensors.items() if own not in shapes}
    first = found[0]
    nothing = NothingChanged(name, first, infos, layers, revision or None)
    return OpenChanges(tuple(found), nothing, NothingChanged(first.name, first, {**infos, **wholes}, layers))


@dataclass(frozen=True)
class _Adapter:
    """One adapter by itself: its name, files, ``adapter_config.json``, changes, layers and the base that it names."""

    name: str
    files: Checkpoint
    raw: Mapping[str, Any]
    changes: Mapping[str, Change]
    layers: Mapping[str, Layer]
    base: str | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what it changes, without whole tensors."""
        found = {name: shape_of(change, self.files) for name, change in self.changes.items() if not change.whole}
        return {name: shape for name, shape in found.items() if shape is not None}

    @property
    def touches_embeddings(self) -> bool:
        """Whether it changes what models tie to each other."""
        modules = (name.removesuffix(".weight").removesuffix(f".{_COPY}") for name in self.changes)
        return any(module.rpartition(".")[2] in _TIED for module in modules)


def _pair(reference: str) -> tuple[str, str] | None:
    return None if not is_name(reference) or expanded(reference).is_dir() else pair_of(reference)


def _open(reference: str, allow_pickle: bool) -> _Adapter:
    """One adapter.

    Raises:
        UserError: it is none, or one whose effect is not known without its base; several at once.
    """
    pair = _pair(reference)
    files = open_files(reference if pair is None else pair[1], allow_pickle)
    if not is_adapter(files):
        what = "this is a full model, and only adapters can be merged without their base"
        raise CheckpointError(
            what, where=reference, mend="leave out --without-base, and give --base where it is needed"
        )
    settings, problems = read_settings(files), ErrorCollector()
    changes, layers = dict[str, Change](), dict[str, Layer]()
    for module, found in find_modules(files, problems).items():
        for kind in kinds_of(found):
            change = problems.catch(_change, files, settings, module, found, kind)
            if change is None:
                continue
            name = f"{module}.{kind}"
            if change.whole and change.a and _COPY in change.whole.split("."):
                changes[f"{module}.{_COPY}.{kind}"] = Change(whole=change.whole)
                change = replace(change, whole=None)
            changes[name] = change
            if change.a and not change.whole:
                layers[name] = Layer(module, "embedding" if change.transposed else "linear", name, None, False)
    raise_all(shortened_problems(problems.found, files))
    raw = read_json(files.path / CONFIG, missing={})
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    named = f"{base}@{revision}" if base and revision else base
    told = pair[0] if pair else named if isinstance(named, str) and named else None
    return _Adapter(reference, files, raw, changes, layers, told)


def _change(files: Checkpoint, settings: AdapterSettings, module: str, found: Found, kind: str) -> Change:
    """What an adapter does to one parameter, as far as it is known without the base.

    Raises:
        CheckpointError: it is not, or the adapter contradicts itself.
    """
    if module.endswith(".base_layer") or any(f".{module}.{kind}".endswith(f".{end}") for end in settings.parameters):
        what = f"{module}: a stack of experts (target_parameters), whose shape only the base tells"
        raise CheckpointError(what, mend=_WITH_BASE)
    if found.rows:
        what = f"{module}: single trained tokens, which replace rows of the base"
        raise CheckpointError(what, mend=_WITH_BASE)
    if "/" in module:
        raise CheckpointError(f"{module}: a module of sentence-transformers", mend=_WITH_BASE)
    change = change_of(files, settings, Target(f"{module}.{kind}", module), found, kind)
    copied = _COPY in str(change.whole).split(".") and not change.vector
    if change.whole and (change.a or change.vector) and not copied:
        what = f"{module}: a whole {kind} beside factors, which takes the place of the base's"
        raise CheckpointError(what, mend=_WITH_BASE)
    return change


def _common_shapes(opened: Sequence[_Adapter], problems: ErrorCollector) -> dict[str, tuple[int, ...]]:
    """The shapes of every change of any of the adapters, checked to be one for all that have it.

    Without the base nobody can tell whether names that differ by a prefix mean the same, nor the change of a tensor
    that is trained as a whole in one adapter and by factors in another.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for one in opened:
        ours = one.shapes
        wrong = [name for name, shape in ours.items() if shapes.get(name, shape) != shape]
        if wrong:
            what = f"{wrong[0]} is {list(ours[wrong[0]])}, and {list(shapes[wrong[0]])} in the adapters before it"
            problems.add(CheckpointError(what, where=one.name, mend="give adapters of one base"))
        shapes |= ours
    for one in opened:
        both = [name for name, change in one.changes.items() if change.whole and name in shapes]
        if both:
            what = f"{listed(both, 3)}: trained as a whole here, and by factors in another adapter"
            problems.add(CheckpointError(what, where=one.name, mend=_WITH_BASE))
        twins = align(list(opened[0].changes), list(one.changes))
        moved = {ours: theirs for ours, theirs in twins.items() if ours != theirs}
        if moved:
            mine, theirs = next(iter(moved.items()))
            what = f"it calls {theirs!r} what is {mine!r} in {opened[0].name}, as far as names tell"
            problems.add(CheckpointError(what, where=one.name, mend=f"{_WITH_BASE}: the model tells which is which"))
    return shapes
