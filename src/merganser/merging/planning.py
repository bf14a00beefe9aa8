"""Planning: from a recipe and the files that it names to a plan, reading headers and configurations alone.

Every mismatch is found here, all at once, before the first tensor is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from merganser.checkpoints import Checkpoint, side_files
from merganser.checkpoints.layers import Layer
from merganser.checkpoints.module_layers import module_layers
from merganser.checkpoints.opening import SINGLE
from merganser.checkpoints.sources import Source
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.activations import check_texts
from merganser.merging.coefficients import check_averages
from merganser.merging.configuration import BASE, check_written, compare_tokenizers, match_configurations
from merganser.merging.inputs import Inputs, Parent, open_inputs, without_collection
from merganser.merging.labels import match_labels
from merganser.merging.matching import (
    RowMap,
    check_adapter,
    check_architectures,
    check_fitting,
    check_needs,
    check_unmatched,
    find_separate,
    match_shapes,
    matches,
    names_to_merge,
)
from merganser.merging.modules import check_modules
from merganser.merging.plan import AVERAGE, BUFFER, COPY, HEADS, KEPT, Plan, Step
from merganser.merging.recipe import Recipe, method_options
from merganser.merging.vocabulary import match_vocabularies
from merganser.methods import METHODS, UNSEEN, Facts, Method, Unit, choose
from merganser.methods.averages.simple import SIMPLE
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating

SUMMED_TIES = 4  # the protocol of statistics from which on layers that share a weight have the sum of their Grams
_LITTLE = 0.9  # of the linear weights, below which a merge by a method is hardly one
_RESERVED = ("rules", "layers", "chat_template", "computation")
NO_LAYER = Layer("", "linear", "", None, False)
_CONFIGURED_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")  # what configurations call it


def make_plan(recipe: Recipe, *, rank: int | None = None, allow_pickle: bool = False) -> Plan:
    """Derive the plan of a recipe, reading headers only.

    Args:
        recipe: what to merge.
        rank: of the LoRA adapter to write; None: a full checkpoint.
        allow_pickle: see :func:`~merganser.merging.inputs.open_inputs`.

    Raises:
        UserError: one mistake.
        Problems: several.
    """
    return plan_of(recipe, open_inputs(recipe, allow_pickle=allow_pickle), rank=rank)


@without_collection()
def plan_of(recipe: Recipe, inputs: Inputs, *, rank: int | None = None) -> Plan:
    """The same of files that are open."""
    problems = ErrorCollector()
    parents, base, reference = inputs.parents, inputs.base, inputs.reference
    people = inputs.people
    check_architectures(people, base, problems)
    notes = check_modules(recipe, people, problems)
    problems.catch(reference.checkpoint.side_paths)
    if (left := side_files.left_behind(reference.checkpoint.path)) is not None:
        notes.append(left)
    for key in _RESERVED:
        if getattr(recipe, key) != Recipe.model_fields[key].get_default(call_default_factory=True):
            problems.add(RecipeError("this key means nothing yet", where=key, mend=f"leave out {key}"))
    separate = find_separate(recipe, people, problems)
    chosen, choice = choose_method(recipe, inputs)
    method = METHODS[chosen].configured(method_options(recipe, chosen))
    # The average of files that are alike asks nothing of the model: transformers takes longer to import than it takes.
    plain = chosen == SIMPLE.name and inputs.alike
    names, untied, left_out = names_to_merge(recipe, people, reference, plain=plain)
    notes += left_out
    if not plain:
        notes += check_fitting(people, base, problems)
    labels = match_labels(recipe, people, names, problems)
    rows = dict(labels.rows) if labels else {}
    notes += labels.notes if labels else ()
    notes += [
        f"{person.title} is quantised ({found.name}): its weights are read as the BF16 numbers that its codes mean"
        for person in (*people, *([base] if base else []))
        if (found := person.checkpoint.quantisation) is not None and found.codes
    ]
    adapter = rank is not None
    notes += match_configurations(recipe, people, base, problems, adapter=adapter)
    if not adapter and not problems.found:
        problems.catch(check_written, recipe, inputs, plain=plain)
    vocabulary = match_vocabularies(
        recipe, people, base, names, problems, needs_base=method.needs.base, adapter=adapter
    )
    notes += vocabulary.notes
    rows |= vocabulary.rows
    match_shapes(people, names, rows, problems)
    check_unmatched(people, separate, problems)
    if people[0] is not parents[0] and not inputs.of_ledger:  # what has no canonical name
        check_unmatched([people[0], parents[0]], ((), ()), problems)
    check_needs(method, recipe, parents, base, problems)
    notes += check_texts(method, parents, problems)
    if rank is not None:
        check_adapter(recipe, inputs, rank, method, problems)
    problems.raise_all()

    steps = _steps(method, recipe, names, rows, inputs, {} if plain else _layers(inputs))
    if not any(step.method == chosen for step in steps):
        reasons = Counter(step.reason for step in steps)
        raise RecipeError(
            f"method {chosen!r} can treat no tensor of these models ({reasons.most_common(1)[0][0]})",
            where="recipe",
            mend=f"publish the statistics it needs, or choose --method {SIMPLE.name}",
        )
    check_averages(steps, [parent.title for parent in parents])
    notes += check_coverage(recipe, steps, chosen, None if plain else reference.view.reason)
    outputs = [_spec(name, recipe, inputs, rows) for name in names]
    folders = nested_folders(reference.checkpoint)
    if not inputs.of_ledger and any(separate):
        kept, specs = _kept(inputs, separate, folders)
        steps, outputs = [*steps, *kept], [*outputs, *specs]
    reads_base = method.needs.base or rank is not None or vocabulary.uses_base or recipe.config_from == BASE
    if recipe.base is not None and not reads_base:
        notes.append(f"method {method.name} makes no use of the base model")
    used = base if base is not None and reads_base else None
    tokenizers = base if vocabulary.tokenizer < 0 and base is not None else people[vocabulary.tokenizer]
    notes += compare_tokenizers(people, tokenizers) if rank is None else []
    return Plan(
        recipe=recipe.model_copy(update={"method": chosen, "options": method.options.model_dump(mode="json")}),
        steps=tuple(steps),
        outputs=tuple(outputs),
        folders=folders,
        main=reference.checkpoint.main,
        base=None if used is None else used.contributor.model,
        revisions=tuple(parent.checkpoint.revision for parent in parents),
        labels=labels.labels if labels and list(labels.labels) != reference.label_names else None,
        vocabulary_from=vocabulary.tokenizer,
        vocabulary=vocabulary.change,
        untied=untied,
        own_vocabularies=vocabulary.separate,
        rank=rank,
        choice=choice,
        notes=tuple(notes),
        bytes_read=_bytes_read(method, replace(inputs, base=used)),
    )


def check_coverage(recipe: Recipe, steps: Sequence[Step], method: str, unknown: str | None) -> list[str]:
    """A note where the method reaches little of the linear weights, or where it is not known which these are.

    Raises:
        RecipeError: it reaches less than the recipe requires.
    """
    found = Plan(recipe.model_copy(update={"method": method}), tuple(steps), ()).coverage
    text = f"method {method!r} reaches only {found}"
    if recipe.require_coverage is not None and found.share < recipe.require_coverage:
        mend = "mend what the reasons name, choose another method, or require less"
        raise RecipeError(text, where="require_coverage", mend=mend)
    notes = [] if unknown is None else [f"layers are told by the names on disk: {unknown}"]
    return notes + ([text] if found.share < _LITTLE else [])


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
    method: Method,
    recipe: Recipe,
    names: Sequence[str],
    rows: Mapping[str, RowMap],
    inputs: Inputs,
    layers: Mapping[str, Layer],
) -> list[Step]:
    """Every tensor in exactly one step: the method's units, and the average (or a copy) for what it cannot treat."""
    tensors, parents, base = inputs.reference.checkpoint.tensors, inputs.parents, inputs.base
    coefficients = tuple(parent.contributor.single_coefficient for parent in parents)
    options = method.options.model_dump(mode="json")

    def step(unit: Unit, used: str, reason: str | None = None) -> Step:
        table = None if used == COPY else next((rows[name] for name in unit.names if name in rows), None)
        turned = table is not None and table.columns

        def own(parent: Parent) -> dict[str, Source]:
            found = {name: parent.sources[name] for name in unit.names if name in parent.sources}
            if used == method.name and unit.facts[0].stack is not None:
                found = {n: _apart(s, unit.facts[0].stack, len(tensors[n].shape), parent) for n, s in found.items()}
            return {name: replace(source, transposed=True) for name, source in found.items()} if turned else found

        needed = (used == method.name and method.needs.base) or (table is not None and table.base)
        theirs = own(base) if base and needed else {}
        settings, stack = (options, unit.facts[0].stack) if used == method.name else ({}, None)
        bare, sources = unit.without_publications(), tuple(own(parent) for parent in parents)
        return Step(bare, used, sources, coefficients, settings, theirs, reason, table, stack)

    def untreated(fact: Facts, used: str, reason: str) -> Step:
        whole = fact if fact.stack is None else replace(fact, shape=tensors[fact.name].shape, stack=None)
        return step(Unit((fact.name,), used, (whole,)), used, reason)

    facts = make_facts(names, inputs, layers, rows)
    reasons = {f.name: f"excluded by {p!r}" for f in facts if (p := matches(f.name, recipe.exclude))}
    if inputs.of_ledger:
        reasons |= {f.name: "packed experts, of which a ledger keeps no sums" for f in facts if f.stack is not None}
    buffers = inputs.reference.view.buffers if layers else ()
    reasons |= {f.name: BUFFER for f in facts if f.name in buffers}
    copied = {f.name for f in facts if not is_floating(tensors[f.name].dtype)}
    units, others = method.units([f for f in facts if f.name not in reasons and f.name not in copied])
    reasons |= others
    steps = [step(unit, method.name) for unit in units]
    for fact in facts:
        if fact.name in copied:
            steps.append(untreated(fact, COPY, "not floating point"))
        elif fact.name in reasons:
            steps.append(untreated(fact, AVERAGE, reasons[fact.name]))
    first = {name: number for number, name in enumerate(names)}
    return sorted(steps, key=lambda one: min(first[name] for name in one.unit.names))


def _apart(source: Source, stack: int, dims: int, parent: Parent) -> Source:
    """A stack whose matrices lie behind each other in the rows of one, as a stack of parts; any other as it is."""
    if dims > 2 or not source.is_whole or (shape := parent.checkpoint.tensors[source.tensor].shape)[0] == stack:
        return source
    height = shape[0] // stack
    parts = (replace(source, rows=(number * height, (number + 1) * height)) for number in range(stack))
    return Source(parts=tuple(parts), stacked=True)


def _layers(inputs: Inputs) -> Mapping[str, Layer]:
    """The layers by the reference's name of their weight: the model's, or what the first statistics say of another."""
    first, view = inputs.parents[0], inputs.reference.view
    if view.model is not None or first.statistics is None:
        return {**view.layers, **module_layers(inputs.reference.checkpoint)}
    ours = {source.tensor: name for name, source in first.sources.items()}
    layers: dict[str, Layer] = {}
    for x in first.statistics.header.layers:
        if x.weight in ours:
            layers.setdefault(ours[x.weight], Layer(x.module, x.kind, ours[x.weight], ours.get(x.bias or ""), x.tied))
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
        layer, bias_of = layers.get(name), by_bias.get(name)
        stack = (layer or bias_of or NO_LAYER).experts
        known = [_published(parent, name, layer, stack) for parent in inputs.parents]
        base_info = inputs.base.info(name) if inputs.base else None
        in_base = base_info is not None and base_info.shape == shape
        if name in rows:
            shape = rows[name].shape(shape)
            in_base = base_info is not None and bool(rows[name].base) and rows[name].shape(base_info.shape) == shape
            shape = shape[::-1] if rows[name].columns else shape
        facts.append(
            Facts(
                name,
                shape if stack is None else shape[1:] if len(shape) > 2 or bias_of else (shape[0] // stack, *shape[1:]),
                layer,
                bias_of,
                grams=tuple(gram for gram, _, _, _ in known),
                counts=tuple(count for _, count, _, _ in known),
                fishers=tuple(fisher for _, _, fisher, _ in known),
                outputs=tuple(outputs for _, _, _, outputs in known),
                heads=heads,
                in_base=in_base,
                alone=name in rows,
                stack=stack,
            )
        )
    return facts


def _published(
    parent: Parent, name: str, layer: Layer | None, stack: int | None
) -> tuple[str | None, bool, bool, bool]:
    """What a contributor publishes of a tensor: its Gram matrix's key, token counts, Fisher information, gradients.

    An expert that no token of its data reached has no Gram matrix of its own while others of its module have: the key
    is :data:`UNSEEN` then, and it has no vote.
    """
    statistics, source = parent.statistics, parent.sources.get(name)
    if statistics is None or source is None:
        return None, False, False, False
    leaves = [source.leaf] if stack is None else [source.one_of(number).leaf for number in range(stack)]
    entries = [statistics.layer(leaf.tensor, leaf.index) for leaf in leaves]
    entry = next((one for one in entries if one is not None), None)
    if entry is None and layer is not None and layer.module in statistics.expert_modules:
        return UNSEEN, False, False, False
    if entry is not None and entry.tied and entry.input and statistics.header.protocol < SUMMED_TIES:
        return None, False, False, False  # of one of the layers that share it alone
    count = entry is not None and statistics.has_count(entry.module)
    fisher = source.is_whole and statistics.has_fisher(source.tensor)
    outputs = source.is_whole and stack is None and entry is not None and entry.output is not None
    return entry.input if entry else None, count, fisher, outputs


def _spec(name: str, recipe: Recipe, inputs: Inputs, rows: Mapping[str, RowMap]) -> TensorSpec:
    infos = [info for parent in (inputs.reference, *inputs.parents) if (info := parent.info(name)) is not None]
    shape, dtype = infos[0].shape, infos[0].dtype
    if name in rows:
        shape = rows[name].shape(shape)
    if is_floating(dtype):
        widest = DTYPES[dtype]
        for info in infos[1:]:
            widest = torch.promote_types(widest, DTYPES[info.dtype])
        dtype = recipe.dtype or DTYPE_NAMES[widest]
    return TensorSpec(name, dtype, shape)


def nested_folders(checkpoint: Checkpoint) -> dict[str, str]:
    """The file of each further module of sentence-transformers that has weights of its own, by its folder."""
    return {folder: f"{folder}/{SINGLE}" for folder in checkpoint.nested}


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
