"""The plan: the tensor-by-tensor work of a merge, a pure value derived from file headers alone.

Every mismatch is found here, all at once, before the first tensor is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from merganser.checkpoints.layers import Layer, describe_layers
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import RecipeError, UserError, raise_all
from merganser.files import parse_size
from merganser.merging.checks import (
    check_architectures,
    check_needs,
    check_unmatched,
    find_separate,
    match_shapes,
    matches,
)
from merganser.merging.cutting import OWN_BYTES, SMALL, busiest, fit, min_slice_rows
from merganser.merging.memory import anonymous_bytes
from merganser.merging.parents import Parent, open_base, open_parents
from merganser.merging.recipe import Recipe, method_options
from merganser.merging.rows import LabelPlan, Rows, match_labels
from merganser.merging.running_sums import RunningSums
from merganser.merging.step import Step
from merganser.methods import METHODS, Facts, Method, Unit, choose
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")  # what configurations call it


@dataclass(frozen=True)
class Plan:
    """A merge that can be carried out.

    Attributes:
        recipe: with the method and all of its options spelled out.
        choice: why this method, where the recipe said ``auto``.
        method: ready to merge units.
        parents: the contributors, first the one whose names and side files the result takes.
        base: the base model, where the method has use for one.
        steps: the work, in the order of the first contributor's files.
        outputs: the merged tensors.
        separate: for each contributor, its tensors (its own names) that it keeps for itself.
        labels: how heads with different labels are matched.
        vocabulary_from: the contributor whose tokenizer the result takes.
        notes: what the user should know.
        threads: how many units are worked on at once.
        budget: bytes that the units being worked on may take together.
        resident: bytes of the process itself.
        device: where tensors are computed.
        max_memory: what the process may take, where that was said.
        kept: where sums of earlier merges are to go on from and those of this one are put.
    """

    recipe: Recipe
    choice: str | None
    method: Method
    parents: tuple[Parent, ...]
    base: Parent | None
    steps: tuple[Step, ...]
    outputs: tuple[TensorSpec, ...]
    separate: tuple[tuple[str, ...], ...]
    labels: LabelPlan | None
    vocabulary_from: int
    notes: tuple[str, ...]
    threads: int
    budget: int
    resident: int
    device: str = "cpu"
    max_memory: int | None = None
    kept: RunningSums | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors each method treats."""
        counts: Counter[str] = Counter()
        for step in self.steps:
            counts[step.method] += len(step.unit.names)
        if kept := sum(len(names) for names in self.separate):
            counts["kept separate"] = kept
        return dict(counts)

    @property
    def bytes_written(self) -> int:
        """Size of the result's weights."""
        kept = sum(
            parent.checkpoint.tensors[name].nbytes
            for parent, names in zip(self.parents, self.separate, strict=True)
            for name in names
        )
        return kept + sum(spec.nbytes for spec in self.outputs)

    @property
    def bytes_read(self) -> int:
        """Size of everything that is read: weights of contributors and base, and their statistics."""
        weights = sum(info.nbytes for p in self.parents for info in p.checkpoint.tensors.values())
        base = sum(info.nbytes for info in self.base.checkpoint.tensors.values()) if self.base else 0
        published = [p.statistics for p in self.parents if p.statistics and self.method.needs.statistics]
        return weights + base + sum(info.nbytes for one in published for info in one.tensors.values())

    @property
    def peak_bytes(self) -> int:
        """Estimate of the anonymous memory of the process at its worst moment."""
        return self.resident + min(self.budget, busiest(self.steps, self.threads))

    def uncut(self) -> list[tuple[str, int]]:
        """What can only be merged as a whole: the first tensor of each unit and its bytes, the costliest first."""
        whole = [
            (step.unit.names[0], step.nbytes)
            for step in self.steps
            if min_slice_rows(step, self.method) is None and step.nbytes > SMALL
        ]
        return sorted(whole, key=lambda entry: -entry[1])

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The merged tensors by name."""
        return {spec.name: spec for spec in self.outputs}

    @property
    def torch_device(self) -> torch.device | None:
        """Where tensors are put; None for where they are read to."""
        return None if self.device == "cpu" else torch.device(self.device)


def make_plan(recipe: Recipe, *, threads: int = 2, max_memory: int | None = None, device: str = "cpu") -> Plan:
    """Derive the plan of a recipe, reading headers only.

    Args:
        recipe: what to merge.
        threads: how many units are worked on at once.
        max_memory: bytes that the whole process may take; the bytes of the result do not depend on it.
        device: where tensors are computed.

    Raises:
        UserError: one mistake.
        Problems: several.
    """
    problems: list[UserError] = []
    parents = open_parents(recipe, problems)
    raise_all(problems)
    reference = parents[0].checkpoint
    base = open_base(recipe, list(reference.tensors), problems, parents)
    check_architectures(parents, base, problems)
    separate = find_separate(recipe, parents, problems)
    merged_names = [name for name in reference.tensors if not matches(name, recipe.keep_separate)]
    labels = match_labels(recipe, parents, merged_names, problems)
    rows = dict(labels.rows) if labels else {}
    notes = list(labels.notes) if labels else []
    match_shapes(recipe, parents, merged_names, rows, problems)
    check_unmatched(parents, separate, problems)

    method_name, choice = choose_method(recipe, parents, base)
    method = METHODS[method_name].configured(method_options(recipe, method_name))
    check_needs(method, recipe, parents, base, problems)
    raise_all(problems)

    layers = _layers(method, parents, notes)
    facts = make_facts(merged_names, parents, base, layers, rows)
    steps = make_steps(method, recipe, facts, rows, parents)
    if not any(step.method == method.name for step in steps):
        reasons = Counter(step.reason for step in steps)
        raise RecipeError(
            f"method {method.name!r} can treat no tensor of these models ({reasons.most_common(1)[0][0]})",
            where="recipe",
            mend="publish the statistics it needs, or choose --method simple",
        )
    resident = anonymous_bytes() + OWN_BYTES
    steps, budget = fit(steps, method, len(parents), threads, resident, max_memory)
    if recipe.base is not None and not method.needs.base:
        notes.append(f"method {method.name} makes no use of the base model")
    outputs = tuple(_spec(name, recipe, parents, rows) for name in merged_names)
    resolved = recipe.model_copy(update={"method": method.name, "options": method.options.model_dump()})
    longest = [sum(info.shape[0] for info in p.checkpoint.tensors.values() if info.shape) for p in parents]
    vocabulary_from = longest.index(max(longest)) if recipe.vocabulary == "largest" else 0
    return Plan(
        resolved, choice, method, tuple(parents), base if method.needs.base else None, tuple(steps), outputs,
        separate, labels, vocabulary_from, tuple(notes), threads, budget, resident, device, max_memory,
    )  # fmt: skip


def choose_method(recipe: Recipe, parents: Sequence[Parent], base: Parent | None) -> tuple[str, str | None]:
    """The method's name and, where the recipe leaves it open, why it was chosen."""
    if recipe.method != "auto":
        return recipe.method, None
    statistics = [parent.statistics for parent in parents]
    published = set()
    if all(s is not None and any(layer.input for layer in s.header.layers) for s in statistics):
        published.add("gram")
    if all(s is not None and s.header.fisher for s in statistics):
        published.add("fisher")
    missing = ", ".join(p.title for p in parents if p.statistics is None) or "some contributors"
    return choose(published, base is not None, missing)


def make_steps(
    method: Method, recipe: Recipe, facts: Sequence[Facts], rows: dict[str, Rows], parents: Sequence[Parent]
) -> list[Step]:
    """Every tensor in exactly one step: the method's units, and the average (or a copy) for what it cannot treat."""
    excluded = {f.name: p for f in facts if (p := matches(f.name, recipe.exclude))}
    copied = {f.name for f in facts if not is_floating(parents[0].checkpoint.tensors[f.name].dtype)}
    units, reasons = method.units([f for f in facts if f.name not in excluded and f.name not in copied])
    first = {f.name: number for number, f in enumerate(facts)}
    steps = [Step(unit, method.name, None, _unit_rows(unit, rows)) for unit in units]
    for fact in facts:
        unit = Unit((fact.name,), "average", (fact,))
        if fact.name in copied:
            steps.append(Step(replace(unit, kind="copy"), "copy", "not floating point"))
        elif fact.name in excluded:
            steps.append(Step(unit, "average", f"excluded by {excluded[fact.name]!r}", rows.get(fact.name)))
        elif fact.name in reasons:
            steps.append(Step(unit, "average", reasons[fact.name], rows.get(fact.name)))
    return sorted(steps, key=lambda step: min(first[name] for name in step.unit.names))


def _unit_rows(unit: Unit, rows: dict[str, Rows]) -> Rows | None:
    return next((rows[name] for name in unit.names if name in rows), None)


def _layers(method: Method, parents: Sequence[Parent], notes: list[str]) -> dict[str, Layer]:
    """The first contributor's layers by weight, from its statistics or from its configuration."""
    if method.needs.statistics and parents[0].statistics is not None:
        described = [Layer(x.module, x.kind, x.weight, x.bias, x.tied) for x in parents[0].statistics.header.layers]
    elif method.needs.layers:
        described = describe_layers(parents[0].checkpoint)
    else:
        return {}
    layers: dict[str, Layer] = {}
    for layer in described:
        layers.setdefault(layer.weight, layer)
    return layers


def make_facts(
    names: Sequence[str],
    parents: Sequence[Parent],
    base: Parent | None,
    layers: dict[str, Layer],
    rows: dict[str, Rows],
) -> list[Facts]:
    """What the method may know of each tensor."""
    by_bias = {layer.bias: layer for layer in layers.values() if layer.bias}
    config = parents[0].checkpoint.config
    stated = [config[key] for key in _HEADS if isinstance(config.get(key), int)]
    heads = stated[0] if stated else None
    facts = []
    for name in names:
        shape = parents[0].checkpoint.tensors[name].shape
        owned = [(p.statistics, p.names.get(name, "")) for p in parents]
        entries = [(s, s.layer(own) if s else None) for s, own in owned]
        base_info = base.info(name) if base else None
        facts.append(
            Facts(
                name,
                shape,
                layers.get(name),
                by_bias.get(name),
                grams=tuple(entry.input if entry else None for _, entry in entries),
                counts=tuple(bool(s and entry and s.has_count(entry.module)) for s, entry in entries),
                fishers=tuple(bool(s and s.has_fisher(own)) for s, own in owned),
                heads=heads,
                in_base=base_info is not None and base_info.shape == shape and name not in rows,
                alone=name in rows,
            )
        )
    return facts


def _spec(name: str, recipe: Recipe, parents: Sequence[Parent], rows: dict[str, Rows]) -> TensorSpec:
    infos = [info for parent in parents if (info := parent.info(name)) is not None]
    shape = infos[0].shape
    if name in rows:
        shape = (rows[name].size, *shape[1:])
    dtype = infos[0].dtype
    if is_floating(dtype):
        widest = DTYPES[dtype]
        for info in infos[1:]:
            widest = torch.promote_types(widest, DTYPES[info.dtype])
        dtype = recipe.dtype or DTYPE_NAMES[widest]
    return TensorSpec(name, dtype, shape)


def max_shard_bytes(recipe: Recipe) -> int:
    """The recipe's largest weight file in bytes."""
    return parse_size(recipe.max_shard_size)
