"""Seeing what a model's linear maps are given, wherever in its code they are applied.

A layer that is a module is seen by a hook before its ``forward``. Three kinds of use need more:

- a convolution is a linear map of the patches under its kernel, so its input is cut into them;
- an embedding whose ``forward`` is its own (learned positions take a mask, or nothing but a length) is watched while it
  runs: the ids are those that its table is really indexed with;
- a parameter that no layer owns (a router's), or that another module applies, is watched while that module runs.

Watching means a ``TorchFunctionMode`` of the calling thread, which lasts as long as the module's ``forward``.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from merganser.checkpoints.layers import Layer, kind_of

#: Told of each input: the layer's name, and the input (…, d) or the ids.
See = Callable[[str, Tensor], None]

_LOOKUPS: dict[Any, tuple[int, int]] = {  # function → places of table and ids among its arguments
    functional.embedding: (1, 0),
    torch.index_select: (0, 2),
    Tensor.index_select: (0, 2),
    Tensor.__getitem__: (0, 1),
}
_PRODUCTS: dict[Any, tuple[int, int]] = {  # function → places of its two factors, the usual weight first
    functional.linear: (1, 0),
    torch.matmul: (1, 0),
    Tensor.matmul: (1, 0),
    Tensor.__matmul__: (1, 0),
    torch.mm: (1, 0),
    Tensor.mm: (1, 0),
    torch.addmm: (2, 1),
    torch.bmm: (1, 0),
    Tensor.bmm: (1, 0),
    torch.baddbmm: (2, 1),
}


class Parameters:
    """Finds the parameter that a tensor is a view of.

    Args:
        named: on the CPU or another device, with memory of their own.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        present = [(p.data_ptr(), name, p) for name, p in named.items() if not p.is_meta and p.numel()]
        self._sorted = sorted(present, key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._sorted]

    def of(self, view: Tensor) -> tuple[str, Tensor, int] | None:
        """Name, parameter, and where in it the view begins (in numbers); None for any other tensor."""
        start = 0 if view.is_meta else view.data_ptr()
        place = bisect.bisect_right(self._starts, start) - 1
        if place < 0:
            return None
        begin, name, parameter = self._sorted[place]
        offset = start - begin
        return (name, parameter, offset // parameter.element_size()) if offset < parameter.nbytes else None


class FunctionTap(TorchFunctionMode):
    """Calls ``lookup(view, ids)`` or ``product(view, x, transposed)`` before a tensor is used as a table or a weight.

    ``transposed`` is whether the weight is (in, out) there.
    """

    def __init__(
        self,
        *,
        lookup: Callable[[Tensor, Tensor], None] | None = None,
        product: Callable[[Tensor, Tensor, bool], None] | None = None,
    ) -> None:
        super().__init__()
        self._lookup, self._product = lookup, product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments, then do what would have been done."""
        places = _LOOKUPS.get(func) if self._lookup else None
        if places is not None and self._lookup is not None:
            table, ids = _arguments(places, args, kwargs, ("weight", "input"))
            if isinstance(ids, Tensor) and isinstance(table, Tensor) and not ids.is_floating_point():
                self._lookup(table, ids)
        places = _PRODUCTS.get(func) if self._product else None
        if places is not None and self._product is not None:
            weight, x = _arguments(places, args, kwargs, ("weight", "input"))
            if isinstance(weight, Tensor) and isinstance(x, Tensor):
                self._product(weight, x, func is not functional.linear)
                if func is not functional.linear and x.ndim > 1 and weight.ndim > 1:
                    self._product(x, weight.mT, False)  # the weight may stand on the left
        return func(*args, **(kwargs or {}))


def _arguments(places: tuple[int, int], args: Any, kwargs: Any, names: tuple[str, str]) -> tuple[Any, ...]:
    return tuple(
        args[place] if place < len(args) else (kwargs or {}).get(name)
        for place, name in zip(places, names, strict=True)
    )


@contextmanager
def watched(module: nn.Module, make: Callable[[], FunctionTap]) -> Iterator[None]:
    """Run each ``forward`` of a module under a tap of its own, in whatever thread, while the context lasts."""
    running = threading.local()

    def before(_: nn.Module, __: Any) -> None:
        tap = make()
        running.taps = [*getattr(running, "taps", []), tap]
        tap.__enter__()

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        if taps := getattr(running, "taps", []):  # none where the forward itself was never reached
            taps.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


@contextmanager
def input_hooks(
    model: nn.Module, layers: Iterable[Layer], see: See, owners: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Call ``see(layer, input)`` before each use of a layer, while the context lasts.

    Args:
        model: of which the layers are.
        layers: to be seen.
        see: see :data:`See`.
        owners: the modules that apply layers which are no modules themselves, or are not called as such.
    """
    owners = owners or {}
    with ExitStack() as hooks:
        applied: dict[str, dict[str, Tensor]] = {}
        for layer in layers:
            if owner := owners.get(layer.module):
                applied.setdefault(owner, {})[layer.module] = weight_of(model, layer)
                continue
            module: Any = model.get_submodule(layer.module)
            if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
                hooks.enter_context(watched(module, partial(_lookups, layer.module, module, see)))
                continue
            cut = partial(patches, module) if kind_of(module) == "convolution" else None
            hook = partial(_hook, layer.module, see, cut)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for owner, weights in applied.items():
            hooks.enter_context(watched(model.get_submodule(owner), partial(_products, Parameters(weights), see)))
        yield


def weight_of(model: nn.Module, layer: Layer) -> Tensor:
    """A layer's weight in the model."""
    module: Any = model.get_submodule(layer.module)
    weight: Tensor = module.weight
    return weight


def input_width(model: nn.Module, layer: Layer) -> int:
    """The number of inputs of a linear layer of the model."""
    weight = weight_of(model, layer)
    transposed = kind_of(model.get_submodule(layer.module)) == "conv1d"
    return weight.shape[0] if transposed else weight.numel() // weight.shape[0]


@contextmanager
def applications(model: nn.Module, layers: Sequence[Layer], found: dict[str, tuple[str, bool]]) -> Iterator[set[str]]:
    """Learn which modules apply the layers' weights, as ``found[layer] = (module, transposed)``, while a context lasts.

    What it yields are the modules that were called.
    """
    parameters = Parameters({layer.module: weight_of(model, layer) for layer in layers if layer.kind != "embedding"})
    running: list[str] = []
    called: set[str] = set()

    def enter(name: str, *_: Any) -> None:
        running.append(name)
        called.add(name)

    def leave(*_: Any) -> None:
        if running:
            running.pop()

    def product(weight: Tensor, _: Tensor, transposed: bool) -> None:
        view = parameters.of(weight)
        if view is None or view[2] or weight.numel() != view[1].numel() or not running:
            return
        straight = weight.stride(-1) == view[1].stride(-1)
        found.setdefault(view[0], (running[-1], transposed == straight))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        with FunctionTap(product=product):
            yield called


def _hook(
    name: str,
    see: See,
    cut: Callable[[Tensor], Tensor] | None,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    see(name, x if cut is None else cut(x))


def _lookups(name: str, module: nn.Module, see: See) -> FunctionTap:
    def lookup(table: Tensor, ids: Tensor) -> None:
        if table is module.weight:
            see(name, ids)

    return FunctionTap(lookup=lookup)


def _products(parameters: Parameters, see: See) -> FunctionTap:
    def product(weight: Tensor, x: Tensor, _: bool) -> None:
        found = parameters.of(weight)
        if found is not None and found[2] == 0 and weight.shape[-2:].numel() == found[1].numel():
            see(found[0], x)

    return FunctionTap(product=product)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What a convolution multiplies its kernel with: (B, places…, in·k), in the order of ``weight.flatten(1)``.

    Args:
        module: a Conv1d, Conv2d or Conv3d of one group.
        x: its input (B, in, …), or (in, …) for one example.
    """
    convolution: Any = module
    kernel = convolution.kernel_size
    if x.ndim == len(kernel) + 1:
        x = x.unsqueeze(0)
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    x = functional.pad(x, convolution._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(kernel, convolution.stride, convolution.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    places = x.shape[2 : 2 + len(kernel)]
    return x.movedim(1, 1 + len(kernel)).reshape(x.shape[0], *places, -1)
