"""A pretended device: its tensors lie on the CPU, but no operation takes them together with the CPU's own.

    with OtherDevice():
        model.to(DEVICE)

What a GPU refuses is refused here: an operation on tensors of two devices (numbers and tensors without dimensions
aside), and ``numpy()``. How fast a GPU is, and what ``torch.func`` does there, is another matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "xla:0"  # a type that torch knows the name of, and starts no driver for
CPU = torch.device("cpu")
_MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Far(Tensor):
    """A tensor on the pretended device, around one on the CPU."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype)
        far.near = near
        return far

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE)

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor on another device has no numpy array")

    def cpu(self) -> Tensor:
        return torch.ops.aten._to_copy.default(self, device=CPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def to(self, *args: Any, **options: Any) -> Any:
        places = [value for value in (*args, *options.values()) if isinstance(value, str | torch.device)]
        far = self.cpu() if CPU in map(torch.device, places) else self
        rest = [value for value in args if value not in places]
        return Tensor.to(far, *rest, **options) if rest or options else far

    def type_as(self, other: Tensor) -> Tensor:
        return self.to(other.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """While it lasts, tensors can be made on :data:`DEVICE`, and modules moved there."""

    def __enter__(self) -> Any:
        self._before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.__future__.set_overwrite_module_params_on_conversion(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the tensors beneath; its results are where its operands are, or where it was told."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    far = any(isinstance(value, Far) for value in tensors)
    near = any(not isinstance(value, Far) and value.ndim for value in tensors)
    near |= kwargs.get("generator") is not None  # all of ours are the CPU's
    if far and near and function not in _MOVES:
        raise RuntimeError(f"{function}: tensors on two devices")
    place = kwargs.get("device")
    if place is not None:
        far = torch.device(place) == torch.device(DEVICE)
    bare = tree_map(lambda value: value.near if isinstance(value, Far) else value, (args, kwargs))
    found = function(*bare[0], **(bare[1] | ({} if place is None else {"device": CPU})))
    if far:
        found = tree_map(lambda value: Far(value) if isinstance(value, Tensor) else value, found)
    return return_and_correct_aliasing(function, args, kwargs, found)
