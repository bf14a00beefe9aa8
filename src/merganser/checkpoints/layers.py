"""Which on-disk tensors are the weights of which layers.

Module names and on-disk names differ: a base model lacks the prefix that a model with a head adds, tied weights are
stored once, old files say ``gamma`` for ``weight``. The map is made once, here, and checked by value where the model
is loaded; what it does not cover is merged by average, and said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from merganser.checkpoints.reader import Checkpoint, read_json, renamed
from merganser.errors import CheckpointError

Kind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class Layer:
    """A layer that is a plain linear map of its input.

    Attributes:
        module: its name in the model.
        kind: ``linear`` (weight is out × in), ``conv1d`` (GPT-2's: in × out) or ``embedding`` (vocabulary × width).
        weight: on-disk name of its weight.
        bias: on-disk name of its bias, if it has one.
        tied: another layer uses the same on-disk weight.
    """

    module: str
    kind: Kind
    weight: str
    bias: str | None
    tied: bool


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of linear map that a module is; None for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def map_parameters(model: nn.Module, checkpoint: Checkpoint, *, values: bool = True) -> dict[str, str]:
    """The on-disk name of each parameter of ``model``; parameters that are not on disk are absent.

    A candidate name counts only with the right shape and, with ``values`` and unless the model is on the meta device,
    the right values.
    """
    prefix = getattr(model, "base_model_prefix", "")
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, str] = {}
    by_identity: dict[int, str] = {}
    for name, parameter in named.items():
        for candidate in _spellings(name, prefix):
            if candidate in checkpoint.tensors and _same(parameter, checkpoint, candidate, values):
                found[name] = by_identity[id(parameter)] = candidate
                break
    for name, parameter in named.items():  # tied: stored under another parameter's name
        if name not in found and id(parameter) in by_identity:
            found[name] = by_identity[id(parameter)]
    return {name: found[name] for name in named if name in found}


def layers_of(model: nn.Module, checkpoint: Checkpoint) -> list[Layer]:
    """The layers of a model whose weights are on disk, in module order."""
    names = map_parameters(model, checkpoint)
    users: dict[str, int] = {}
    found: list[tuple[str, Kind, str, str | None]] = []
    for module_name, module in model.named_modules():
        kind = kind_of(module)
        weight = names.get(f"{module_name}.weight")
        if kind is None or weight is None:
            continue
        users[weight] = users.get(weight, 0) + 1
        found.append((module_name, kind, weight, names.get(f"{module_name}.bias")))
    return [Layer(module, kind, weight, bias, users[weight] > 1) for module, kind, weight, bias in found]


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
    import transformers

    where = checkpoint.path / "config.json"
    try:
        config = load_config(checkpoint)
        name = (getattr(config, "architectures", None) or [None])[0]
        model_class: Any = getattr(transformers, name, None) if name else None
        with torch.device("meta"):
            if model_class is not None:
                return model_class(config)
            return transformers.AutoModel.from_config(config)
    except Exception as error:  # whatever a stranger's configuration provokes
        raise CheckpointError(
            f"transformers cannot build this architecture: {str(error).splitlines()[0]}",
            where=where,
            mend="use a method that needs no knowledge of the layers, such as the weighted average",
        ) from None


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration of a checkpoint, with what an adapter changes of its base's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    stored = read_json(checkpoint.path / "config.json", missing={})
    changes = {key: value for key, value in checkpoint.config.items() if stored.get(key) != value}
    if "id2label" in changes:
        changes["id2label"] = {int(key): label for key, label in changes["id2label"].items()}
    config.update(changes)
    return config


def _spellings(name: str, prefix: str) -> list[str]:
    names = [name]
    if prefix:
        names.append(name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}")
    return [*names, *(old for name in names for old in renamed(name))]


def _same(parameter: nn.Parameter, checkpoint: Checkpoint, name: str, values: bool) -> bool:
    if tuple(parameter.shape) != checkpoint.tensors[name].shape:
        return False
    if parameter.is_meta or not values:
        return True
    stored = checkpoint.read(name)
    checkpoint.sha256(name, stored)  # the values are here: hash them now rather than read them again
    return torch.equal(stored.to(parameter.dtype), parameter.detach().cpu())
