"""Experts that lie behind each other in one parameter: which they are, and what each of them is given.

In transformers' eager implementation of experts, each expert's matrix is a view into the parameter, and is given the
tokens that were routed to it. What a view's memory says of the expert is all that is needed to know here of a model.

Dense Gram matrices of all experts would be larger than the model. So the experts of a layer share the Gram matrix of
what comes into them, which is the sum over what each of them was given; what is inside each (the input of its down
projection) has its own, which is written in low rank. See ``experts`` of :func:`merganser.collection.collect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from merganser.checkpoints import Checkpoint
from merganser.checkpoints.layers import Layer, find_layers
from merganser.checkpoints.layout import find_places
from merganser.collection.masks import Batch, model_inputs
from merganser.collection.taps import FunctionTap, Parameters, See, watched
from merganser.statistics import LayerStatistics

Experts = Literal["shared", "exact", "none"]
#: Eigenpairs of what is inside an expert, unless exact ones are asked for.
INNER_RANK = 64


@dataclass(frozen=True)
class Stack:
    """A parameter (experts, …, …) of a module.

    Attributes:
        module: that applies it.
        parameter: its name there.
        stored: the layers on disk that it is made of, each with the expert that it is; None: with all of them.
        leader: the first parameter of the module with the same input; itself, if it is the first.
        width: of its inputs.
        inner: it is given what another one of the module has made.
        shared: one Gram matrix holds for all experts.
    """

    module: str
    parameter: str
    stored: tuple[tuple[int | None, Layer], ...]
    leader: str = ""
    width: int = 0
    inner: bool = False
    shared: bool = False

    def input(self, expert: int) -> str:
        """The key of an expert's input."""
        return self.module if self.shared else f"{self.module}.{self.leader}.{expert}"

    def inputs(self, experts: int) -> list[str]:
        """The keys of all of its inputs."""
        return list(dict.fromkeys(self.input(expert) for expert in range(experts)))

    def layers(self, rows: Mapping[str, int], experts: int) -> Iterator[LayerStatistics]:
        """Its layers on disk that have statistics, told how many rows each input has."""
        for expert, layer in self.stored:
            packed = expert is None
            if layer.kind == "unknown":  # no stack is made of such a layer
                continue
            for number in range(1 if self.shared else experts) if expert is None else (expert,):
                key = self.input(number)
                if rows.get(key):
                    yield LayerStatistics(
                        module=layer.module, kind=layer.kind, weight=layer.weight, bias=layer.bias, input=key,
                        rows=rows[key], expert=number if packed and not self.shared else None,
                    )  # fmt: skip


def stacked(model: nn.Module, checkpoint: Checkpoint) -> list[Stack]:
    """The stacks of experts of a model whose weights are on disk, packed or one by one."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    places, _, _ = find_places(model, shapes)
    by_module: dict[str, dict[str, Layer]] = {}
    for layer in find_layers(model, places, shapes):
        if layer.kind == "unknown":
            continue
        by_module.setdefault(layer.module, {})[layer.weight] = layer
    stacks = []
    for module, layers in by_module.items():
        for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
            place, found = places.get(f"{module}.{name}"), list[tuple[int | None, Layer]]()
            if place is None or parameter.dim() != 3:
                continue
            if place.boxes is None or any(layers[n].experts is not None for n in place.stored if n in layers):
                found = [(None, layers[n]) for n in place.stored if n in layers and layers[n].experts is not None]
            else:
                found = [(box.at[0][0], layers[box.tensor]) for box in place.boxes if box.tensor in layers]
            if found:
                stacks.append(Stack(module, name, tuple(found)))
    return stacks


@dataclass
class _Use:
    """How a parameter was used in the probe: the identities of the inputs of its experts, and their width."""

    inputs: dict[int, int] = field(default_factory=dict)
    width: int = 0


def study_stacks(model: nn.Module, stacks: Sequence[Stack], few: Batch, experts: Experts) -> list[Stack]:
    """The stacks that a probe has seen at work, with what it has seen."""
    uses: dict[tuple[str, str], _Use] = {}
    kept: list[Tensor] = []  # alive, so that no other takes their address

    def see(module: str, parameter: str, expert: int, x: Tensor) -> None:
        use = uses.setdefault((module, parameter), _Use())
        use.inputs.setdefault(expert, x.data_ptr())
        use.width = x.shape[-1]
        kept.append(x)

    with _watching(model, stacks, see):
        model(**model_inputs(few, model))
    found: dict[tuple[str, str], Stack] = {}
    first: dict[str, str] = {}
    for (module, parameter), use in uses.items():  # in the order of their first use
        stack = next(s for s in stacks if (s.module, s.parameter) == (module, parameter))
        before = [other for other in found.values() if other.module == module]
        same = [o for o in before if use.inputs.items() & uses[module, o.parameter].inputs.items()]
        leader = same[0].leader if same else parameter
        inner = leader != first.setdefault(module, parameter)
        shared = experts == "shared" and not inner
        found[module, parameter] = Stack(module, parameter, stack.stored, leader, use.width, inner, shared)
    return list(found.values())


@contextmanager
def stack_hooks(model: nn.Module, stacks: Sequence[Stack], see: See) -> Iterator[None]:
    """Call ``see(key, input)`` for each input of an expert, while the context lasts."""
    leaders = {(stack.module, stack.parameter): stack for stack in stacks if stack.leader == stack.parameter}

    def look(module: str, parameter: str, expert: int, x: Tensor) -> None:
        stack = leaders.get((module, parameter))
        if stack is not None and len(x):
            see(stack.input(expert), x)

    with _watching(model, stacks, look):
        yield


@contextmanager
def _watching(
    model: nn.Module, stacks: Sequence[Stack], see: Callable[[str, str, int, Tensor], None]
) -> Iterator[None]:
    by_module: dict[str, dict[str, Tensor]] = {}
    for stack in stacks:
        parameter = getattr(model.get_submodule(stack.module), stack.parameter)
        by_module.setdefault(stack.module, {})[stack.parameter] = parameter
    with ExitStack() as hooks:
        for module, parameters in by_module.items():
            make = partial(_tap, Parameters(parameters), partial(see, module))
            hooks.enter_context(watched(model.get_submodule(module), make))
        yield


def _tap(parameters: Parameters, see: Callable[[str, int, Tensor], None]) -> FunctionTap:
    def product(weight: Tensor, x: Tensor, _: bool) -> None:
        found = parameters.of(weight)
        if found is None or x.shape[-1] not in found[1].shape[1:]:
            return
        name, parameter, offset = found
        expert, within = divmod(offset, parameter[0].numel())
        if weight.ndim == 3 and weight.shape[0] == x.shape[0] == parameter.shape[0]:
            for each, rows in enumerate(x):  # one for each expert, zeros for tokens that were routed elsewhere
                see(name, each, rows[rows.any(-1)])
        elif weight.ndim == 2 and within == 0:  # a second part of the matrix has the input of the first
            see(name, expert, x.reshape(-1, x.shape[-1]))

    return FunctionTap(product=product)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Experts one after the other, in plain operations, while the context lasts."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", "eager") != "eager":
            configs[id(config)] = config
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def experts_of(model: nn.Module, stack: Stack) -> int:
    """How many experts a stack has."""
    parameter: Tensor = getattr(model.get_submodule(stack.module), stack.parameter)
    return parameter.shape[0]


def is_inner(layer: LayerStatistics) -> bool:
    """Whether a layer's input belongs to one expert of a stack."""
    key = layer.input or ""
    return key.startswith(f"{layer.module}.") and key.rpartition(".")[2].isdecimal()
