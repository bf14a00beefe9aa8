"""Tensors that are computed when they are written, so that no more than one input's are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from merganser.checkpoints import TensorInfo
from merganser.checkpoints.writer import TensorSpec
from merganser.tensors import DTYPE_NAMES

#: Tensors that are computed together: what they will be, and the function that computes all of them.
Group = tuple[Sequence[TensorSpec], Callable[[], Mapping[str, Tensor]]]


class Derived(Mapping[str, Tensor]):
    """Tensors that are computed when they are asked for, those of one group together.

    Iterating in order computes every group once and keeps no more than one.

    Args:
        groups: see :data:`Group`.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.infos = {
            spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, "", 0, spec.nbytes)
            for specs, _ in groups
            for spec in specs
        }
        self._makers = {spec.name: make for specs, make in groups for spec in specs}
        self._kept: Mapping[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept = {}  # before the next group is computed
            self._kept = self._makers[name]()
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Dtypes and shapes of tensors; those that are :class:`Derived` are not computed for it."""
    if isinstance(tensors, Derived):
        return dict(tensors.infos)
    return {name: tensor_info(name, tensor) for name, tensor in tensors.items()}


def tensor_info(name: str, tensor: Tensor) -> TensorInfo:
    """What a file's header would say of a tensor."""
    dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    return TensorInfo(name, dtype, tuple(tensor.shape), "", 0, tensor.numel() * tensor.element_size())
