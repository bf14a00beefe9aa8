"""Which on-disk tensors are the weights of which layers.

Module names and on-disk names differ: a base model lacks the prefix that a model with a head adds, tied weights are
stored once, old files say ``gamma`` for ``weight``. The map is made once, here, and checked by value where the model
is loaded; what it does not cover is merged by average, and said so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from merganser.checkpoints.configuration_checks import RESTORE
from merganser.checkpoints.layout import Place, find_places, ties
from merganser.checkpoints.reader import Checkpoint
from merganser.errors import CheckpointError

Kind = Literal["linear", "conv1d", "embedding", "convolution", "unknown"]
_STACK = re.compile(r"(weight|proj|w\d|v\d)$")  # names of parameters that can be a stack of experts' weights
#: Parameters (width, heads, head size) of attention that is written as an einsum: into the heads, and out of them.
_EINSUM: dict[str, Kind] = {
    "q": "conv1d",
    "k": "conv1d",
    "v": "conv1d",
    "r": "conv1d",
    "r_kernel": "conv1d",
    "o": "linear",
}
#: Matrices that modules hold themselves: routers, PyTorch's attention, and what is multiplied from the right.
_BARE: dict[str, Kind] = {"weight": "linear", "in_proj_weight": "linear", "mm_input_projection_weight": "conv1d"}
#: Modules and parameters that a model may have beside those that its tensors account for, and for each tensor.
FEW_PARTS, PARTS_OF_A_TENSOR = 5_000, 16
_NO_MAP = re.compile(r"Norm|Embedding|Scale")  # classes whose bare weight is no linear map


@dataclass(frozen=True)
class Layer:
    """A linear map of its input, or a stack of such maps, one for each expert.

    Attributes:
        module: its name in the model.
        kind: how the weight lies on disk: ``linear`` (out × in), ``conv1d`` (GPT-2's: in × out), ``embedding``
            (vocabulary × width), ``convolution`` (out × in × kernel, a map of patches), or ``unknown`` for a matrix
            that the model multiplies by in a way that is not known. Some linear maps have their heads in a dimension
            of their own: (out × heads × size) and (in × heads × size).
        weight: on-disk name of its weight.
        bias: on-disk name of its bias, if it has one.
        tied: another layer uses the same on-disk weight.
        experts: how many maps lie behind each other in the tensor; None: it is one.
    """

    module: str
    kind: Kind
    weight: str
    bias: str | None
    tied: bool
    experts: int | None = None


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of linear map that a module is; None for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
        return "convolution"
    return "embedding" if isinstance(module, nn.Embedding) else None


@dataclass(frozen=True)
class _Weight:
    """A parameter that is the weight of a linear map, or of a stack: its name and that of its bias in the module."""

    name: str
    kind: Kind
    stacked: bool = False
    bias: str | None = None
    experts: int | None = None


def _weights_of(module: nn.Module) -> list[_Weight]:
    """The weights of linear maps that a module itself holds."""
    own = {name: value for name, value in module._parameters.items() if value is not None}
    if not own:
        return []
    kind = kind_of(module)
    if kind is not None:
        return [_Weight("weight", kind, bias="bias" if "bias" in own else None)] if "weight" in own else []
    kind_name, found = type(module).__name__, list[_Weight]()
    if _NO_MAP.search(kind_name) or isinstance(module, _ConvNd):  # of several groups, or transposed
        return []
    stacks = [name for name, value in own.items() if value.dim() == 3 and _STACK.search(name)]
    if hasattr(module, "is_transposed") or "Expert" in kind_name or "Linear" in kind_name:
        stacked: Kind = "conv1d" if stacks and _is_transposed(module, own, stacks) else "linear"
    else:
        stacked, stacks = "linear", [name for name in stacks if name.endswith("proj_weight")]
    count = next((v for k, v in vars(module).items() if k.endswith("num_experts") and isinstance(v, int)), 0)
    for name, value in own.items():
        if name.endswith("bias"):
            continue
        packed = count > 1 and "Expert" in kind_name and value.dim() == 2
        if packed and value.shape[0] > count and value.shape[0] % count == 0:
            # experts behind each other in the rows, all (inner, outer): the last goes from the inner width to the outer
            found.append(_Weight(name, "conv1d" if name == [*own][-1] else "linear", experts=count))
        elif name in stacks:
            bias = next((b for b in (f"{name}_bias", "bias") if b in own), None)
            found.append(_Weight(name, stacked, stacked=True, bias=bias))
        elif value.dim() == 2 and name in _BARE:
            bias = f"{name.removesuffix('weight')}bias"
            found.append(_Weight(name, _BARE[name], bias=bias if bias in own and own[bias].dim() == 1 else None))
        elif value.dim() == 3 and "Attention" in kind_name and name in _EINSUM:
            found.append(_Weight(name, _EINSUM[name]))
        elif value.dim() > 1 and min(value.shape) > 1 and ("Expert" in kind_name or name.endswith("weight")):
            found.append(_Weight(name, "unknown"))
    return found


def _is_transposed(module: nn.Module, own: Mapping[str, nn.Parameter], stacks: Sequence[str]) -> bool:
    """Whether a stack's matrices are (in, out): as the module says, or else as its first and last fit together."""
    said = getattr(module, "is_transposed", None)
    if said is not None or len(stacks) < 2:
        return bool(said)
    (_, first, second), (_, third, last) = own[stacks[0]].shape, own[stacks[-1]].shape
    straight = second == third and first in (last, 2 * last)
    return not straight and first == last and second in (third, 2 * third)


def find_layers(model: nn.Module, places: Mapping[str, Place], shapes: Mapping[str, Sequence[int]]) -> list[Layer]:
    """The layers of a model whose weights are on disk, in module order.

    Args:
        model: which may be on the meta device.
        places: where its parameters lie.
        shapes: of the stored tensors.
    """
    twins = {name: group for group in ties(model) for name in group}

    def place_of(parameter: str) -> Place | None:
        names = [parameter, *twins.get(parameter, ())]
        return next((places[name] for name in names if name in places), None)

    found: dict[tuple[str, str], Layer] = {}
    users: dict[tuple[str, object], set[str]] = {}
    for module_name, module in model.named_modules():
        for weight in _weights_of(module):
            parameter = f"{module_name}.{weight.name}" if module_name else weight.name
            place = place_of(parameter)
            bias = place_of(f"{module_name}.{weight.bias}" if module_name else weight.bias) if weight.bias else None
            for layer, part in _layers_at(module_name, weight, place, bias, shapes) if place else ():
                found.setdefault((parameter, layer.weight), layer)
                users.setdefault((layer.weight, part), set()).add(parameter)
    shared = {stored for (stored, _), names in users.items() if len(names) > 1}
    return [replace(layer, tied=True) if layer.weight in shared else layer for layer in found.values()]


def _layers_at(
    module: str, weight: _Weight, place: Place, bias: Place | None, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Layer, object]]:
    """The stored tensors of a weight as layers, each with the part of it that the weight is."""
    if weight.kind == "unknown" or (place.is_whole and (weight.experts or weight.name in _EINSUM)):
        for stored in place.stored:
            yield Layer(module, weight.kind, stored, None, False, weight.experts), None
        return
    first = int(weight.stacked)
    out, inner = (first + 1, first) if weight.kind == "conv1d" else (first, first + 1)
    biases: list[str | None] = [None] * len(place.boxes or place.stored)
    if bias is not None and len(bias.stored) in (1, len(biases)):
        biases = [*bias.stored] if len(bias.stored) == len(biases) else [bias.stored[0]] * len(biases)
    if place.boxes is None:  # its rows change places, or a kernel is flattened
        for stored, its_bias in zip(place.stored, biases, strict=True):
            shape = shapes[stored]
            if weight.stacked == (len(shape) == 3) and len(shape) < 4:
                experts = shape[0] if weight.stacked else None
                yield Layer(module, weight.kind, stored, its_bias, False, experts), None
            elif not weight.stacked and weight.kind == "linear":
                yield Layer(module, "convolution", stored, its_bias, False), None
        return
    for box, its_bias in zip(place.boxes, biases, strict=True):
        shape, stacked = shapes[box.tensor], weight.stacked and box.dims[0] is not None
        if weight.kind == "convolution":
            if box.dims == tuple(range(len(shape))):
                yield Layer(module, "convolution", box.tensor, its_bias, False), box.part
            continue
        rows, columns = box.dims[out], box.dims[inner]
        if rows is None or columns is None or len(shape) != 2 + stacked or (stacked and box.dims[0] != 0):
            continue
        if box.part[columns] != (0, shape[columns]):
            continue  # a part of its inputs only
        kind: Kind = weight.kind if weight.kind == "embedding" else "linear" if rows < columns else "conv1d"
        yield Layer(module, kind, box.tensor, its_bias, False, shape[0] if stacked else None), box.part


def map_parameters(model: nn.Module, checkpoint: Checkpoint, *, values: bool = True) -> dict[str, str]:
    """The on-disk name of each parameter of ``model`` that is one stored tensor; others are absent.

    A name counts only with the right shape and, with ``values`` and unless the model is on the meta device, the right
    values.
    """
    return _stored_whole(model, checkpoint, _places_of(model, checkpoint), values=values)


def _stored_whole(
    model: nn.Module, checkpoint: Checkpoint, places: Mapping[str, Place], *, values: bool
) -> dict[str, str]:
    twins = {name: group for group in ties(model) for name in group}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for twin in (name, *twins.get(name, ())):
            place = places.get(twin)
            if place and len(place.stored) == 1 and _same(parameter, checkpoint, place.stored[0], values):
                found[name] = place.stored[0]
                break
    return found


def layers_of(model: nn.Module, checkpoint: Checkpoint) -> list[Layer]:
    """The layers of a model whose weights are on disk, in module order."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    places = _places_of(model, checkpoint)
    names = _stored_whole(model, checkpoint, places, values=True)
    return find_layers(model, {name: place for name, place in places.items() if name in names}, shapes)


def _places_of(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Place]:
    """Where a model's parameters lie, those of sentence-transformers modules under the names of their folders too."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    places, _, _ = find_places(model, {name: shape for name, shape in shapes.items() if "/" not in name})
    for name in model.state_dict() if checkpoint.nested else ():
        for candidate in _of_modules(name, checkpoint.nested):
            if candidate in shapes:
                places[name] = Place.whole(candidate, shapes[candidate])
    return places


def describe_layers(checkpoint: Checkpoint) -> list[Layer]:
    """The layers of a checkpoint from its configuration and headers alone; no weight is read.

    Raises:
        CheckpointError: the architecture is not one of transformers' own.
    """
    return layers_of(empty_model(checkpoint), checkpoint)


def empty_model(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model on the meta device: structure without memory.

    Raises:
        CheckpointError: the architecture is not one of transformers' own.
    """
    return build_empty(checkpoint.config, checkpoint.model_path, len(checkpoint.tensors))


class BadConfiguration(CheckpointError):
    """A configuration of an architecture that transformers knows, from which it cannot make a model."""


def build_empty(values: Mapping[str, Any], folder: Path, tensors: int) -> nn.Module:
    """The model that a configuration describes, on the meta device.

    Args:
        values: of ``config.json``.
        folder: that it belongs to.
        tensors: how many are stored: a model of far more parts than these is not built.

    Raises:
        BadConfiguration: transformers knows the architecture, and does not take these values.
        CheckpointError: the architecture is not one of transformers' own, or needs a package that is not here.
    """
    import transformers
    from transformers.initialization import no_init_weights

    where, known = folder / "config.json", _is_of_transformers(values)
    try:
        config = make_config(values, folder)
        name = (getattr(config, "architectures", None) or [None])[0]
        model_class: Any = getattr(transformers, name, None) if name else None
        is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
        with torch.device("meta"), no_init_weights(), _at_most(FEW_PARTS + PARTS_OF_A_TENSOR * tensors):
            if is_model:
                return model_class(config)
            return transformers.AutoModel.from_config(config)
    except BadConfiguration:
        raise
    except Exception as error:  # whatever a stranger's configuration provokes
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if known and not isinstance(error, (ImportError, OSError, NotImplementedError)):
            what = f"transformers cannot make a model of this configuration: {said}"
            raise BadConfiguration(what, where=where, mend=RESTORE) from None
        raise CheckpointError(
            f"transformers cannot build this architecture: {said}",
            where=where,
            mend="use a method that needs no knowledge of the layers, such as the weighted average",
        ) from None


@contextmanager
def _at_most(parts: int) -> Iterator[None]:
    """Raise an error where more modules and parameters than these are made in the block."""
    made = 0

    def count(module: nn.Module, name: str, part: object) -> None:
        nonlocal made
        made += 1
        if made > parts:
            raise ValueError(f"it has more than {parts} parts, far more than the tensors that are here")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_known(values: Mapping[str, Any]) -> bool:
    """Whether transformers itself has a class for a configuration."""
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _is_of_transformers(values: Mapping[str, Any]) -> bool:
    """Whether this class is the one that the configuration means: it names no code of its own."""
    return is_known(values) and not values.get("auto_map")


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration of a checkpoint, with what an adapter changes of its base's."""
    return make_config(checkpoint.config, checkpoint.model_path)


def check_config(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's configuration is one that transformers takes, or of a model that it does not know.

    Raises:
        UserError: it is neither; see also :attr:`~merganser.checkpoints.Checkpoint.config`.
    """
    if _is_of_transformers(checkpoint.config):
        load_config(checkpoint)
    return True


def make_config(values: Mapping[str, Any], folder: Path) -> Any:
    """transformers' configuration from the values of a ``config.json`` in ``folder``.

    Raises:
        BadConfiguration: transformers knows the architecture, and does not take these values.
        Exception: it does not know the architecture.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if not is_known(values):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config_class = CONFIG_MAPPING[values["model_type"]]
    try:
        decoded = config_class._decode_special_floats(dict(values))  # JSON has no infinity
        return config_class.from_dict(deepcopy(decoded))
    except Exception as error:  # whatever a stranger's values provoke
        if not _is_of_transformers(values):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        what = f"transformers does not take this configuration: {said}"
        raise BadConfiguration(what, where=folder / "config.json", mend=RESTORE) from None


def _of_modules(name: str, modules: list[str]) -> list[str]:
    """The parameter of a sentence-transformers module, which the model has under the name of the module's folder."""
    return [f"{folder}/{name[len(folder) + 1 :]}" for folder in modules if name.startswith(f"{folder}.")]


def _same(parameter: nn.Parameter, checkpoint: Checkpoint, name: str, values: bool) -> bool:
    if tuple(parameter.shape) != checkpoint.tensors[name].shape:
        return False
    if parameter.is_meta or not values:
        return True
    stored = checkpoint.read(name)
    checkpoint.hash(name, "blake3", stored)  # the values are here: hash them now rather than read them again
    return torch.equal(stored.to(parameter.dtype), parameter.detach().cpu())
