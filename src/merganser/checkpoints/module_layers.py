"""The layers of all modules of a sentence-transformers model: of the transformer, and of what lies beside it."""

from __future__ import annotations

from dataclasses import replace

from merganser.checkpoints.layers import Kind, Layer
from merganser.checkpoints.model_view import view_of
from merganser.checkpoints.modules import Module, is_model
from merganser.checkpoints.reader import Checkpoint

#: What the matrices of sentence-transformers' own modules are.
_KINDS: dict[str, Kind] = {"Dense": "linear", "StaticEmbedding": "embedding", "WordEmbeddings": "embedding"}


def module_layers(checkpoint: Checkpoint) -> dict[str, Layer]:
    """The layers of a checkpoint's further modules by the name of their weight, from headers alone."""
    modules = {module.path: module for module in checkpoint.modules}
    places = (*([] if checkpoint.config else [""]), *checkpoint.nested)
    found = [layer for place in places if place in modules for layer in _layers_of(checkpoint, modules[place])]
    return {layer.weight: layer for layer in found}


def _layers_of(checkpoint: Checkpoint, module: Module) -> list[Layer]:
    """The layers of one of a sentence-transformers model's modules: a transformer of its own, or a known kind."""
    prefix = f"{module.path}/" if module.path else ""
    own = {name.removeprefix(prefix): info for name, info in checkpoint.tensors.items() if name.startswith(prefix)}
    place = checkpoint.path / module.path
    if is_model(place):
        found = [*view_of(Checkpoint(f"{checkpoint.name}/{module.path}", place, own)).layers.values()]
    elif module.kind == "LSTM":  # its weights have no module each
        weights = [name for name, info in own.items() if len(info.shape) == 2]
        found = [Layer(name, "linear", name, None, False) for name in weights]
    else:
        kind = _KINDS.get(module.kind)
        weights = [name for name, info in own.items() if kind and name.endswith(".weight") and len(info.shape) == 2]
        stems = [name.removesuffix(".weight") for name in weights]
        biases = [f"{stem}.bias" if f"{stem}.bias" in own else None for stem in stems]
        found = [
            Layer(stem, kind, weight, bias, False)
            for stem, weight, bias in zip(stems, weights, biases, strict=True)
            if kind is not None
        ]
    return [
        replace(
            layer,
            module=f"{module.path}.{layer.module}" if module.path else layer.module,
            weight=prefix + layer.weight,
            bias=None if layer.bias is None else prefix + layer.bias,
        )
        for layer in found
    ]
