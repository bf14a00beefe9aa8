"""Planning: from a recipe and the files that it names to a plan, reading headers and configurations alone.

Every mismatch is found here, all at once, before the first tensor is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import torch

from merganser.checkpoints import TensorInfo
from merganser.checkpoints.layers import Layer, describe_layers
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import ErrorCollector, RecipeError
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
from merganser.merging.plan import AVERAGE, COPY, HEADS, KEPT, Plan, Source, Step
from merganser.merging.recipe import Inputs, Recipe, method_options, open_inputs
from merganser.methods import METHODS, Facts, Method, Unit, choose
from merganser.methods.simple import SIMPLE
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating

_CONFIGURED_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")  # what configurations call it


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


def plan_of(recipe: Recipe, inputs: Inputs, *, rank: int | None = None) -> Plan:
    """The same of files that are open."""
    problems = ErrorCollector()
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
    problems.raise_all()

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
    options, owned = method.options.model_dump(mode="json"), [parent.names for parent in parents]

    def step(unit: Unit, used: str, reason: str | None = None) -> Step:
        sources = tuple({name: Source(own[name]) for name in unit.names if name in own} for own in owned)
        theirs = {}
        if used == method.name and method.needs.base and base:
            theirs = {name: Source(base.names[name]) for name in unit.names}
        table = None if used == COPY else next((rows[name] for name in unit.names if name in rows), None)
        settings = options if used == method.name else {}
        return Step(unit.without_publications(), used, sources, coefficients, settings, theirs, reason, table)

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
