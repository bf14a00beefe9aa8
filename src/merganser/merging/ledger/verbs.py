"""The verbs: init, add, remove, combine (``merganser ledger sum``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints.places import places_read
from merganser.errors import ErrorCollector, RecipeError
from merganser.merging.configuration import check_opens
from merganser.merging.inputs import Parent, pin
from merganser.merging.judging import REFUSED
from merganser.merging.ledger.compensated import accumulate
from merganser.merging.ledger.contributors import (
    check_contents,
    entry_of,
    open_contributor,
    open_reference,
    open_same_base,
    parts_of,
    share_of,
)
from merganser.merging.ledger.record import (
    FILE_NAME,
    BaseRecord,
    LedgerError,
    LedgerMember,
    LedgerPart,
    LedgerRecord,
    dump,
    load,
)
from merganser.merging.ledger.store import (
    Pair,
    Sums,
    check_disk,
    commit,
    file_name,
    locked,
    new_ledger,
    specs,
    write_sums,
    zeros_like,
)
from merganser.merging.ledger.terms import contribution, shapes
from merganser.merging.matching import matches
from merganser.merging.memory import RunSettings
from merganser.merging.provenance import located
from merganser.merging.recipe import make_recipe, method_options
from merganser.methods import SUMMED
from merganser.methods.base import input_width
from merganser.methods.names import suggest_method
from merganser.methods.regression.regmean import REGMEAN
from merganser.paths import expanded, real
from merganser.tensors import packed_width

_FEWEST = 4  # digits of a hash that are taken for one


def init(
    folder: str | Path,
    base: str | Path,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    keep_separate: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Path:
    """Start a ledger, for fine-tunes of one base model and one method.

    Args:
        folder: to make; may be there if it is empty.
        base: the model that all contributors started from: the reference of all sums.
        method: one of :data:`merganser.methods.SUMMED`; by default the one of Gram matrices.
        options: of the method; what goes into the sums is settled here.
        exclude: name patterns of tensors that are averaged instead.
        keep_separate: name patterns of tensors that are no part of the ledger, such as heads.
        allow_pickle: accept ``pytorch_model.bin``.

    Raises:
        UserError: anything the user can mend; several at once as ``Problems``.
    """
    target, problems, method = expanded(folder), ErrorCollector(), method or REGMEAN.name
    problems.add(*new_ledger(target, ()).problems())
    if method not in SUMMED:
        mend = suggest_method(method, SUMMED)
        problems.add(RecipeError(f"there are no ledgers of method {method!r}", where="--method", mend=mend))
    problems.raise_all()
    recipe = make_recipe({"contributors": [str(base)], "method": method, "options": dict(options or {})})
    if gradients := [name for name, value in recipe.options.items() if isinstance(value, list)]:
        what = f"the sums of a ledger are of one {gradients[0]} for all layers"
        raise RecipeError(what, where="options", mend="give one value, or merge with merganser merge")
    settled = method_options(recipe, method, "ledger").model_dump(mode="json")
    parent = open_reference(str(base), problems, allow_pickle=allow_pickle)
    problems.raise_all()
    if parent is None:
        raise RuntimeError("a model that cannot be opened has a problem")
    problems.catch(check_opens, parent.checkpoint.config, parent.checkpoint.model_path, len(parent.checkpoint.tensors))
    for pattern in exclude:
        if not any(matches(name, [pattern]) for name in parent.checkpoint.tensors):
            mend = f"use a name or a pattern with *, such as {next(iter(parent.checkpoint.tensors))!r}"
            problems.add(RecipeError(f"no tensor of the base is called {pattern!r}", where="exclude", mend=mend))
    problems.raise_all()
    parent.checkpoint.fetch()
    record = LedgerRecord(
        base=BaseRecord(
            model=str(base),
            revision=parent.checkpoint.revision,
            manifest_sha256=parent.checkpoint.manifest_sha256(),
            model_type=parent.checkpoint.config.get("model_type"),
        ),
        method=method,
        options=settled,
        exclude=tuple(exclude),
        keep_separate=tuple(keep_separate),
    )
    output = new_ledger(target, places_read(parent.checkpoint))
    output.raise_problem()
    with output.new() as place:
        (place / FILE_NAME).write_bytes(dump(record))
    return target


def add(
    folder: str | Path,
    model: str | Path,
    *,
    coefficient: float = 1.0,
    statistics: str | Path | None = None,
    base: str | Path | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    allow_pickle: bool = False,
    accept_scales: bool = False,
) -> LedgerMember:
    """Add a contributor's share to the sums: whole or not at all, whatever happens meanwhile.

    Args:
        folder: the ledger.
        model: a model folder, or ``org/name@revision``.
        coefficient: its weight in the merge.
        statistics: by default the file in its folder.
        base: where the base model is, if not where it was.
        threads: how many parts are worked on at once; the bytes do not depend on it.
        max_memory: what the process may take, in bytes or as ``"2GB"``; nor on this.
        allow_pickle: accept ``pytorch_model.bin``.
        accept_scales: add statistics of which the contributor's or the others' would decide alone.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    place, settings = expanded(folder), RunSettings.make(threads, max_memory)
    with locked(place) as record:
        reference = open_same_base(record, place, _text(base), allow_pickle=allow_pickle)
        parent, plan = open_contributor(
            record, reference, str(model), coefficient, _text(statistics), allow_pickle=allow_pickle
        )
        check_contents(record, reference, parent)
        entry = entry_of(reference, parent, plan)
        for other in record.contributors:
            if other.manifest_sha256 == entry.manifest_sha256:
                raise LedgerError(
                    f"{entry.name} is a contributor already (as {other.name}, coefficient {other.coefficient:g})",
                    where=place,
                    mend="for another coefficient, remove it first",
                )
        parts = record.parts or parts_of(plan)
        if problem := check_disk(place, specs(record, parts)):
            raise problem
        if parent.statistics is not None and entry.statistics is not None:
            # Of a Gram matrix that is none, nobody could say later whose it was.
            parent.statistics.validate(settings.threads)
        people = (*record.contributors, entry)
        change = record.model_copy(update={"contributors": people, "parts": parts})
        _change(place, record, change, reference, parent, 1.0, settings, accept_scales=accept_scales)
    return entry


def remove(
    folder: str | Path,
    model: str | Path,
    *,
    statistics: str | Path | None = None,
    base: str | Path | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    allow_pickle: bool = False,
) -> LedgerMember:
    """Take a contributor's share out of the sums again; its weights and statistics must be at hand.

    Args:
        folder: the ledger.
        model: the contributor's folder or Hub name, or the first digits of its hash if it is where it was.
        statistics, base, threads, max_memory, allow_pickle: as for :func:`add`.

    Raises:
        UserError: it is not in the ledger, or weights or statistics are not those that were added.
    """
    place, settings = expanded(folder), RunSettings.make(threads, max_memory)
    with locked(place) as record:
        reference = open_same_base(record, place, _text(base), allow_pickle=allow_pickle)
        listed = _by_digits(record, str(model))
        if listed is not None:
            model = pin(listed.model, listed.revision) if listed.revision else located(listed.model, place)
            if statistics is None and listed.statistics is not None and listed.statistics.file is not None:
                statistics = located(listed.statistics.file, place)
        parent, _ = open_contributor(record, reference, str(model), 1.0, _text(statistics), allow_pickle=allow_pickle)
        entry = _find(record, parent, place)
        if listed is not None and listed != entry:
            raise LedgerError(
                f"these are no longer the weights of {listed.name}, but those of {entry.name}",
                where=model,
                mend="give the folder that has the weights",
            )
        check_contents(record, reference, parent)
        _check_statistics(entry, parent)
        contributor = parent.contributor.model_copy(update={"coefficient": entry.coefficient})
        parent = replace(parent, contributor=contributor)
        people = tuple(other for other in record.contributors if other != entry)
        if not people:
            empty: dict[str, Any] = {"contributors": (), "parts": (), "file": None, "sums": {}}
            commit(place, record.model_copy(update={**empty, "generation": record.generation + 1}))
            return entry
        if problem := check_disk(place, specs(record, record.parts)):
            raise problem
        change = record.model_copy(update={"contributors": people})
        _change(place, record, change, reference, parent, -1.0, settings)
    return entry


def combine(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    threads: int | None = None,
    max_memory: str | int | None = None,
) -> Path:
    """Add up ledgers of several sites into a new one, as if all had added to it.

    Args:
        folders: at least two ledgers of one base, method and options, without common contributors.
        output: the ledger to make.
        threads, max_memory: as for :func:`add`.

    Raises:
        UserError: they do not fit together; several mistakes at once as ``Problems``.
    """
    places, target = [expanded(folder) for folder in folders], expanded(output)
    problems = ErrorCollector()
    if len({real(place) for place in places}) < len(places):
        problems.add(LedgerError("a ledger is named twice", mend="name each ledger once"))
    elif len(places) < 2:
        problems.add(LedgerError("there is nothing to add up", mend="name at least two ledgers"))
    made = new_ledger(target, places)
    problems.add(*made.problems())
    problems.raise_all()
    with ExitStack() as stack:
        # In one order everywhere, so that two sums never wait for each other.
        in_order = sorted(places, key=lambda place: str(real(place)))
        held = {place: stack.enter_context(locked(place, write=False)) for place in in_order}
        records = [held[place] for place in places]
        _check_alike(places, records)
        filled = [(p, r) for p, r in zip(places, records, strict=True) if r.file is not None]
        merged = records[0].model_copy(
            update={
                "contributors": tuple(entry for record in records for entry in record.contributors),
                "parts": filled[0][1].parts if filled else (),
                "generation": 1,
            }
        )
        if problem := check_disk(target, specs(merged, merged.parts)):
            raise problem
        opened = [Sums.open(place, record) for place, record in filled]

        def compute(number: int, part: LedgerPart) -> dict[str, Pair]:
            terms = list(shapes(merged.make_method(), part))
            sums = opened[0].pairs(number, terms)
            for other in opened[1:]:
                for term, (high, low) in other.pairs(number, terms).items():
                    accumulate(*sums[term], high, low)
            return sums

        with made.new() as folder:
            if filled:
                file = file_name(1)
                hashes = write_sums(folder, file, merged, compute, RunSettings.make(threads, max_memory))
                merged = merged.model_copy(update={"file": file, "sums": hashes})
            (folder / FILE_NAME).write_bytes(dump(merged))
    return target


def _change(
    place: Path,
    before: LedgerRecord,
    after: LedgerRecord,
    base: Parent,
    parent: Parent,
    sign: float,
    settings: RunSettings,
    *,
    accept_scales: bool = True,
) -> None:
    """Add (sign 1) or subtract (-1) a contributor's terms, part by part, and switch to the new sums."""
    method, old = after.make_method(), Sums.open(place, before)

    def compute(number: int, part: LedgerPart) -> dict[str, Pair]:
        terms = contribution(method, part, part.unit(), share_of(part, base, parent))
        sums = zeros_like(terms) if old.checkpoint is None else old.pairs(number, list(terms))
        if old.checkpoint is not None and not accept_scales:
            _check_scales(part, terms, sums, parent, before.total)
        for name, term in terms.items():
            if not bool(torch.isfinite(term).all()):
                raise LedgerError(
                    f"the sums of {', '.join(part.names)} overflow",
                    where=parent.checkpoint.name,
                    mend="use a smaller coefficient",
                )
            accumulate(*sums[name], term if sign > 0 else term.neg())
        return sums

    generation = before.generation + 1
    file = file_name(generation)
    hashes = write_sums(place, file, after, compute, settings)
    commit(place, after.model_copy(update={"generation": generation, "file": file, "sums": hashes}))


def _check_scales(
    part: LedgerPart, terms: Mapping[str, torch.Tensor], sums: Mapping[str, Pair], parent: Parent, total: float
) -> None:
    """Refuse statistics beside which the others' count for nothing, or the other way round, as a merge does.

    Args:
        part: of the ledger.
        terms: what the contributor adds.
        sums: of those that are in.
        parent: the contributor.
        total: the sum of the others' coefficients.

    Raises:
        LedgerError: says how they compare.
    """
    name, kind = ("system", "gram") if "system" in terms else ("metric", "fisher")
    coefficient = parent.contributor.single_coefficient
    if name not in terms or not coefficient or not total:
        return
    inputs = input_width(part.unit().facts[0])
    own, theirs = _size(terms[name], inputs, kind) / coefficient, _size(sums[name][0], inputs, kind) / total
    if own <= theirs * REFUSED[kind] and theirs <= own * REFUSED[kind]:
        return
    compared = f"{own / theirs:.1e} times those in the ledger" if theirs else "all that there is: the ledger's are zero"
    what = f"the statistics of {', '.join(part.names[:3])} are {compared}, so that one of both decides alone"
    where = parent.statistics.path if parent.statistics else parent.checkpoint.name
    mend = "collect the statistics again; or if you know why they differ so, --accept-scales"
    raise LedgerError(what, where=where, mend=mend)


def _size(sums: torch.Tensor, inputs: int, kind: str) -> float:
    """The mean of a metric; of a packed system, of its diagonal, without the input that is always 1."""
    if kind == "fisher":
        return float(sums.mean())
    width, rows = packed_width(sums.numel()), torch.arange(inputs)
    return float(sums[rows * width - rows * (rows - 1) // 2].mean())


def _find(record: LedgerRecord, parent: Parent, place: Path) -> LedgerMember:
    found = parent.checkpoint.manifest_sha256()
    for entry in record.contributors:
        if entry.manifest_sha256 == found:
            return entry
    listing = ", ".join(f"{entry.name} ({entry.manifest_sha256[:12]})" for entry in record.contributors)
    raise LedgerError(
        f"{parent.title} with sha256 {found[:12]}… is no contributor of this ledger",
        where=place,
        mend=f"contributors: {listing}" if listing else "it has no contributors",
    )


def _by_digits(record: LedgerRecord, text: str) -> LedgerMember | None:
    """The contributor whose hash begins so; None where the text is a model's folder or name."""
    if Path(text).exists() or len(text) < _FEWEST or set(text) - set("0123456789abcdef"):
        return None
    found = [entry for entry in record.contributors if entry.manifest_sha256.startswith(text)]
    if len(found) != 1:
        raise LedgerError(
            f"{'no contributor has a' if not found else 'several contributors have a'} hash that begins {text!r}",
            mend="merganser ledger show lists the hashes; or give the model's folder",
        )
    return found[0]


def _check_statistics(entry: LedgerMember, parent: Parent) -> None:
    if entry.statistics is None or parent.statistics is None:
        return
    if (found := parent.statistics.sha256()) != entry.statistics.sha256:
        raise LedgerError(
            f"other statistics than were added: sha256 {found[:16]}…, the ledger says {entry.statistics.sha256[:16]}…",
            where=parent.statistics.path,
            mend="give the file that was added, with --statistics",
        )


def _check_alike(places: Sequence[Path], records: Sequence[LedgerRecord]) -> None:
    problems = ErrorCollector()
    seen: dict[str, Path] = {}
    first, filled = records[0], [(p, r) for p, r in zip(places, records, strict=True) if r.parts]
    for place, record in zip(places, records, strict=True):
        mine, theirs = record.purpose(), first.purpose()
        for key in [key for key in mine if mine[key] != theirs[key]]:
            text = f"another {key.replace('_', ' ')}: {mine[key]}, that of {places[0]} is {theirs[key]}"
            problems.add(LedgerError(text, where=place, mend="add up ledgers that were made alike"))
        for entry in record.contributors:
            if (twin := seen.setdefault(entry.manifest_sha256, place)) != place:
                text = f"{entry.name} ({entry.manifest_sha256[:12]}) is a contributor of {twin} too"
                problems.add(LedgerError(text, where=place, mend="remove it from one of them"))
    heads = {member.labels for record in records for member in record.contributors if member.labels}
    if len(heads) > 1:
        text = f"labels of heads differ, or their order: {'; '.join(', '.join(one) for one in sorted(heads))}"
        problems.add(LedgerError(text, mend="add up ledgers without heads (--keep-separate)"))
    if not problems.found:
        for place, record in filled[1:]:
            other = filled[0][1]
            differing = [part for part in record.parts if part not in other.parts]
            if differing or len(record.parts) != len(other.parts):
                names = ", ".join(name for part in differing[:3] for name in part.names)
                text = f"keeps other sums than {filled[0][0]} ({names}): their statistics cover different layers"
                mend = "collect statistics alike, or make both ledgers with --exclude for these tensors"
                problems.add(LedgerError(text, where=place, mend=mend))
    problems.raise_all()


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


def show(folder: str | Path) -> LedgerRecord:
    """What a ledger says of itself.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    return load(expanded(folder))
