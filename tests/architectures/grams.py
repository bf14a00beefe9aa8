"""Gram matrices and token counts of a model's inputs by plain observation: each example runs alone, without padding.

What is observed are the functions that multiply by a parameter, whatever the module around them: so experts, routers
and shared weights are seen as what they are. Nothing of merganser's is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

#: A parameter's name and the position of its first number that took part, such as that of an expert.
Key = tuple[str, int]


@dataclass
class Observed:
    """Sums over the inputs of each parameter.

    Attributes:
        grams: Σ x xᵀ in float64, (d, d).
        sums: Σ x, (d,).
        rows: how many x.
        sizes: how many numbers the parameter, or the part of it that took part, has.
        counts: how often each row of an embedding was looked up.
    """

    grams: dict[Key, Tensor] = field(default_factory=dict)
    sums: dict[Key, Tensor] = field(default_factory=dict)
    rows: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    sizes: dict[Key, int] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def find(self, name: str, place: int) -> Key | None:
        """What was seen of the part of a parameter that a position is in."""
        parts = (key for key in self.grams if key[0] == name and key[1] <= place < key[1] + self.sizes[key])
        return next(parts, None)

    def add(self, key: Key, inputs: Tensor, size: int) -> None:
        """Count some inputs (…, d) of a weight of so many numbers."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float64)
        self.grams[key] = self.grams.get(key, 0) + x.T @ x
        self.sums[key] = self.sums.get(key, 0) + x.sum(0)
        self.rows[key] += len(x)
        self.sizes[key] = size


def observe(model: PreTrainedModel, batch: dict[str, Tensor], *, together: bool = False) -> Observed:
    """What a model's parameters see of a batch's examples, run one by one.

    Args:
        model: in eval mode.
        batch: padded.
        together: run the padded batch and leave out the rows of padding, for models in which padding changes what the
            other tokens are.
    """
    seen = _Observer(model, batch["attention_mask"].bool() if together else None)
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation is not None:
        model.set_experts_implementation("eager")
    with torch.no_grad(), seen:
        for example in [batch] if together else alone(batch):
            model(**example)
    return seen.found


def alone(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each example of a batch without its padding; masks stay, all ones."""
    for number in range(len(next(iter(batch.values())))):
        example = {}
        for name, value in batch.items():
            mask = batch.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
            cut = mask is not None and value.shape[:2] == mask.shape
            example[name] = value[number : number + 1, : int(mask[number].sum())] if cut else value[number : number + 1]
        yield example


class _Observer(TorchFunctionMode):
    def __init__(self, model: nn.Module, mask: Tensor | None) -> None:
        super().__init__()
        self.found, self._mask = Observed(), mask
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = dict(zip(_ARGUMENTS.get(function, ()), args, strict=False)) | (kwargs or {})
        weight, inputs = given.get("weight"), given.get("input")
        name = self._name_of(weight)
        if name is None and function in _PRODUCTS and self._name_of(inputs):  # W x and not x Wᵀ
            name, weight, inputs = self._name_of(inputs), inputs, weight.transpose(-1, -2)
        if function is Tensor.__getitem__ and not _is_ids(inputs):
            name = None
        if name is not None and weight.dim() >= 2:
            self._see(function, (name, weight.storage_offset()), weight, inputs, given)
        return function(*args, **(kwargs or {}))

    def _name_of(self, weight: Any) -> str | None:
        return self._names.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None

    def _see(self, function: Any, key: Key, weight: Tensor, inputs: Tensor, given: dict[str, Any]) -> None:
        if self._mask is not None:
            if inputs.shape == (1, self._mask.shape[1]):  # one position for all examples
                inputs = inputs.expand(self._mask.shape)
            inputs = inputs[self._mask] if inputs.shape[:2] == self._mask.shape else inputs
        if function is functional.embedding or function is Tensor.__getitem__:
            counts = torch.bincount(inputs.reshape(-1), minlength=len(weight))
            self.found.counts[key[0]] = self.found.counts.get(key[0], 0) + counts
        elif function in _CONVOLUTIONS:
            if given.get("groups", 1) == 1:
                self.found.add(key, _patches(inputs, weight, given), weight.numel())
        elif function is torch.bmm:  # all experts at once; those that a token is not sent to see zeros
            for number, (one, x) in enumerate(zip(weight, inputs, strict=True)):
                self.found.add((key[0], number * weight.stride(0)), x[x.any(-1)], one.numel())
        else:
            self.found.add(key, inputs, weight.numel())


def _is_ids(value: Any) -> bool:
    """Whether rows of a table are looked up by it."""
    return isinstance(value, Tensor) and value.dtype == torch.int64


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
#: Functions that multiply by a weight, and the names of their arguments.
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    functional.linear: ("input", "weight"),
    functional.embedding: ("input", "weight"),
    **dict.fromkeys(_PRODUCTS, ("input", "weight")),
    torch.mm: ("input", "weight"),
    torch.bmm: ("input", "weight"),
    Tensor.__getitem__: ("weight", "input"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys(_CONVOLUTIONS, _CONVOLUTION),
}


def _patches(inputs: Tensor, weight: Tensor, given: dict[str, Any]) -> Tensor:
    """What a convolution multiplies, (…, in · kernel), in the order of ``weight.flatten(1)``."""
    size = weight.shape[2:]
    stride, padding, dilation = (_each(given.get(name, one), len(size)) for name, one in _DEFAULTS.items())
    padded = functional.pad(inputs, [width for one in reversed(padding) for width in (one, one)])
    for axis, (kernel, step, gap) in enumerate(zip(size, stride, dilation, strict=True)):
        spread = gap * (kernel - 1) + 1
        padded = padded.unfold(2 + axis, spread, step)[..., ::gap]
    spatial = len(size)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return padded.permute(order).flatten(1 + spatial)


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


def _each(value: Any, count: int) -> tuple[int, ...]:
    value = 0 if value == "valid" else value
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values
