"""A model in stages, each of which is merged before the next one is looked at.

A stage is one block of a stack of blocks, such as a Transformer's layer, or a run of linear layers between blocks, such
as a pooler and a head. Their order is that of a forward pass, which the first examples show.

Running up to a stage again and again would cost the square of the number of blocks. So a merged block is not run again:
what it has given for each batch is kept, and it answers with that. The model's own code around the blocks (masks,
positions, what one block hands to the next beside hidden states) runs as ever, whatever the architecture.
"""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from merganser.collection.gram import Workers
from merganser.collection.inputs import Wiring
from merganser.collection.masks import Batch, model_inputs
from merganser.errors import StatisticsError

_OTHERS = "merge with --method regmean, from statistics that merganser collect has written"


@dataclass(frozen=True)
class Stage:
    """What is merged at once.

    Attributes:
        modules: a block, or the linear layers between two.
        layers: the linear layers inside that have Gram matrices.
        stack: the list that the block belongs to; None for layers between blocks.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]
    stack: str | None = None

    def holds(self, name: str) -> bool:
        """Whether a parameter is of this stage."""
        return any(name.startswith(f"{module}.") for module in self.modules)


class _Enough(Exception):
    """The forward pass has come as far as it had to."""


def find_stages(model: nn.Module, wiring: Wiring, batch: Batch) -> list[Stage]:
    """The stages of a model, in the order of a forward pass.

    Args:
        model: in eval mode.
        wiring: whose linear layers see which inputs.
        batch: of a few examples.

    Raises:
        StatisticsError: it has no stack of blocks, or runs them in another order than they have.
    """
    wanted = [layer.module for layer in wiring.layers if layer.kind != "embedding" and not layer.tied]
    stacks = _stacks(model, wanted)
    blocks = {f"{stack}.{number}": stack for stack, count in stacks.items() for number in range(count)}
    if not blocks:
        raise StatisticsError(f"{type(model).__name__} has no stack of blocks to merge one by one", mend=_OTHERS)
    inner = {name: block for block in blocks for name in wanted if name.startswith(f"{block}.")}
    order = _order(
        model, [*blocks, *(name for name in wanted if name not in inner and name not in wiring.owners)], batch
    )
    counts = Counter(order)
    called = [name for name in order if name in blocks]
    if called != list(blocks) and sorted(called) != sorted(blocks):
        wrong = next((name for name in blocks if counts[name] != 1), called[0] if called else next(iter(blocks)))
        what = (
            f"block {wrong} is called {counts[wrong]} times in a forward pass, so that blocks cannot be merged in turn"
        )
        raise StatisticsError(what, mend=_OTHERS)
    for stack in stacks:
        if [name for name in called if blocks[name] == stack] != [name for name in blocks if blocks[name] == stack]:
            raise StatisticsError(f"the blocks of {stack} are not called in their order", mend=_OTHERS)
    stages: list[Stage] = []
    for name in order:
        if name in blocks:
            inside = tuple(layer for layer, block in inner.items() if block == name)
            stages.append(Stage((name,), inside, blocks[name]))
        elif counts[name] == 1:
            if stages and stages[-1].stack is None:
                before = stages.pop()
                stages.append(Stage((*before.modules, name), (*before.layers, name)))
            else:
                stages.append(Stage((name,), (name,)))
    return stages


def _stacks(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """The outermost lists of modules of one class that hold linear layers, and how many modules each has."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(name.startswith(f"{o}.") for o in found):
            continue
        alike = len({type(child) for child in module}) == 1
        if alike and all(any(layer.startswith(f"{name}.{n}.") for layer in layers) for n in range(len(module))):
            found[name] = len(module)
    return found


def _order(model: nn.Module, modules: Sequence[str], batch: Batch) -> list[str]:
    """In which order a forward pass calls these modules."""
    called: list[str] = []
    with ExitStack() as hooks:
        for name in modules:
            hook = partial(lambda name, *_: called.append(name), name)
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        with torch.no_grad():
            model(**model_inputs(batch, model))
    return called


def restricted(wiring: Wiring, stage: Stage) -> Wiring:
    """The part of a wiring that is about a stage's layers."""
    names = [name for name in wiring.calls if name in stage.layers]  # in the order of the calls: leaders come first
    first: dict[str, str] = {}
    leaders = {name: first.setdefault(wiring.leaders[name], name) for name in names}
    return replace(
        wiring,
        layers=tuple(layer for layer in wiring.layers if layer.module in names),
        calls={name: wiring.calls[name] for name in names},
        leaders=leaders,
        widths={name: wiring.widths[wiring.leaders[name]] for name in names if leaders[name] == name},
        notes=(),
        free=wiring.free & set(names),
        owners={name: owner for name, owner in wiring.owners.items() if name in names},
        groups={},
        stacks=(),
    )


class Outputs:
    """What a block has given for each batch: in memory, or in a folder.

    Args:
        folder: None: in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._structure: dict[int, tuple[list[Any], pytree.TreeSpec]] = {}

    def put(self, number: int, output: Any) -> None:
        """Keep a copy of what was given for the batch of this number, in place of what it was before."""
        leaves, spec = pytree.tree_flatten(output)
        kept = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self._folder is not None:
            tensors = {str(place): leaf.contiguous() for place, leaf in enumerate(kept) if isinstance(leaf, Tensor)}
            save_file(tensors, self._folder / f"{number}.safetensors")
            kept = [str(place) if isinstance(leaf, Tensor) else leaf for place, leaf in enumerate(kept)]
        self._structure[number] = (kept, spec)

    def get(self, number: int) -> Any:
        """A copy of it: what comes after a block may change its input in place."""
        kept, spec = self._structure[number]
        if self._folder is None:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in kept]
        else:
            tensors = load_file(self._folder / f"{number}.safetensors")
            leaves = [tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf for leaf in kept]
        return pytree.tree_unflatten(leaves, spec)


class Replay:
    """A model whose merged blocks answer with what they have given before. A context manager.

    Args:
        model: in eval mode.
        batches: all that it will be run on, by their numbers.
        folder: where outputs are kept; None: in memory.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], folder: Path | None = None) -> None:
        self._model, self._batches, self._folder = model, batches, folder
        self._numbers = {
            id(value): n for n, batch in enumerate(batches) for value in batch.values() if isinstance(value, Tensor)
        }
        self._now = threading.local()
        self._outputs: dict[str, Outputs] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Replay:
        hook = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def advance(self, stage: Stage, workers: Workers) -> None:
        """Run a merged block over all batches, keep what it gives, and do not run it again."""
        if stage.stack is None:
            return
        (block,) = stage.modules
        module = self._model.get_submodule(block)
        outputs = self._outputs.get(stage.stack)
        if outputs is None:
            folder = None if self._folder is None else self._folder / f"stack-{len(self._outputs)}"
            if folder is not None:
                folder.mkdir()
            outputs = self._outputs[stage.stack] = Outputs(folder)

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.put(self._now.number, output)
            raise _Enough

        handle = module.register_forward_hook(keep)
        workers.run([partial(self._run, batch) for batch in self._batches])
        handle.remove()
        module.forward = lambda *_, **__: outputs.get(self._now.number)
        self._stack.callback(module.__dict__.pop, "forward", None)

    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._now.number = next(self._numbers[id(value)] for value in kwargs.values() if id(value) in self._numbers)

    def _run(self, batch: Batch) -> None:
        def forward() -> None:
            with torch.no_grad():
                self._model(**model_inputs(batch, self._model))

        try:
            contextvars.copy_context().run(forward)
        except _Enough:
            return
        raise StatisticsError("a block was not called as in the first batch", mend=_OTHERS)
