"""The plan: what a merge will do, tensor by tensor, as a pure value made from file headers and configurations alone.

It holds no open file, thread, device or memory, prints as JSON, and is all that a worker needs. Every mismatch is found
while it is made, all at once, before the first tensor is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from merganser.checkpoints import TensorInfo
from merganser.checkpoints.layers import Layer, describe_layers
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import RecipeError, UserError, raise_all
from merganser.merging.matching import (
    RowMap,
    check_adapter,
    check_architectures,
    check_needs,
    check_unmatched,
    find_separate,
    match_labels,
    match_shapes,
    matches,
)
from merganser.merging.parents import Inputs, open_inputs, pin
from merganser.merging.recipe import Recipe, method_options
from merganser.methods import METHODS, Facts, Method, Unit, choose
from merganser.methods.simple import SIMPLE
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating

AVERAGE, COPY, KEPT = "average", "copy", "kept separate"
HEADS = "heads"
_CONFIGURED_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")  # what configurations call it


@dataclass(frozen=True)
class Source:
    """A tensor on disk, or a part of one.

    Attributes:
        tensor: its name in the checkpoint.
        index: which one of a stack along the first dimension, such as one expert.
        rows: (start, stop) along the first dimension, of the one that ``index`` names; all by default.
        transposed: the last two dimensions change places.
    """

    tensor: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, where the whole has the shape ``stored``."""
        shape = stored if self.index is None else stored[1:]
        shape = shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape


Sources = Mapping[str, Source]


@dataclass(frozen=True)
class Step:
    """Tensors that are merged together.

    Attributes:
        unit: the targets: names in the result, shapes, and the method's word for how.
        method: one of :data:`merganser.methods.METHODS`, or how it is done without: ``average``, ``copy`` for what is
            no floating point, ``kept separate`` for what one contributor keeps to itself.
        sources: for each contributor, where it has each target; empty for one that takes no part.
        coefficients: of each contributor.
        options: of the method, all of them.
        base: where the base model has each target, if the method needs it.
        reason: why it is not the method that was asked for.
        rows: which rows of which contributor answer to which of the result, where they differ.
    """

    unit: Unit
    method: str
    sources: tuple[Sources, ...]
    coefficients: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Sources = field(default_factory=dict)
    reason: str | None = None
    rows: RowMap | None = None

    @property
    def treatment(self) -> Method | None:
        """The method with its options; None where no method is used."""
        method = METHODS.get(self.method)
        return method and method.configured(method.options_type.model_validate(dict(self.options)))

    @property
    def takers(self) -> list[int]:
        """The contributors that take part."""
        return [number for number, sources in enumerate(self.sources) if sources]


@dataclass(frozen=True)
class Treatment:
    """How many tensors were treated alike.

    Attributes:
        method: that was used.
        kind: the method's word for how.
        reason: why it is not the method that was asked for.
        tensors, nbytes: how many, and their size.
    """

    method: str
    kind: str
    reason: str | None
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A merge that can be carried out.

    Attributes:
        recipe: with the method and all of its options spelled out.
        steps: the work, in the order of the reference's files.
        outputs: the tensors of the result, in the order of its files.
        folders: the file of each folder of the result with weights of its own.
        base: the base model, where method or target need it; it may be that of the contributors' adapters.
        revisions: the commit of each contributor that is on the Hub.
        labels: the labels of the merged head, where they are not the reference's.
        vocabulary_from: the contributor whose tokenizer the result takes.
        rank: of the LoRA adapter that is written; None: a full checkpoint.
        choice: why this method, where the recipe said ``auto``.
        notes: what the user should know.
        bytes_read: size of weights and statistics that are read.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    outputs: tuple[TensorSpec, ...]
    folders: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    revisions: tuple[str | None, ...] = ()
    labels: tuple[str, ...] | None = None
    vocabulary_from: int = 0
    rank: int | None = None
    choice: str | None = None
    notes: tuple[str, ...] = ()
    bytes_read: int = 0

    @property
    def method(self) -> Method:
        """The method that was asked for, with its options."""
        return METHODS[self.recipe.method].configured(method_options(self.recipe, self.recipe.method))

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors of the result by name."""
        return {spec.name: spec for spec in self.outputs}

    @property
    def bytes_written(self) -> int:
        """Size of the result's weights."""
        return sum(spec.nbytes for spec in self.outputs)

    @property
    def coverage(self) -> list[Treatment]:
        """What is treated how, and why."""
        groups: dict[tuple[str, str, str | None], list[TensorSpec]] = {}
        for step in self.steps:
            reason = "as the recipe says" if step.method == KEPT else step.reason
            found = groups.setdefault((step.method, step.unit.kind, reason), [])
            found += [self.specs[name] for name in step.unit.names]
        return [Treatment(*key, len(found), sum(s.nbytes for s in found)) for key, found in groups.items()]

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors each method treats."""
        counts: Counter[str] = Counter()
        for part in self.coverage:
            counts[part.method] += part.tensors
        return dict(counts)

    def file_of(self, name: str) -> tuple[str | None, str]:
        """The file of a folder with weights of its own and the name inside it; None for the model's own files."""
        folder = next((folder for folder in self.folders if name.startswith(f"{folder}/")), None)
        return (None, name) if folder is None else (self.folders[folder], name.removeprefix(f"{folder}/"))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; what is as by default is left out, but for the recipe."""
        found: dict[str, Any] = _PLAN.dump_python(self, mode="json", exclude_defaults=True)
        return {**found, "recipe": self.recipe.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> Plan:
        """The plan that :meth:`to_json` gave.

        Raises:
            RecipeError: these values are no plan, or one of files outside the result's folder.
        """
        try:
            plan = _PLAN.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RecipeError(f"no plan: {place}: {first['msg']}", where=where, mend="merge again") from None
        people, names = len(plan.recipe.contributors), [name for step in plan.steps for name in step.unit.names]
        paths = [PurePosixPath(path) for pair in plan.folders.items() for path in pair]
        inside = not any(path.is_absolute() or ".." in path.parts for path in paths)
        kept = {str(PurePosixPath(step.unit.names[0]).parent) for step in plan.steps if step.method == KEPT}
        whole = all(len(step.sources) == len(step.coefficients) == people for step in plan.steps)
        if not (inside and kept <= set(plan.folders) and set(names) <= set(plan.specs) and whole):
            raise RecipeError("no plan: steps, contributors and files do not agree", where=where, mend="merge again")
        if plan.vocabulary_from not in range(people):
            raise RecipeError("no plan: there is no such contributor", where=where, mend="merge again")
        return plan


_PLAN = TypeAdapter(Plan)


def make_plan(recipe: Recipe, *, rank: int | None = None) -> Plan:
    """Derive the plan of a recipe, reading headers only.

    Args:
        recipe: what to merge.
        rank: of the LoRA adapter to write; None: a full checkpoint.

    Raises:
        UserError: one mistake.
        Problems: several.
    """
    return plan_of(recipe, open_inputs(recipe), rank=rank)


def inputs_of(plan: Plan) -> Inputs:
    """Open the files that a plan names, at their commits.

    Raises:
        UserError: what cannot be opened, or files without what the plan reads.
    """
    people = plan.recipe.contributors
    revisions = plan.revisions or (None,) * len(people)
    pinned = [
        one if revision is None or "+" in revision else one.model_copy(update={"model": pin(one.model, revision)})
        for one, revision in zip(people, revisions, strict=True)
    ]
    inputs = open_inputs(plan.recipe.model_copy(update={"contributors": tuple(pinned)}))
    for step in plan.steps:
        shapes = {fact.name: fact.shape for fact in step.unit.facts}
        for parent, sources in zip(inputs.parents, step.sources, strict=True):
            for target, source in sources.items():
                info = parent.checkpoint.tensors.get(source.tensor)
                if info is None or (step.rows is None and source.shape(info.shape) != tuple(shapes[target])):
                    where, mend = parent.checkpoint.name, "give the very files that the plan was made from"
                    raise RecipeError(f"does not have {source.tensor!r} as the plan reads it", where=where, mend=mend)
    return inputs if plan.base else replace(inputs, base=None)


def plan_of(recipe: Recipe, inputs: Inputs, *, rank: int | None = None) -> Plan:
    """The same of files that are open."""
    problems: list[UserError] = []
    parents, base, reference = inputs.parents, inputs.base, inputs.reference
    people = parents if reference in parents else (reference, *parents)
    check_architectures(people, base, problems)
    separate = find_separate(recipe, people, problems)
    names = [name for name in reference.checkpoint.tensors if not matches(name, recipe.keep_separate)]
    labels = match_labels(recipe, people, names, problems)
    rows = dict(labels.rows) if labels else {}
    notes = list(labels.notes) if labels else []
    match_shapes(recipe, people, names, rows, problems)
    check_unmatched(people, separate, problems)

    chosen, choice = choose_method(recipe, inputs)
    method = METHODS[chosen].configured(method_options(recipe, chosen))
    check_needs(method, recipe, parents, base, problems)
    if rank is not None:
        check_adapter(recipe, inputs, rank, method, problems)
    raise_all(problems)

    steps = _steps(method, recipe, names, rows, inputs)
    if not any(step.method == chosen for step in steps):
        reasons = Counter(step.reason for step in steps)
        raise RecipeError(
            f"method {chosen!r} can treat no tensor of these models ({reasons.most_common(1)[0][0]})",
            where="recipe",
            mend=f"publish the statistics it needs, or choose --method {SIMPLE.name}",
        )
    outputs = [_spec(name, recipe, inputs, rows) for name in names]
    folders = nested_folders(reference.checkpoint.tensors.values())
    if reference in parents and any(separate):
        kept, specs = _kept(inputs, separate, folders)
        steps, outputs = [*steps, *kept], [*outputs, *specs]
    if recipe.base is not None and not method.needs.base and rank is None:
        notes.append(f"method {method.name} makes no use of the base model")
    tall = [sum(info.shape[0] for info in p.checkpoint.tensors.values() if info.shape) for p in parents]
    used = base if base is not None and (method.needs.base or rank is not None) else None
    return Plan(
        recipe=recipe.model_copy(update={"method": chosen, "options": method.options.model_dump(mode="json")}),
        steps=tuple(steps),
        outputs=tuple(outputs),
        folders=folders,
        base=None if used is None else used.contributor.model,
        revisions=tuple(parent.checkpoint.revision for parent in parents),
        labels=labels.labels if labels and list(labels.labels) != reference.label_names else None,
        vocabulary_from=tall.index(max(tall)) if recipe.vocabulary == "largest" else 0,
        rank=rank,
        choice=choice,
        notes=tuple(notes),
        bytes_read=_bytes_read(method, replace(inputs, base=used)),
    )


def choose_method(recipe: Recipe, inputs: Inputs) -> tuple[str, str | None]:
    """The method's name and, where the recipe leaves it open, why it was chosen."""
    if recipe.method != "auto":
        return recipe.method, None
    statistics = [parent.statistics for parent in inputs.parents]
    published = set()
    if all(s is not None and any(layer.input for layer in s.header.layers) for s in statistics):
        published.add("gram")
    if all(s is not None and s.header.fisher for s in statistics):
        published.add("fisher")
    missing = ", ".join(p.title for p in inputs.parents if p.statistics is None) or "some contributors"
    return choose(published, inputs.base is not None, missing)


def _steps(
    method: Method, recipe: Recipe, names: Sequence[str], rows: Mapping[str, RowMap], inputs: Inputs
) -> list[Step]:
    """Every tensor in exactly one step: the method's units, and the average (or a copy) for what it cannot treat."""
    tensors, parents, base = inputs.reference.checkpoint.tensors, inputs.parents, inputs.base
    coefficients = tuple(parent.contributor.coefficient for parent in parents)
    options = method.options.model_dump(mode="json")

    def step(unit: Unit, used: str, reason: str | None = None) -> Step:
        owned = [parent.names for parent in parents]
        sources = tuple({name: Source(own[name]) for name in unit.names if name in own} for own in owned)
        found = Step(unit.without_publications(), used, sources, coefficients, reason=reason)
        if used != COPY:
            found = replace(found, rows=next((rows[name] for name in unit.names if name in rows), None))
        if used == method.name:
            theirs = {name: Source(base.names[name]) for name in unit.names} if base and method.needs.base else {}
            found = replace(found, options=options, base=theirs)
        return found

    facts = make_facts(names, inputs, _layers(method, inputs), rows)
    reasons = {f.name: f"excluded by {p!r}" for f in facts if (p := matches(f.name, recipe.exclude))}
    copied = {f.name for f in facts if not is_floating(tensors[f.name].dtype)}
    units, others = method.units([f for f in facts if f.name not in reasons and f.name not in copied])
    reasons |= others
    steps = [step(unit, method.name) for unit in units]
    for fact in facts:
        if fact.name in copied:
            steps.append(step(Unit((fact.name,), COPY, (fact,)), COPY, "not floating point"))
        elif fact.name in reasons:
            steps.append(step(Unit((fact.name,), AVERAGE, (fact,)), AVERAGE, reasons[fact.name]))
    first = {name: number for number, name in enumerate(names)}
    return sorted(steps, key=lambda one: min(first[name] for name in one.unit.names))


def _layers(method: Method, inputs: Inputs) -> dict[str, Layer]:
    """The layers by the reference's name of their weight, from the first contributor's statistics or the model."""
    first = inputs.parents[0]
    if method.needs.statistics and first.statistics is not None:
        ours = {own: name for name, own in first.names.items()}
        described = [
            Layer(x.module, x.kind, ours[x.weight], ours.get(x.bias or ""), x.tied)
            for x in first.statistics.header.layers
            if x.weight in ours
        ]
    elif method.needs.layers:
        described = describe_layers(inputs.reference.checkpoint)
    else:
        return {}
    layers: dict[str, Layer] = {}
    for layer in described:
        layers.setdefault(layer.weight, layer)
    return layers


def make_facts(
    names: Sequence[str], inputs: Inputs, layers: Mapping[str, Layer], rows: Mapping[str, RowMap]
) -> list[Facts]:
    """What the method may know of each tensor."""
    by_bias = {layer.bias: layer for layer in layers.values() if layer.bias}
    config = inputs.reference.checkpoint.config
    heads = next((config[key] for key in _CONFIGURED_HEADS if isinstance(config.get(key), int)), None)
    facts = []
    for name in names:
        shape = inputs.reference.checkpoint.tensors[name].shape
        owned = [(p.statistics, p.names.get(name, "")) for p in inputs.parents]
        entries = [(s, s.layer(own) if s else None) for s, own in owned]
        base_info = inputs.base.info(name) if inputs.base else None
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


def _spec(name: str, recipe: Recipe, inputs: Inputs, rows: Mapping[str, RowMap]) -> TensorSpec:
    infos = [info for parent in (inputs.reference, *inputs.parents) if (info := parent.info(name)) is not None]
    shape, dtype = infos[0].shape, infos[0].dtype
    if name in rows:
        shape = (rows[name].size, *shape[1:])
    if is_floating(dtype):
        widest = DTYPES[dtype]
        for info in infos[1:]:
            widest = torch.promote_types(widest, DTYPES[info.dtype])
        dtype = recipe.dtype or DTYPE_NAMES[widest]
    return TensorSpec(name, dtype, shape)


def nested_folders(infos: Iterable[TensorInfo]) -> dict[str, str]:
    """The file of each nested sentence-transformers module that has weights of its own, by its folder."""
    pairs = ((str(PurePosixPath(info.file).parent), info) for info in infos)
    return {folder: info.file for folder, info in pairs if info.name.startswith(f"{folder}/")}


def _kept(
    inputs: Inputs, separate: Sequence[Sequence[str]], folders: dict[str, str]
) -> tuple[list[Step], list[TensorSpec]]:
    """The tensors that each contributor keeps to itself, each contributor's in a folder of its own."""
    steps, specs, taken = [], [], set[str]()
    for number, (parent, names) in enumerate(zip(inputs.parents, separate, strict=True)):
        stem = re.sub(r"[^\w.-]+", "-", parent.title).strip(".-") or "head"
        name, again = stem, 2
        while name in taken:
            name, again = f"{stem}-{again}", again + 1
        taken.add(name)
        folder = f"{HEADS}/{name}"
        folders |= {folder: f"{folder}/head.safetensors"} if names else {}
        for own in names:
            info, target = parent.checkpoint.tensors[own], f"{folder}/{own}"
            sources = tuple({target: Source(own)} if n == number else {} for n in range(len(inputs.parents)))
            unit = Unit((target,), COPY, (Facts(target, info.shape),))
            steps.append(Step(unit, KEPT, sources, (1.0,) * len(sources), reason=parent.title))
            specs.append(TensorSpec(target, info.dtype, info.shape))
    return steps, specs


def _bytes_read(method: Method, inputs: Inputs) -> int:
    """Size of everything that is read: weights of contributors and base, and their statistics."""
    tables = [source.checkpoint.tensors for source in inputs.sources]
    tables += [p.statistics.tensors for p in inputs.parents if p.statistics and method.needs.statistics]
    return sum(info.nbytes for table in tables for info in table.values())
