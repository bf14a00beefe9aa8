"""The steps of a plan: every tensor of the result in exactly one, by the method that the recipe gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merganser.checkpoints.layers import Layer
from merganser.checkpoints.module_layers import module_layers
from merganser.checkpoints.sources import Source
from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.matching import BASE_NUMBER, RowMap, matches
from merganser.merging.plan import AVERAGE, BUFFER, COPY, TAKEN, Step
from merganser.merging.recipe import Recipe
from merganser.merging.rules import Assignment
from merganser.methods import METHODS, UNSEEN, Facts, Method, Unit
from merganser.tensors import is_floating

SUMMED_TIES = 4  # the protocol of statistics from which on layers that share a weight have the sum of their Grams
NO_LAYER = Layer("", "linear", "", None, False)
_CONFIGURED_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")  # what configurations call it


def method_of(assignment: Assignment) -> Method:
    """The method of an assignment, with its options."""
    method = METHODS[assignment.method]
    return method.configured(method.options_type.model_validate(dict(assignment.options)))


def make_steps(
    recipe: Recipe,
    assignments: Mapping[str, Assignment],
    rows: Mapping[str, RowMap],
    inputs: Inputs,
    layers: Mapping[str, Layer],
    problems: ErrorCollector,
) -> list[Step]:
    """Every tensor in exactly one step: the methods' units, and the average (or a copy) for what they cannot treat.

    Args:
        recipe: what to merge.
        assignments: what is done with each tensor, in the order of the result.
        rows: of tensors whose rows are matched.
        inputs: the open files.
        layers: the linear maps by the names of their weights.
        problems: receives tensors that cannot be taken.
    """
    names = [*assignments]
    facts = make_facts(names, inputs, layers, rows)
    making = _Making(recipe, rows, inputs)
    reasons = {f.name: f"excluded by {p!r}" for f in facts if (p := matches(f.name, recipe.exclude))}
    if inputs.of_ledger:
        reasons |= {f.name: "packed experts, of which a ledger keeps no sums" for f in facts if f.stack is not None}
    buffers = inputs.reference.view.buffers if layers else ()
    reasons |= {f.name: BUFFER for f in facts if f.name in buffers}
    tensors = inputs.reference.checkpoint.tensors
    steps: list[Step] = []
    groups: dict[str, list[Facts]] = {}
    for fact in facts:
        assignment = assignments[fact.name]
        if assignment.taken is not None and matches(fact.name, recipe.exclude) is None:
            problems.catch(lambda one=fact, said=assignment: steps.append(making.take(one, said)))
        elif not is_floating(tensors[fact.name].dtype):
            steps.append(making.untreated(fact, assignment, COPY, "not floating point"))
        elif fact.name in reasons:
            steps.append(making.untreated(fact, assignment, AVERAGE, reasons[fact.name]))
        elif making.is_left(fact, assignment):
            left = replace(assignment, taken=BASE_NUMBER, why="every coefficient is 0 here")
            problems.catch(lambda one=fact, said=left: steps.append(making.take(one, said)))
        else:
            groups.setdefault(assignment.key, []).append(fact)
    for group in groups.values():
        assignment = assignments[group[0].name]
        method, people = method_of(assignment), making.people_of(assignment)
        units, others = method.units([_seen_by(fact, people) for fact in group])
        steps += [making.step(unit, assignments[unit.names[0]], method) for unit in units]
        by_name = {fact.name: fact for fact in group}
        steps += [making.untreated(by_name[name], assignments[name], AVERAGE, why) for name, why in others.items()]
    first = {name: number for number, name in enumerate(names)}
    return sorted(steps, key=lambda one: min(first[name] for name in one.unit.names))


def _seen_by(fact: Facts, people: Sequence[int]) -> Facts:
    """What is known of a tensor, of those who take part."""

    def some(values: tuple) -> tuple:
        return tuple(values[number] for number in people) if len(values) > len(people) else values

    return replace(
        fact, grams=some(fact.grams), counts=some(fact.counts), fishers=some(fact.fishers), outputs=some(fact.outputs)
    )


class _Making:
    """Steps from units.

    Args:
        recipe, rows, inputs: see :func:`make_steps`.
    """

    def __init__(self, recipe: Recipe, rows: Mapping[str, RowMap], inputs: Inputs) -> None:
        self._recipe, self._rows, self._inputs = recipe, rows, inputs
        self._tensors = inputs.reference.checkpoint.tensors

    def people_of(self, assignment: Assignment) -> Sequence[int]:
        """Those who take part: with a coefficient of 0 only where each model of a method has a role of its own."""
        if METHODS[assignment.method].needs.models is not None:
            return assignment.participants
        return [number for number in assignment.participants if assignment.coefficients[number]]

    def step(self, unit: Unit, assignment: Assignment, method: Method) -> Step:
        """Of a unit that its method treats."""
        base = self._inputs.base if method.needs.base else None
        return self._step(unit, assignment, method.name, None, base, unit.facts[0].stack)

    def untreated(self, fact: Facts, assignment: Assignment, used: str, reason: str) -> Step:
        """Of a tensor that no method treats."""
        whole = fact if fact.stack is None else replace(fact, shape=self._tensors[fact.name].shape, stack=None)
        if assignment.taken is not None:  # who has it says all
            count = len(self._inputs.parents)
            assignment = replace(assignment, coefficients=(1.0,) * count, participants=tuple(range(count)))
        return self._step(Unit((fact.name,), used, (whole,)), assignment, used, reason, None, None)

    def _step(
        self, unit: Unit, assignment: Assignment, used: str, reason: str | None, base: Parent | None, stack: int | None
    ) -> Step:
        table = None if used == COPY else next((self._rows[name] for name in unit.names if name in self._rows), None)
        base = self._inputs.base if table is not None and table.base else base
        if used == COPY:
            people: Sequence[int] = assignment.participants
        else:
            people = assignment.participants if table is not None else self.people_of(assignment)

        def own(parent: Parent) -> dict[str, Source]:
            found = {name: parent.sources[name] for name in unit.names if name in parent.sources}
            if stack is not None:
                found = {n: _apart(s, stack, len(self._tensors[n].shape), parent) for n, s in found.items()}
            turned = table is not None and table.columns
            return {name: replace(source, transposed=True) for name, source in found.items()} if turned else found

        return Step(
            unit.without_publications(),
            used,
            tuple(own(parent) if number in people else {} for number, parent in enumerate(self._inputs.parents)),
            assignment.coefficients,
            assignment.options if used == assignment.method else {},
            own(base) if base is not None else {},
            reason,
            table,
            stack,
            asked=None if assignment.method == self._recipe.method else assignment.method,
            rule=assignment.why,
            computation=self._recipe.computation,
        )

    def is_left(self, fact: Facts, assignment: Assignment) -> bool:
        """Whether a tensor is the base's, since every coefficient of its task vectors is 0."""
        alone = fact.name not in self._rows and not any(assignment.coefficients)
        return alone and method_of(assignment).needs.base

    def take(self, fact: Facts, assignment: Assignment) -> Step:
        """The step of a tensor that is taken as it is in one model; rows that this one lacks are the others' average.

        Raises:
            RecipeError: that model does not have it.
        """
        number, rule = BASE_NUMBER if assignment.taken is None else assignment.taken, assignment.why
        parents, base = self._inputs.parents, self._inputs.base
        owner = base if number == BASE_NUMBER else parents[number]
        if owner is None or fact.name not in owner.sources:
            what = f"{'the base' if owner is None else owner.title} does not have the tensor {fact.name!r}"
            raise RecipeError(what, where=rule, mend="take it from a model that has it")
        unit = Unit((fact.name,), TAKEN, (replace(fact, shape=self._tensors[fact.name].shape, stack=None),))
        table = self._rows.get(fact.name)
        if table is not None:
            count = len(parents)
            everyone = replace(assignment, coefficients=(1.0,) * count, participants=tuple(range(count)))
            made = self._step(unit, everyone, TAKEN, None, base if table.base else None, None)
            return replace(made, rows=table.preferring(number), asked=None, rule=rule)
        source = {fact.name: owner.sources[fact.name]}
        if (shape := source[fact.name].shape(owner.checkpoint)) != unit.facts[0].shape:
            what = f"{owner.title} has {fact.name!r} as {list(shape)}, not {list(unit.facts[0].shape)}"
            raise RecipeError(what, where=rule, mend="take it from a model in which it has the result's shape")
        return Step(
            unit.without_publications(),
            TAKEN,
            tuple(source if one == number else {} for one in range(len(parents))),
            tuple(float(one == number) for one in range(len(parents))),
            base=source if number == BASE_NUMBER else {},
            rule=rule,
        )


def _apart(source: Source, stack: int, dims: int, parent: Parent) -> Source:
    """A stack whose matrices lie behind each other in the rows of one, as a stack of parts; any other as it is."""
    if dims > 2 or not source.is_whole or (shape := parent.checkpoint.tensors[source.tensor].shape)[0] == stack:
        return source
    height = shape[0] // stack
    parts = (replace(source, rows=(number * height, (number + 1) * height)) for number in range(stack))
    return Source(parts=tuple(parts), stacked=True)


def find_all_layers(inputs: Inputs) -> Mapping[str, Layer]:
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
