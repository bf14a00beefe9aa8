"""Contributors and base models at the door: opened, held against what the ledger is for, refused with a mend."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from merganser.checkpoints.model_view import aligned
from merganser.errors import ErrorCollector, Problems, StatisticsError, UserError, raise_all
from merganser.merging.inputs import Inputs, Parent, open_base, open_parents, pin
from merganser.merging.labels import head_labels
from merganser.merging.ledger.record import (
    RESTORE,
    LedgerError,
    LedgerMember,
    LedgerPart,
    LedgerRecord,
    StatisticsRecord,
)
from merganser.merging.ledger.terms import treatment
from merganser.merging.matching import matches
from merganser.merging.plan import Plan, Step
from merganser.merging.planning import plan_of
from merganser.merging.provenance import located
from merganser.merging.recipe import make_recipe
from merganser.merging.shares import ParentShare
from merganser.methods.least_squares import LeastSquares
from merganser.tensors import is_floating

_SEPARATE = "a ledger for models like this one: merganser ledger init … --keep-separate '{}'"


def open_reference(model: str, problems: ErrorCollector, *, allow_pickle: bool = False) -> Parent | None:
    """A base model, its names its own."""
    recipe = make_recipe({"contributors": [model], "base": model})
    return open_base(recipe, None, problems, allow_pickle=allow_pickle)


def open_same_base(record: LedgerRecord, folder: Path, base: str | None, *, allow_pickle: bool = False) -> Parent:
    """The base model of a ledger, where it was or where ``base`` says; its weights are hashed.

    Raises:
        UserError: it cannot be had, or is another model.
    """
    problems = ErrorCollector()
    known = record.base
    found = pin(known.model, known.revision) if known.revision else located(known.model, folder)
    reference = base or found
    parent = open_reference(reference, problems, allow_pickle=allow_pickle)
    if parent is None:
        mend = "give the base model's place with --base MODEL"
        raise_all(
            [LedgerError(f"its base model cannot be had: {p.what}", where=p.where, mend=mend) for p in problems.found]
        )
        raise RuntimeError("a model that cannot be opened has a problem")
    parent.checkpoint.fetch()
    if (found := parent.checkpoint.manifest_sha256()) != known.manifest_sha256:
        raise LedgerError(
            f"the ledger is of another base: {known.model} with sha256 {known.manifest_sha256[:16]}…, "
            f"this model has {found[:16]}…",
            where=reference,
            mend="give the very model that the ledger was made for with --base, or make a ledger for this one",
        )
    infos = parent.checkpoint.tensors
    for part in record.parts:
        if any(name not in infos or infos[name].shape != shape for name, shape in part.tensors()):
            raise LedgerError(
                "the ledger keeps sums of tensors that its base does not have", where=folder, mend=RESTORE
            )
    return parent


def open_contributor(
    record: LedgerRecord,
    base: Parent,
    model: str,
    coefficient: float,
    statistics: str | None,
    *,
    allow_pickle: bool = False,
) -> tuple[Parent, Plan]:
    """A contributor whose headers fit the ledger, and the plan of what it adds; no tensor is read.

    Raises:
        UserError: everything that does not fit, at once.
    """
    problems = ErrorCollector()
    person = {"model": model, "coefficient": coefficient, "statistics": statistics}
    everything = list(base.checkpoint.tensors)
    recipe = make_recipe({"contributors": [person]}, model)
    parents = open_parents(recipe, problems, allow_pickle=allow_pickle)
    problems.raise_all()
    (parent,) = parents
    everything += parent.checkpoint.tensors
    parent = replace(parent, sources=aligned(base.view, parent.view))
    asked = recipe.model_copy(
        update={
            "base": record.base.model,
            "method": record.method,
            "options": dict(record.options),
            "exclude": record.exclude,
            "keep_separate": tuple(p for p in record.keep_separate if any(matches(name, [p]) for name in everything)),
        }
    )
    try:
        plan = plan_of(asked, Inputs((parent,), base, base))
    except UserError as error:
        raise_all([_of_a_ledger(one) for one in (error.problems if isinstance(error, Problems) else [error])])
        raise  # not reached: there is at least one problem
    if any(step.rows for step in plan.steps):
        moved = next(name for step in plan.steps if step.rows for name in step.unit.names)
        text = f"the rows of {moved!r} (labels or tokens) stand in another order than the base's"
        mend = "save it with the base's order, or make a ledger without this tensor (--keep-separate)"
        raise LedgerError(text, where=parent.checkpoint.name, mend=mend)
    ours = head_labels(parent, plan.specs)
    theirs = next((member.labels for member in record.contributors if member.labels), ours)
    if ours and ours != theirs:
        text = f"the labels of its head are {', '.join(ours)}, those in the ledger {', '.join(theirs)}, in this order"
        mend = "save it with the ledger's order of labels, or make a ledger without the head (--keep-separate)"
        raise LedgerError(text, where=parent.checkpoint.name, mend=mend)
    if record.parts:
        raise_all(_part_problems(record, parent, plan))
    return parent, plan


def _of_a_ledger(problem: UserError) -> UserError:
    """A problem of a merge with a mend that a ledger has, where it offered what only a merge can do."""
    found = re.search(r"--keep-separate '([^']+)'", problem.mend or "")
    mend = problem.mend if found is None else _SEPARATE.format(found[1])
    if re.search(r"--(config-from|vocabulary)", mend or ""):
        mend = "a ledger adds up models of one configuration and vocabulary; merge this one with merganser merge"
    return type(problem)(problem.what, where=problem.where, mend=mend)


def check_contents(record: LedgerRecord, base: Parent, parent: Parent) -> None:
    """Read the contributor's weights for what hashes tell.

    Raises:
        UserError: statistics of other weights, tensors of integers that differ from the base's.
    """
    parent.checkpoint.fetch()
    problems = ErrorCollector()
    if parent.statistics is not None and record.make_method().needs.statistics:
        problems.add(*parent.statistics.check_binding(parent.checkpoint))
    for name, info in base.checkpoint.tensors.items():
        own = parent.sources[name].tensor if name in parent.sources else None
        if own is None or is_floating(info.dtype) or matches(name, record.keep_separate):
            continue
        if parent.checkpoint.sha256(own) != base.checkpoint.sha256(name):
            problems.add(
                LedgerError(
                    f"tensor {own!r} is not floating point and differs from the base's",
                    where=parent.checkpoint.name,
                    mend=_SEPARATE.format(name),
                )
            )
    problems.raise_all()


def entry_of(base: Parent, parent: Parent, plan: Plan) -> LedgerMember:
    """What the ledger notes of a contributor."""
    statistics = parent.statistics if plan.statistics else None
    header = statistics.header if statistics else None
    infos = ((name, info.dtype, parent.info(name)) for name, info in base.checkpoint.tensors.items())
    return LedgerMember(
        name=parent.title,
        model=parent.contributor.model,
        revision=parent.checkpoint.revision,
        manifest_sha256=parent.checkpoint.manifest_sha256(),
        coefficient=parent.contributor.single_coefficient,
        statistics=StatisticsRecord(
            file=parent.contributor.statistics,
            sha256=statistics.sha256(),
            examples=header.examples,
            tokens=header.tokens,
            label=header.label,
        )
        if statistics and header
        else None,
        dtypes={name: own.dtype for name, dtype, own in infos if own is not None and own.dtype != dtype},
        labels=head_labels(parent, plan.specs),
    )


def parts_of(plan: Plan) -> tuple[LedgerPart, ...]:
    """What sums to keep, by the first contributor's plan: every tensor of the ledger in exactly one part."""
    return tuple(_part(step) for step in plan.steps)


def _part(step: Step) -> LedgerPart:
    method, layers = step.treatment, [fact.layer for fact in step.unit.facts if fact.layer]
    known = [{"kind": layer.kind, "weight": layer.weight, "bias": layer.bias} for layer in layers]
    values = {
        "names": step.unit.names,
        "shapes": tuple(fact.shape for fact in step.unit.facts),
        "kind": step.unit.kind,
        "treatment": treatment(method, step.unit) if isinstance(method, LeastSquares) else step.method,
        "reason": step.reason,
        "layers": known if method else (),
    }
    return LedgerPart.model_validate(values)


def share_of(part: LedgerPart, base: Parent, parent: Parent) -> ParentShare:
    """What a contributor brings to a part, beside the base model."""
    sources = {name: parent.sources[name] for name in part.names if name in parent.sources}
    theirs = {name: base.sources[name] for name in part.names}
    step = Step(part.unit(), part.kind, (sources,), (parent.contributor.single_coefficient,), base=theirs)
    return ParentShare(Inputs((parent,), base, base), step, 0)


def _part_problems(record: LedgerRecord, parent: Parent, plan: Plan) -> list[UserError]:
    """What the contributors before published and this one did not."""
    steps = {name: step for step in plan.steps for name in step.unit.names}
    mend = "collect the statistics as the others did, or make a ledger with --exclude for these tensors"
    texts = []
    for part in record.parts:
        lacking = [name for name in part.names if steps[name].unit.kind != part.kind]
        if lacking and part.treatment in ("gram", "diagonal"):
            texts.append(f"no {part.kind} of {', '.join(map(repr, lacking))}, which the ledger sums")
        elif not lacking and len({steps[name].unit.names for name in part.names}) > 1:
            texts.append(f"{', '.join(part.names)} have one input in the ledger, in these statistics several")
    where = parent.statistics.path if parent.statistics else parent.checkpoint.name
    return [StatisticsError(text, where=where, mend=mend) for text in texts]
