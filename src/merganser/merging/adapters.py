"""LoRA adapters in a merge: what they bring as factors, and whether, and of which ranks, the result can be one."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from merganser.checkpoints import AdapterCheckpoint, ChangesCheckpoint, Checkpoint
from merganser.checkpoints.changes import Change, low_rank, read_product
from merganser.checkpoints.sources import Source
from merganser.errors import CheckpointError, ErrorCollector, RecipeError
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.plan import AdapterForm
from merganser.merging.recipe import Recipe
from merganser.methods import Facts, Method
from merganser.methods.base import transposed
from merganser.methods.products import Product
from merganser.paths import real
from merganser.tensors import is_finite
from merganser.text import listed

_FLAG = "--as-adapter"


Adapter = ChangesCheckpoint | AdapterCheckpoint


def brings_product(parent: Parent, base: Parent | None, source: Source) -> bool:
    """Whether a contributor's difference from the base is known as a product, or as nothing, without reading it."""
    checkpoint = parent.checkpoint
    if not isinstance(checkpoint, Adapter) or not source.is_whole or base is None:
        return False
    if isinstance(checkpoint, AdapterCheckpoint):
        theirs, ours = checkpoint.base, base.checkpoint
        if (real(theirs.path), theirs.revision) != (real(ours.path), ours.revision):
            return False
    return source.tensor not in checkpoint.changes or _change(checkpoint, source.tensor) is not None


def product_of(parent: Parent, source: Source, fact: Facts) -> Product:
    """This difference, as (out, in), in float64.

    Raises:
        CheckpointError: NaN or Inf in a factor.
    """
    checkpoint = parent.checkpoint
    change = _change(checkpoint, source.tensor) if isinstance(checkpoint, Adapter) else None
    if change is None or not isinstance(checkpoint, Adapter):
        turned = transposed(fact) or (fact.layer is not None and fact.layer.kind == "embedding")
        height, width = fact.shape[::-1] if turned else fact.shape
        empty = torch.zeros(0, dtype=torch.float64)
        return Product(empty.reshape(height, 0), empty.reshape(0, width))
    found = Product(*read_product(change, checkpoint.adapter))
    if not (is_finite(found.left) and is_finite(found.right)):
        what, mend = f"the factors of {source.tensor!r} hold NaN or Inf", "its training diverged; use another"
        raise CheckpointError(what, where=checkpoint.name, mend=mend)
    return found


def _change(checkpoint: Adapter, name: str) -> Change | None:
    """What an adapter does to a stored tensor, where it is one low-rank product; None otherwise."""
    if name not in checkpoint.changes:
        return None
    change = checkpoint.changes[name]
    return low_rank([change] if isinstance(change, Change) else change)


def rank_of(checkpoint: Checkpoint, name: str) -> int:
    """The rank of what an adapter does to a stored tensor; 0 where it does nothing, or something else."""
    change = _change(checkpoint, name) if isinstance(checkpoint, Adapter) else None
    if change is None or not isinstance(checkpoint, Adapter):
        return 0
    return checkpoint.adapter.tensors[str(change.a)].shape[0]


def check_adapter(
    recipe: Recipe, inputs: Inputs, form: AdapterForm, methods: Sequence[Method], problems: ErrorCollector
) -> None:
    """The result can be a LoRA adapter: there is a base that is a full model, and one adapter holds all of it."""
    base, whole = inputs.base, "write a full checkpoint"
    if form.rank is not None and form.rank < 1:
        problems.add(RecipeError(f"the rank is {form.rank}", where=_FLAG, mend="give at least 1"))
    if form.energy is not None and not 0 < form.energy <= 1:
        mend = "give a share above 0 and at most 1, such as 0.95"
        problems.add(RecipeError(f"the energy to keep is {form.energy:g}", where="--energy", mend=mend))
    for option, patterns in (("whole", form.whole), ("left_out", form.left_out), ("only", form.only)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in inputs.reference.checkpoint.tensors):
                mend = f"use a name or a pattern with *, such as {[*inputs.reference.checkpoint.tensors][-1]!r}"
                problems.add(RecipeError(f"no tensor is called {pattern!r}", where=option, mend=mend))
    adapters = all(isinstance(p.checkpoint, Adapter) for p in inputs.parents)
    if form.rank is None and form.energy is None and not adapters:
        what = "the ranks of the contributors sum up to nothing: not all of them are adapters"
        problems.add(RecipeError(what, where=_FLAG, mend="give a rank, such as 16"))
    if base is None:
        mend = "add --base MODEL, or merge adapters of one base"
        problems.add(RecipeError("an adapter needs the model that it is put on", where=_FLAG, mend=mend))
    elif base.checkpoint.home is not base.checkpoint:
        mend = "give the model below it"
        problems.add(RecipeError(f"the base {base.title} is itself an adapter", where="--base", mend=mend))
    if recipe.keep_separate:
        mend = f"leave out --keep-separate, or {whole}"
        problems.add(RecipeError("heads that are kept separate do not fit into one adapter", where=_FLAG, mend=mend))
    if recipe.vocabulary != "same":
        what = "an adapter cannot hold another vocabulary than its base's"
        problems.add(RecipeError(what, where=_FLAG, mend=whole))
    if inputs.without_base and recipe.names == "canonical":
        what = "canonical names are those of a model, which is not read"
        problems.add(RecipeError(what, where="names", mend="leave it out"))
    if recipe.layers:
        what = "an adapter has its base's layers, and cannot stack, skip or repeat any"
        problems.add(RecipeError(what, where=_FLAG, mend=whole))
    reading = [method for method in methods if method.needs.statistics]
    if inputs.without_base and reading:
        what = f"method {reading[0].name!r} needs statistics, which are of the weights with the base"
        problems.add(RecipeError(what, where="method", mend="give the base, as base+adapter, or another method"))
    elif not reading:  # otherwise they are checked already
        for parent in inputs.parents:
            problems.add(*(parent.statistics.check_names(parent.checkpoint) if parent.statistics else []))


def adapter_ranks(form: AdapterForm, inputs: Inputs, names: Sequence[str]) -> tuple[int, dict[str, int]]:
    """The rank of the adapter's factors, at most, and those of single tensors that differ from it.

    Args:
        form: what was asked for.
        inputs: the open files.
        names: of the tensors of the result.
    """
    shapes = {name: inputs.reference.checkpoint.tensors[name].shape for name in names}
    sides = {name: min(shape) for name, shape in shapes.items() if len(shape) == 2}
    if form.energy is not None:
        most = max(sides.values(), default=1)
        most = most if form.rank is None else min(form.rank, most)
        return most, {name: side for name, side in sides.items() if side < most}
    if form.rank is not None and not inputs.without_base:
        return form.rank, {}
    sums = {name: sum(_ranks(inputs.parents, name)) for name in names}
    wanted = {name: min(n if form.rank is None else form.rank, sides[name]) for name, n in sums.items() if n}
    if not wanted:
        return form.rank or 1, {}
    usual = max(wanted.values())
    return usual, {name: rank for name, rank in wanted.items() if rank != usual}


def _ranks(parents: Sequence[Parent], name: str) -> list[int]:
    return [rank_of(p.checkpoint, p.sources[name].leaf.tensor) for p in parents if name in p.sources]


def notes_without_base(inputs: Inputs, names: Sequence[str], methods: Sequence[Method]) -> list[str]:
    """What to tell the user where adapters are merged without their base, first of all of what they have whole."""
    if inputs.base is None:
        return []
    whole = [name for name in names if name not in inputs.base.sources and ".base_layer." not in name]
    few = [name for name in whole if any(name not in parent.sources for parent in inputs.parents)]
    shared = [name for name in whole if name not in few]
    text = "without the base nobody knows how they changed"
    notes = [f"adapters merged with one another, into an adapter: their base, {inputs.base.title}, is not read"]
    notes += [
        f"without the base, method {method.name} sees the changes in place of the weights"
        for method in methods
        if method.weights([1.0]) is None and not (method.needs.base and getattr(method, "differences", True))
    ]
    notes += [f"averaged as a whole, since {text}: {listed(shared, 3)}"] if shared else []
    return notes + ([f"averaged over the adapters that have them, since {text}: {listed(few, 3)}"] if few else [])
