"""The plan: what a merge will do, tensor by tensor, as a pure value made from file headers and configurations alone.

It holds no open file, thread, device or memory, prints as JSON, and is all that a worker needs. Every mismatch is found
while it is made, all at once, before the first tensor is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from merganser.checkpoints.sources import Source
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import RecipeError
from merganser.merging.inputs import Inputs, open_inputs, pin
from merganser.merging.matching import RowMap
from merganser.merging.recipe import Recipe
from merganser.merging.vocabulary import VocabularyChange
from merganser.methods import METHODS, Method, Unit
from merganser.tensors import DTYPES

AVERAGE, COPY, KEPT, TAKEN = "average", "copy", "kept separate", "taken"
BUFFER = "a buffer, which nothing trains"  # the reason why a tensor is averaged
HEADS = "heads"


Sources = Mapping[str, Source]


@dataclass(frozen=True)
class AdapterForm:
    """What a LoRA adapter that is written holds of the merge.

    Patterns are of the names of tensors, with ``*`` and ``?``; the first of ``left_out``, ``whole`` and the others that
    has a word on a tensor counts.

    Attributes:
        rank: of the factors, at most; None: the sum of the contributors' ranks, which is exact for methods that add
            changes up, or, with ``energy``, as many as it takes.
        energy: each module has the least rank whose factors keep this share of ‖ΔW‖², in the norm in which they are
            the best; None: all have the same rank.
        embeddings: as factors, whole (in ``modules_to_save``), or left out.
        others: norms, biases and whatever else is no matrix: whole, or left out.
        whole: tensors that are kept whole.
        left_out: tensors that stay as they are in the base.
        only: nothing else is changed; empty: anything may be.
    """

    rank: int | None = None
    energy: float | None = None
    embeddings: Literal["factors", "whole", "left out"] = "factors"
    others: Literal["whole", "left out"] = "whole"
    whole: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Tensors that are merged together.

    Attributes:
        unit: the targets: names in the result, shapes, and the method's word for how.
        method: one of :data:`merganser.methods.METHODS`, or how it is done without: ``average``, ``copy`` for what is
            no floating point, ``kept separate`` for what one contributor keeps to itself, ``taken`` for what is as it
            is in one model.
        sources: for each contributor, where it has each target; empty for one that takes no part.
        coefficients: of each contributor.
        options: of the method, all of them.
        base: where the base model has each target, if the method needs it.
        reason: why it is not the method that was asked for.
        rows: which rows of which contributor answer to which of the result, where they differ.
        stack: how many such units lie behind each other in each target, as experts do, each merged by itself; the unit
            has the shapes of one. None: the unit is the whole.
        asked: the method that a rule asks for; None: the recipe's.
        rule: the rule that gives these tensors something else than the recipe's own method and options.
        computation: the dtype to compute in; None: float32, and float64 where a tensor is stored so.
    """

    unit: Unit
    method: str
    sources: tuple[Sources, ...]
    coefficients: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Sources = field(default_factory=dict)
    reason: str | None = None
    rows: RowMap | None = None
    stack: int | None = None
    asked: str | None = None
    rule: str | None = None
    computation: Literal["F64", "F32"] | None = None

    def height_of(self, name: str) -> int:
        """The rows of a target, of one of the stack."""
        return next((fact.shape[0] if fact.shape else 1) for fact in self.unit.facts if fact.name == name)

    def one_of(self, number: int) -> Step:
        """The step of one of the stack."""
        facts = []
        for fact in self.unit.facts:
            height = fact.shape[0] if fact.shape else 1
            facts.append(replace(fact, rows=range(number * height, (number + 1) * height)))
        unit = replace(self.unit, facts=tuple(facts))
        sources = tuple({name: source.one_of(number) for name, source in own.items()} for own in self.sources)
        base = {name: source.one_of(number) for name, source in self.base.items()}
        return replace(self, unit=unit, sources=sources, base=base, stack=None)

    @cached_property
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
        rule: the rule that gives these tensors something else than the recipe's own method and options.
        tensors, nbytes: how many, and their size.
    """

    method: str
    kind: str
    reason: str | None
    tensors: int
    nbytes: int
    rule: str | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of the linear maps' weights a method reaches: those of layers, heads, experts, routers, convolutions.

    Attributes:
        linear: numbers in all of these weights; embeddings, biases and norms are none.
        reached: how many of them the method that was asked for merges.
        others: how many it does not merge, by reason, the most frequent first.
    """

    linear: int
    reached: int
    others: Mapping[str, int]

    @property
    def share(self) -> float:
        """Reached of all; 1 where there is no linear map."""
        return self.reached / self.linear if self.linear else 1.0

    def __str__(self) -> str:
        why = "; ".join(f"{number / self.linear:.1%} {reason}" for reason, number in [*self.others.items()][:4])
        return f"{self.share:.1%} of the linear weights" + (f" (not: {why})" if why else "")


@dataclass(frozen=True)
class Plan:
    """A merge that can be carried out.

    Attributes:
        recipe: with the method and all of its options spelled out.
        steps: the work, in the order of the reference's files.
        outputs: the tensors of the result, in the order of its files.
        folders: the file of each folder of the result with weights of its own.
        main: the folder of the model's own files; empty for the result's folder itself.
        base: the base model, where method or target need it; it may be that of the contributors' adapters.
        revisions: the commit of each contributor that is on the Hub.
        labels: the labels of the merged head, where they are not the reference's.
        vocabulary_from: the contributor whose tokenizer the result takes; -1: the base.
        vocabulary: what becomes of the contributors' vocabularies, where rows are matched by token.
        chat_template: that is written in place of the tokenizer's.
        own_vocabularies: each contributor keeps an embedding, and so a tokenizer, of its own.
        untied: tensors that the reference ties to another one and the result does not.
        rank: of the LoRA adapter that is written, at most; None: a full checkpoint.
        ranks: of single tensors of it, where they differ from that.
        form: what the adapter holds, where more than the rank was asked for.
        choice: why this method, where the recipe said ``auto``.
        notes: what the user should know.
        bytes_read: size of weights and statistics that are read.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    outputs: tuple[TensorSpec, ...]
    folders: Mapping[str, str] = field(default_factory=dict)
    main: str = ""
    base: str | None = None
    revisions: tuple[str | None, ...] = ()
    labels: tuple[str, ...] | None = None
    vocabulary_from: int = 0
    vocabulary: VocabularyChange | None = None
    chat_template: str | None = None
    own_vocabularies: bool = False
    untied: tuple[str, ...] = ()
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    form: AdapterForm | None = None
    choice: str | None = None
    notes: tuple[str, ...] = ()
    bytes_read: int = 0

    @property
    def method(self) -> Method:
        """The method that was asked for; what it does to each tensor is said by the steps."""
        return METHODS[self.recipe.method]

    @cached_property
    def statistics(self) -> frozenset[str]:
        """The kinds of statistics that the steps' methods read: gram, fisher."""
        methods = (step.treatment for step in self.steps)
        return frozenset(kind for one in methods if one is not None and (kind := one.needs.statistics) is not None)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors of the result by name."""
        return {spec.name: spec for spec in self.outputs}

    @property
    def bytes_written(self) -> int:
        """Size of the result's weights; of an adapter, the most that they can take."""
        return sum(spec.nbytes if self.rank is None else self._factors_bytes(spec) for spec in self.outputs)

    def _factors_bytes(self, spec: TensorSpec) -> int:
        """What a tensor can take in an adapter, as factors or whole."""
        size = 4 if self.recipe.dtype is None else DTYPES[self.recipe.dtype].itemsize
        rank, whole = self.ranks.get(spec.name, self.rank or 0), prod(spec.shape) * size
        return min(whole, sum(spec.shape) * rank * size) if len(spec.shape) == 2 else whole

    @cached_property
    def coverage(self) -> Coverage:
        """How much of the linear maps' weights the method that was asked for reaches."""
        linear = reached = 0
        others: Counter[str] = Counter()
        for step in self.steps:
            for fact in step.unit.facts:
                if fact.layer is None or fact.layer.kind == "embedding":
                    continue
                count = prod(fact.shape) * (step.stack or 1)
                linear += count
                if step.method in (step.asked or self.recipe.method, TAKEN):
                    reached += count
                else:
                    others[step.reason or step.method] += count
        return Coverage(linear, reached, dict(others.most_common()))

    @property
    def treatments(self) -> list[Treatment]:
        """What is treated how, and why."""
        groups: dict[tuple[str, str, str | None, str | None], list[TensorSpec]] = {}
        for step in self.steps:
            reason = "as the recipe says" if step.method == KEPT else step.reason
            found = groups.setdefault((step.method, step.unit.kind, reason, step.rule), [])
            found += [self.specs[name] for name in step.unit.names]
        return [
            Treatment(method, kind, reason, len(found), sum(spec.nbytes for spec in found), rule)
            for (method, kind, reason, rule), found in groups.items()
        ]

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors each method treats."""
        counts: Counter[str] = Counter()
        for part in self.treatments:
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
        paths = [PurePosixPath(path) for path in (plan.main, *plan.folders, *plan.folders.values())]
        inside = not any(path.is_absolute() or ".." in path.parts for path in paths)
        kept = {str(PurePosixPath(step.unit.names[0]).parent) for step in plan.steps if step.method == KEPT}
        whole = all(len(step.sources) == len(step.coefficients) == people for step in plan.steps)
        if not (inside and kept <= set(plan.folders) and set(names) <= set(plan.specs) and whole):
            raise RecipeError("no plan: steps, contributors and files do not agree", where=where, mend="merge again")
        if plan.vocabulary_from not in range(0 if plan.base is None else -1, people):
            raise RecipeError("no plan: there is no such contributor", where=where, mend="merge again")
        return plan


_PLAN = TypeAdapter(Plan)


def inputs_of(plan: Plan, *, allow_pickle: bool = False) -> Inputs:
    """Open the files that a plan names, at their commits.

    Args:
        plan: of the merge.
        allow_pickle: see :func:`~merganser.merging.inputs.open_inputs`.

    Raises:
        UserError: what cannot be opened, or files without what the plan reads.
    """
    people = plan.recipe.contributors
    revisions = plan.revisions or (None,) * len(people)
    pinned = [
        one if revision is None or "+" in revision else one.model_copy(update={"model": pin(one.model, revision)})
        for one, revision in zip(people, revisions, strict=True)
    ]
    inputs = open_inputs(plan.recipe.model_copy(update={"contributors": tuple(pinned)}), allow_pickle=allow_pickle)
    for step in plan.steps:
        shapes = {fact.name: fact.shape for fact in step.unit.facts}
        height = () if step.stack is None else (step.stack,)
        for parent, sources in zip(inputs.parents, step.sources, strict=True):
            for target, source in sources.items():
                known = all(stored in parent.checkpoint.tensors for stored in source.tensors())
                wanted = (*height, *shapes[target])
                if not known or (step.rows is None and source.shape(parent.checkpoint) != wanted):
                    where, mend = parent.checkpoint.name, "give the very files that the plan was made from"
                    raise RecipeError(f"does not have {target!r} as the plan reads it", where=where, mend=mend)
    return inputs if plan.base else replace(inputs, base=None)
