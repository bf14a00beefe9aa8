"""Planning: from a recipe and the files that it names to a plan, reading headers and configurations alone.

For ``method: auto`` a few rows of weights are read, too. Every mismatch is found here, all at once, before
the first tensor is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from merganser.checkpoints import Checkpoint, side_files
from merganser.checkpoints.opening import SINGLE
from merganser.checkpoints.sources import Source
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.activations import check_texts
from merganser.merging.adapters import adapter_ranks, check_adapter, notes_without_base
from merganser.merging.auto import choose_method
from merganser.merging.chat_templates import choose_chat_template
from merganser.merging.coefficients import check_averages
from merganser.merging.configuration import BASE, check_written, compare_tokenizers, match_configurations
from merganser.merging.inputs import Inputs, open_inputs, without_collection
from merganser.merging.labels import match_labels
from merganser.merging.layer_stacking import Stacking
from merganser.merging.matching import (
    BASE_NUMBER,
    RowMap,
    check_architectures,
    check_fitting,
    check_needs,
    check_unmatched,
    find_separate,
    match_shapes,
    names_to_merge,
)
from merganser.merging.modules import check_modules
from merganser.merging.plan import BUFFER, COPY, HEADS, KEPT, TAKEN, AdapterForm, Plan, Step
from merganser.merging.recipe import Recipe, recorded_options
from merganser.merging.rules import Assignment, assign, needs_parts
from merganser.merging.steps import find_all_layers, make_steps, method_of
from merganser.merging.vocabulary import match_vocabularies
from merganser.methods import METHODS, Facts, Unit
from merganser.methods.auto import AUTO
from merganser.methods.averages.simple import SIMPLE
from merganser.tensors import DTYPE_NAMES, DTYPES, is_floating

_LITTLE = 0.9  # of the linear weights, below which a merge by a method is hardly one


def make_plan(recipe: Recipe, *, adapter: AdapterForm | None = None, allow_pickle: bool = False) -> Plan:
    """Derive the plan of a recipe, reading headers only.

    Args:
        recipe: what to merge.
        adapter: the LoRA adapter to write; None: a full checkpoint, or of adapters without their base one of the
            contributors' ranks.
        allow_pickle: see :func:`~merganser.merging.inputs.open_inputs`.

    Raises:
        UserError: one mistake.
        Problems: several.
    """
    return plan_of(recipe, open_inputs(recipe, allow_pickle=allow_pickle), adapter=adapter)


@without_collection()
def plan_of(recipe: Recipe, inputs: Inputs, *, adapter: AdapterForm | None = None, ask_model: bool = False) -> Plan:
    """The same of files that are open; with ``ask_model`` it says what each tensor is in the model, in any case."""
    problems = ErrorCollector()
    parents, base, reference = inputs.parents, inputs.base, inputs.reference
    people = inputs.people
    check_architectures(people, base, problems)
    notes = check_modules(recipe, people, problems)
    problems.catch(reference.checkpoint.side_paths)
    if not inputs.without_base and (left := side_files.left_behind(reference.checkpoint.path)) is not None:
        notes.append(left)
    asked = recipe.chat_template
    template = None if asked is None else choose_chat_template(asked, parents, base, problems)
    if template is not None and adapter is not None:
        mend = "leave out chat_template, or write a full checkpoint"
        problems.add(RecipeError("an adapter has its base's chat template", where="chat_template", mend=mend))
    separate = find_separate(recipe, people, problems)
    choice = choose_method(recipe, inputs) if recipe.method == AUTO else None
    settled = recipe if choice is None else choice.settle(recipe)
    chosen, options = settled.method, recorded_options(settled, settled.method)
    form = AdapterForm() if adapter is None and inputs.without_base else adapter
    plain = form is None and not ask_model and treats_all_alike(settled, inputs)
    names, untied, left_out = names_to_merge(recipe, people, reference, plain=plain)
    notes += left_out
    if not plain:
        notes += check_fitting(people, base, problems)
    parts = reference.view.parts if needs_parts(recipe) else {}
    scopes = {} if inputs.stacking is None else inputs.stacking.scopes
    assignments = assign(settled, names, [parent.title for parent in parents], parts, scopes, problems, notes)
    methods = [method_of(one) for one in {one.key: one for one in assignments.values() if one.taken is None}.values()]
    needs_base = any(one.needs.base for one in methods) or any(one.taken == BASE_NUMBER for one in assignments.values())
    labels = match_labels(recipe, people, names, problems)
    rows = dict(labels.rows) if labels else {}
    notes += labels.notes if labels else ()
    notes += [
        f"{person.title} is quantised ({found.name}): its weights are read as the BF16 numbers that its codes mean"
        for person in (*people, *([base] if base else []))
        if (found := person.checkpoint.quantisation) is not None and found.codes
    ]
    per_layer = frozenset() if inputs.stacking is None else inputs.stacking.checkpoint.per_layer
    notes += match_configurations(recipe, people, base, problems, adapter=form is not None, per_layer=per_layer)
    if form is None and not plain and not problems.found:
        problems.catch(check_written, recipe, inputs)
    vocabulary = match_vocabularies(
        recipe, people, base, names, problems, needs_base=needs_base, adapter=form is not None
    )
    notes += vocabulary.notes
    rows |= vocabulary.rows
    notes += notes_without_base(inputs, names, methods) if inputs.without_base else []
    if inputs.stacking is None:
        shared = [name for name in names if not inputs.without_base or all(name in p.sources for p in people)]
        match_shapes(people, shared, rows, problems)
        check_unmatched(people, separate, problems)
    else:
        check_stacked(inputs, inputs.stacking, assignments, rows, problems)
    if people[0] is not parents[0] and not inputs.of_ledger and inputs.stacking is None:  # what has no canonical name
        check_unmatched([people[0], parents[0]], ((), ()), problems)
    check_all_needs(settled, assignments.values(), inputs, problems)
    looking = [method for method in methods if method.needs.data]
    notes += check_texts(looking, parents, problems) if looking else []
    if form is not None:
        check_adapter(recipe, inputs, form, methods, problems)
    problems.raise_all()
    rank, ranks = (None, {}) if form is None else adapter_ranks(form, inputs, names)

    steps = make_steps(settled, assignments, rows, inputs, {} if plain else find_all_layers(inputs), problems)
    problems.raise_all()
    check_treated(steps, chosen)
    check_averages(steps, [parent.title for parent in parents])
    notes += check_coverage(settled, steps, None if plain else reference.view.reason)
    outputs = [_spec(name, recipe, inputs, rows) for name in names]
    folders = nested_folders(reference.checkpoint)
    if not inputs.of_ledger and any(separate):
        kept, specs = _kept(inputs, separate, folders)
        steps, outputs = [*steps, *kept], [*outputs, *specs]
    reads_base = needs_base or any(step.base for step in steps) or rank is not None
    reads_base = reads_base or vocabulary.uses_base or recipe.config_from == BASE
    if recipe.base is not None and not reads_base:
        notes.append(f"method {chosen} makes no use of the base model")
    used = base if base is not None and reads_base else None
    tokenizers = base if vocabulary.tokenizer < 0 and base is not None else people[vocabulary.tokenizer]
    notes += compare_tokenizers(people, tokenizers, template=template is None) if rank is None else []
    return Plan(
        recipe=settled.model_copy(update={"options": options, "without_base": inputs.without_base}),
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
        chat_template=template,
        own_vocabularies=vocabulary.separate,
        rank=rank,
        ranks=ranks,
        form=None if form is None or form == AdapterForm(form.rank or 1) else form,
        choice=None if choice is None else choice.because,
        notes=tuple(notes),
        bytes_read=_bytes_read(replace(inputs, base=used), statistics=any(one.needs.statistics for one in methods)),
    )


def treats_all_alike(recipe: Recipe, inputs: Inputs) -> bool:
    """Whether nothing has to be known of the model that opens from the files, since every tensor is treated alike.

    Then the model is not asked: to import transformers and to build the model takes longer than many a merge. Whether
    it opens, if all contributors say the same of it, is left to whoever opens it, as it is with these.

    Args:
        recipe: whose method is chosen.
        inputs: the open files.
    """
    if recipe.exclude or needs_parts(recipe) or not inputs.alike:
        return False
    named = {recipe.method, *(place.method for _, place in recipe.places() if place.method is not None)}
    if named == {SIMPLE.name}:  # the average is what buffers get, and of a stack it is that of its parts
        return True
    return inputs.trained_matrices and not any(METHODS[name].needs.structure for name in named)


def check_all_needs(
    recipe: Recipe, assignments: Iterable[Assignment], inputs: Inputs, problems: ErrorCollector
) -> None:
    """Every method that some tensor gets has what it needs.

    Args:
        recipe: whose method is chosen.
        assignments: of all tensors.
        inputs: the open files.
        problems: receives what is missing.
    """
    different = {one.key: one for one in assignments if one.taken is None}
    partly = any(any(one.coefficients) for one in different.values())
    for one in different.values():
        people = [inputs.parents[number] for number in one.participants]
        coefficients = [one.coefficients[number] for number in one.participants]
        check_needs(method_of(one), recipe, people, inputs.base, problems, coefficients, one.why, partly=partly)


def check_stacked(
    inputs: Inputs,
    stacking: Stacking,
    assignments: Mapping[str, Assignment],
    rows: Mapping[str, RowMap],
    problems: ErrorCollector,
) -> None:
    """Everything fits where the result's layers are others than the contributors'.

    Args:
        inputs: the open files.
        stacking: what becomes of the layers.
        assignments: of all tensors.
        rows: of tensors whose rows are matched.
        problems: receives what does not fit.
    """
    for name, one in assignments.items():
        if one.taken is None and name in stacking.baseless and inputs.base is not None and method_of(one).needs.base:
            where = f"layers.{stacking.scopes[name].number}"
            what = f"method {one.method!r} needs the base's layer, and the sources are of different ones"
            mend = "add {contributor: base, range: […]} to the sources"
            problems.add(RecipeError(what, where=where, mend=mend))
            break
    outside = [name for name in assignments if name not in stacking.scopes or not stacking.scopes[name].inside]
    match_shapes(inputs.people, outside, rows, problems)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in (name for name in assignments if name not in outside):
        groups.setdefault(assignments[name].participants, []).append(name)
    for participants, names in groups.items():
        match_shapes([inputs.reference, *(inputs.parents[n] for n in participants)], names, rows, problems)
    check_unmatched(inputs.parents, [[*names] for names in stacking.skipped], problems)


def check_treated(steps: Sequence[Step], chosen: str) -> None:
    """Every method that is asked for treats some of the tensors that it is asked for.

    Raises:
        RecipeError: it can treat none of them.
    """
    merged = [step for step in steps if step.method not in (TAKEN, COPY) and step.reason != BUFFER]
    asked = {step.asked or chosen for step in merged}
    for method in sorted(asked - {step.method for step in steps}, key=lambda one: one != chosen):
        own = [step for step in merged if (step.asked or chosen) == method]
        why, of_rule = Counter(step.reason for step in own).most_common(1)[0][0], own[0].rule
        what = "these models" if of_rule is None else of_rule
        publish = "publish the statistics it needs, or " if METHODS[method].needs.statistics else ""
        raise RecipeError(
            f"method {method!r} can treat no tensor of {what} ({why})",
            where="recipe",
            mend=f"{publish}choose another method, such as --method {SIMPLE.name}",
        )


def check_coverage(recipe: Recipe, steps: Sequence[Step], unknown: str | None) -> list[str]:
    """A note where the method reaches little of the linear weights, or where it is not known which these are.

    Raises:
        RecipeError: it reaches less than the recipe requires.
    """
    found = Plan(recipe, tuple(steps), ()).coverage
    text = f"method {recipe.method!r} reaches only {found}"
    if recipe.require_coverage is not None and found.share < recipe.require_coverage:
        mend = "mend what the reasons name, choose another method, or require less"
        raise RecipeError(text, where="require_coverage", mend=mend)
    notes = [] if unknown is None else [f"layers are told by the names on disk: {unknown}"]
    return notes + ([text] if found.share < _LITTLE else [])


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


def _bytes_read(inputs: Inputs, *, statistics: bool) -> int:
    """Size of everything that is read: weights of contributors and base, and their statistics."""
    tables = [source.checkpoint.tensors for source in inputs.sources]
    tables += [p.statistics.tensors for p in inputs.parents if p.statistics and statistics]
    return sum(info.nbytes for table in tables for info in table.values())
