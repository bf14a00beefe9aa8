"""Contributors and base models at the door: opened, held against what the ledger is for, refused with a mend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merganser.checkpoints.layers import Layer, describe_layers
from merganser.checkpoints.names import align
from merganser.errors import RecipeError, StatisticsError, UserError, raise_all
from merganser.merging.checks import check_needs, matches
from merganser.merging.ledger.record import RESTORE, Entry, LayerRecord, LedgerError, Part, Record, StatisticsRecord
from merganser.merging.ledger.terms import treatment
from merganser.merging.parents import Parent, open_base, open_parents
from merganser.merging.provenance import located
from merganser.merging.recipe import make_recipe
from merganser.methods import Facts, Method, Unit
from merganser.methods.least_squares import LeastSquares
from merganser.tensors import is_floating

_SEPARATE = "a ledger for models like this one: merganser ledger init … --keep-separate '{}'"


def open_reference(model: str, problems: list[UserError], *, allow_pickle: bool = False) -> Parent | None:
    """A base model, its names its own."""
    recipe = make_recipe({"contributors": [model], "base": model, "allow_pickle": allow_pickle})
    parent = open_base(recipe, [], problems)
    if parent is None:
        return None
    return replace(parent, names={name: name for name in parent.checkpoint.tensors})


def open_same_base(record: Record, folder: Path, base: str | None, *, allow_pickle: bool = False) -> Parent:
    """The base model of a ledger, where it was or where ``base`` says; its weights are hashed.

    Raises:
        UserError: it cannot be had, or is another model.
    """
    problems: list[UserError] = []
    known = record.base
    reference = base or pinned(known.model, known.revision) or located(known.model, folder)
    parent = open_reference(reference, problems, allow_pickle=allow_pickle)
    if parent is None:
        mend = "give the base model's place with --base MODEL"
        raise_all([LedgerError(f"its base model cannot be had: {p.what}", where=p.where, mend=mend) for p in problems])
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
    record: Record, base: Parent, model: str, coefficient: float, statistics: str | None, *, allow_pickle: bool = False
) -> Parent:
    """A contributor whose headers fit the ledger; no tensor is read.

    Raises:
        UserError: everything that does not fit, at once.
    """
    person = {"model": model, "coefficient": coefficient, "statistics": statistics}
    recipe = make_recipe({"contributors": [person], "allow_pickle": allow_pickle}, model)
    problems: list[UserError] = []
    parents = open_parents(recipe, problems)
    raise_all(problems)
    (parent,) = parents
    parent = replace(parent, names=align(base.checkpoint.tensors, parent.checkpoint.tensors))
    method = record.make_method()
    check_needs(method, recipe, [parent], base if method.needs.base else None, problems)
    problems += _tensor_problems(record, base, parent)
    raise_all(problems)
    if record.parts:
        raise_all(_part_problems(record, parent))
    return parent


def check_contents(record: Record, base: Parent, parent: Parent) -> None:
    """Read the contributor's weights for what hashes tell.

    Raises:
        UserError: statistics of other weights, tensors of integers that differ from the base's.
    """
    parent.checkpoint.fetch()
    problems: list[UserError] = []
    if parent.statistics is not None and record.make_method().needs.statistics:
        problems += parent.statistics.check_binding(parent.checkpoint)
    for name, info in base.checkpoint.tensors.items():
        own = parent.names.get(name)
        if own is None or is_floating(info.dtype) or matches(name, record.keep_separate):
            continue
        if parent.checkpoint.sha256(own) != base.checkpoint.sha256(name):
            problems.append(
                LedgerError(
                    f"tensor {own!r} is not floating point and differs from the base's",
                    where=parent.checkpoint.name,
                    mend=_SEPARATE.format(name),
                )
            )
    raise_all(problems)


def entry_of(base: Parent, parent: Parent, method: Method) -> Entry:
    """What the ledger notes of a contributor."""
    statistics = parent.statistics if method.needs.statistics else None
    header = statistics.header if statistics else None
    infos = ((name, info.dtype, parent.info(name)) for name, info in base.checkpoint.tensors.items())
    return Entry(
        name=parent.title,
        model=parent.contributor.model,
        revision=parent.checkpoint.revision,
        manifest_sha256=parent.checkpoint.manifest_sha256(),
        coefficient=parent.contributor.coefficient,
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
    )


def make_parts(record: Record, base: Parent, parent: Parent) -> tuple[Part, ...]:
    """What sums to keep, by the first contributor: every tensor of the ledger in exactly one part.

    Raises:
        RecipeError: the method can treat no tensor.
    """
    method = record.make_method()
    names = [name for name in base.checkpoint.tensors if not matches(name, record.keep_separate)]
    floats = [name for name in names if is_floating(base.checkpoint.tensors[name].dtype)]
    excluded = {name: p for name in floats if (p := matches(name, record.exclude))}
    facts = _facts([name for name in floats if name not in excluded], base, parent, _layers(method, base, parent))
    units, reasons = method.units(facts)
    parts = [_part(unit, method) for unit in units]
    if not parts:
        reason = next(iter(reasons.values()), "every tensor is excluded")
        raise RecipeError(
            f"method {method.name!r} can treat no tensor of this model ({reason})",
            where=parent.checkpoint.name,
            mend="publish the statistics it needs, or make a ledger of --method simple",
        )
    treated = {name for part in parts for name in part.names}
    for name in names:
        if name in treated:
            continue
        shape = base.checkpoint.tensors[name].shape
        if name not in floats:
            part = Part(names=(name,), shapes=(shape,), kind="copy", treatment="copy", reason="not floating point")
        else:
            why = f"excluded by {excluded[name]!r}" if name in excluded else reasons[name]
            part = Part(names=(name,), shapes=(shape,), kind="average", treatment="average", reason=why)
        parts.append(part)
    order = {name: number for number, name in enumerate(names)}
    return tuple(sorted(parts, key=lambda part: min(order[name] for name in part.names)))


def _part(unit: Unit, method: LeastSquares) -> Part:
    layers = tuple(
        LayerRecord(kind=fact.layer.kind, weight=fact.layer.weight, bias=fact.layer.bias)
        for fact in unit.facts
        if fact.layer
    )
    return Part.model_validate(
        {
            "names": unit.names,
            "shapes": tuple(fact.shape for fact in unit.facts),
            "kind": unit.kind,
            "treatment": treatment(method, unit),
            "layers": layers,
        }
    )


def _layers(method: Method, base: Parent, parent: Parent) -> list[Layer]:
    """The layers whose weights the base has, by its names."""
    if method.needs.statistics and parent.statistics is not None:
        ours = {own: name for name, own in parent.names.items()}
        return [
            Layer(layer.module, layer.kind, ours[layer.weight], ours.get(layer.bias or ""), layer.tied)
            for layer in parent.statistics.header.layers
            if layer.weight in ours
        ]
    return describe_layers(base.checkpoint) if method.needs.layers else []


def _facts(names: Sequence[str], base: Parent, parent: Parent, layers: Sequence[Layer]) -> list[Facts]:
    by_weight: dict[str, Layer] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, layer)
    by_bias = {layer.bias: layer for layer in by_weight.values() if layer.bias}
    statistics = parent.statistics
    found = []
    for name in names:
        entry = statistics.layer(parent.names[name]) if statistics else None
        counted = bool(statistics and entry and statistics.has_count(entry.module))
        informed = bool(statistics and statistics.has_fisher(parent.names[name]))
        found.append(
            Facts(
                name,
                base.checkpoint.tensors[name].shape,
                by_weight.get(name),
                by_bias.get(name),
                grams=(entry.input if entry else None,),
                counts=(counted,),
                fishers=(informed,),
                in_base=True,
            )
        )
    return found


def _tensor_problems(record: Record, base: Parent, parent: Parent) -> list[UserError]:
    """Another architecture; tensors that are missing, misshapen, or that the ledger has no place for."""
    where = parent.checkpoint.name
    found: list[UserError] = []
    kind = parent.checkpoint.config.get("model_type")
    if kind != record.base.model_type:
        found.append(
            LedgerError(
                f"another architecture: {kind!r}, the ledger is of {record.base.model_type!r}",
                where=where,
                mend="add fine-tunes of the ledger's base model",
            )
        )
    for name, info in base.checkpoint.tensors.items():
        if matches(name, record.keep_separate):
            continue
        own = parent.info(name)
        if own is None:
            if is_floating(info.dtype):  # buffers are stored by some versions of the library, by others not
                text = f"tensor {name!r} of the base is missing"
                found.append(LedgerError(text, where=where, mend=_SEPARATE.format(name)))
        elif own.shape != info.shape or is_floating(own.dtype) != is_floating(info.dtype):
            text = f"tensor {own.name!r} is {own.dtype} {list(own.shape)}, the base's {info.dtype} {list(info.shape)}"
            found.append(LedgerError(text, where=where, mend=_SEPARATE.format(name)))
    twins = set(parent.names.values())
    for name, info in parent.checkpoint.tensors.items():
        if name not in twins and is_floating(info.dtype) and not matches(name, record.keep_separate):
            text = f"tensor {name!r} is not in the base and would be lost"
            found.append(LedgerError(text, where=where, mend=_SEPARATE.format(name)))
    return found


def _part_problems(record: Record, parent: Parent) -> list[UserError]:
    """What the contributors before published and this one did not."""
    statistics, found = parent.statistics, list[UserError]()
    mend = "collect the statistics as the others did, or make a ledger with --exclude for these tensors"
    for part in record.parts if statistics and record.make_method().needs.statistics else ():
        if part.treatment not in ("gram", "diagonal") or statistics is None:
            continue
        entries = [statistics.layer(parent.names[layer.weight]) for layer in part.layers]
        if part.kind == "fisher":
            lacking = [name for name in part.names if not statistics.has_fisher(parent.names[name])]
        elif part.kind == "token counts":
            pairs = zip(part.layers, entries, strict=True)
            lacking = [layer.weight for layer, e in pairs if e is None or not statistics.has_count(e.module)]
        else:
            pairs = zip(part.layers, entries, strict=True)
            lacking = [layer.weight for layer, e in pairs if e is None or e.input is None or e.kind != layer.kind]
            if not lacking and len({e.input for e in entries if e}) > 1:
                text = f"{', '.join(part.names)} have one input in the ledger, in these statistics several"
                found.append(StatisticsError(text, where=statistics.path, mend=mend))
        for name in lacking:
            text = f"no {part.kind} of {name!r}, which the ledger sums"
            found.append(StatisticsError(text, where=statistics.path, mend=mend))
    return found


def pinned(model: str, revision: str | None) -> str | None:
    """A Hub reference at its commit; None for a folder."""
    return f"{model.rsplit('@', 1)[0]}@{revision}" if revision else None
