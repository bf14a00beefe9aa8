"""How the contributors' tensors fit together: what must hold before a merge, and who votes on which row of a tensor.

Every violation is added to one list, with its mend. A contributor votes only on the output rows that it has trained
(heads whose label spaces differ, vocabularies of different length): the result's rows are listed once, and for each
contributor the row of its own tensor that answers to each, or -1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np

from merganser.errors import CheckpointError, ErrorCollector, RecipeError, StatisticsError
from merganser.merging.inputs import Parent
from merganser.merging.recipe import Recipe, listed_coefficients
from merganser.methods import METHODS, Method
from merganser.methods.base import sums_to_zero
from merganser.tensors import is_floating
from merganser.text import listed

BASE_NUMBER = -1  # the base, among the numbers of models
_FEW = 4  # modules that contributors may have to themselves, such as a head of two layers and a pooler


@dataclass(frozen=True)
class Fill:
    """Rows of the result that some models have from others, so that they vote on them.

    Attributes:
        takers: the models that have them so: contributors by their numbers, -1 for the base.
        runs: (first row of the result, how many follow it, the first row of each giver's own tensor).
        givers: the models whose mean it is; none: zeros.
        own_mean: instead, the mean of all rows that the taker has otherwise.
    """

    takers: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]
    givers: tuple[int, ...] = ()
    own_mean: bool = False

    @cached_property
    def rows(self) -> np.ndarray:
        """(1 + givers, n): the rows of the result in ascending order, and those of each giver's tensor."""
        parts = [np.array([first, *own])[:, None] + np.arange(length) for first, length, *own in self.runs]
        return np.concatenate(parts, axis=1)

    @classmethod
    def of(cls, takers: Sequence[int], rows: np.ndarray, givers: Sequence[int] = (), *, own_mean: bool = False) -> Fill:
        """From (1 + givers, n) rows, see :attr:`rows`."""
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(rows, axis=1) != 1).any(0)]))
        lengths = np.diff(starts, append=rows.shape[1])
        runs = ((int(rows[0, at]), int(n), *rows[1:, at].tolist()) for at, n in zip(starts, lengths, strict=True))
        return cls(tuple(takers), tuple(runs), tuple(givers), own_mean)


@dataclass(frozen=True)
class RowMap:
    """The rows of one merged tensor.

    Attributes:
        size: how many rows the result has.
        runs: for each contributor, in the order of the result's rows, (first row of its own tensor, how many follow
            each other from there), and -1 for rows that it does not have.
        base: the same of the base model; empty where its rows are not matched.
        columns: the rows stand in the tensors' last dimension, so that they are read transposed.
        fills: rows that models have from others, where their own are -1.
    """

    size: int
    runs: tuple[tuple[tuple[int, int], ...], ...]
    base: tuple[tuple[int, int], ...] = ()
    columns: bool = False
    fills: tuple[Fill, ...] = ()

    @classmethod
    def of(cls, own: Iterable[Sequence[int]], base: Sequence[int] | None = None, fills: Sequence[Fill] = ()) -> RowMap:
        """From the row of each contributor's own tensor that answers to each row of the result, or -1."""
        listed = list(own)
        runs = tuple(map(_runs, listed))
        return cls(len(listed[0]), runs, () if base is None else _runs(base), fills=tuple(fills))

    @cached_property
    def own(self) -> tuple[tuple[int, ...], ...]:
        """For each contributor, for each row of the result, the row of its own tensor, or -1."""
        return tuple(map(_unrolled, self.runs))

    @cached_property
    def own_base(self) -> tuple[int, ...]:
        """For each row of the result, the row of the base's tensor, or -1."""
        return _unrolled(self.base) if self.base else (-1,) * self.size

    def preferring(self, number: int) -> RowMap:
        """The same with each row of one model's alone, where it has it, if only from others; of the base with -1."""
        has = np.array(self.own[number] if number >= 0 else self.own_base) >= 0
        for fill in self.fills:
            if number in fill.takers:
                has[fill.rows[0]] = True

        def left(rows: Sequence[int], one: int) -> list[int]:
            return np.where(has & (one != number), -1, rows).tolist()

        fills = []
        for fill in self.fills:
            others, rows = [one for one in fill.takers if one != number], fill.rows[:, ~has[fill.rows[0]]]
            fills += [replace(fill, takers=(number,))] if number in fill.takers else []
            if others and rows.size:
                fills.append(Fill.of(others, rows, fill.givers, own_mean=fill.own_mean))
        own = [left(rows, one) for one, rows in enumerate(self.own)]
        base = left(self.own_base, BASE_NUMBER) if self.base else None
        return replace(RowMap.of(own, base, fills), columns=self.columns)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the result, where a tensor on disk has the shape ``stored``."""
        return (*stored[:-1], self.size) if self.columns else (self.size, *stored[1:])

    def groups(self) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
        """(rows of the result, contributors that vote on them, whether the base has them), each row once.

        Rows without a contributor are the base's.

        Raises:
            ValueError: a row that exists in no model.
        """
        by_owners: dict[tuple[bool, ...], list[int]] = {}
        owned = np.array([*self.own, self.own_base]) >= 0
        for fill in self.fills:
            owned[np.array(fill.takers)[:, None], fill.rows[0]] = True
        for row, has in enumerate(zip(*owned.tolist(), strict=True)):
            by_owners.setdefault(has, []).append(row)
        found = []
        for (*voting, based), rows in by_owners.items():
            owners = tuple(number for number, votes in enumerate(voting) if votes)
            if not owners and not based:
                raise ValueError(f"row {rows[0]} exists in no contributor")
            found.append((tuple(rows), owners, based))
        return found


def _runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(first, length) of rows that follow each other, or that are all -1."""
    numbers = np.asarray(rows, dtype=np.int64)
    if not numbers.size:
        return ()
    shifts = np.where(numbers >= 0, numbers - np.arange(numbers.size), -numbers.size - 1)
    starts = np.flatnonzero(np.diff(shifts, prepend=shifts[0] - 1))
    lengths = np.diff(starts, append=numbers.size)
    return tuple(zip(numbers[starts].tolist(), lengths.tolist(), strict=True))


def _unrolled(runs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(first + shift if first >= 0 else -1 for first, length in runs for shift in range(length))


def matches(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern (``*`` and ``?``) that a name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_architectures(parents: Sequence[Parent], base: Parent | None, problems: ErrorCollector) -> None:
    """Every contributor and the base are of one model type."""
    expected = parents[0].checkpoint.config.get("model_type")
    for parent in [*parents[1:], *([base] if base else [])]:
        found = parent.checkpoint.config.get("model_type")
        if found != expected:
            problems.add(
                CheckpointError(
                    f"another architecture: {found!r}, while {parents[0].title} is {expected!r}",
                    where=parent.checkpoint.name,
                    mend="merge models of one architecture that started from one pre-trained model",
                )
            )


def names_to_merge(
    recipe: Recipe, people: Sequence[Parent], reference: Parent, *, plain: bool = False
) -> tuple[list[str], tuple[str, ...], list[str]]:
    """The tensors of the result, by the reference's names, those that it ties no more, and notes on what is left out.

    Left out are second copies of tied tensors, which open from the first, and buffers that the model does not read
    any more and some contributor does not store. Copies that differ in some contributor are tensors of their own. With
    ``plain`` nothing is left out.
    """
    names = [name for name in reference.checkpoint.tensors if not matches(name, recipe.keep_separate)]
    if plain:
        return names, (), []
    view, notes = reference.view, list[str]()
    differing = {name: [p.title for p in people if _differs(p, name)] for name in names if name in view.duplicates}
    copies = [name for name, titles in differing.items() if not titles]
    untied = tuple(name for name, titles in differing.items() if titles and name in reference.copies)
    if copies:
        notes.append(f"stored once, since the model ties them: {listed(copies, 3)} (as {view.duplicates[copies[0]]})")
    notes += [
        f"{name} is tied to {view.duplicates[name]} no more: they differ in {', '.join(differing[name])}"
        for name in untied
    ]
    old = [name for name in names if name in view.ignored and any(name not in p.sources for p in people)]
    if old:
        notes.append(f"left out, since the model does not read them: {listed(old, 3)}")
    left_out = {*copies, *old}
    return [name for name in names if name not in left_out], untied, notes


def _differs(parent: Parent, name: str) -> bool:
    """Whether a contributor's copy of a tied tensor is another one than the first."""
    source = parent.sources.get(name)
    return source is not None and source.tensor in parent.view.duplicates and source.tensor not in parent.copies


def check_fitting(people: Sequence[Parent], base: Parent | None, problems: ErrorCollector) -> list[str]:
    """Every configuration describes the tensors beside it: what does not fit would open with random numbers.

    What the first one's files lack the result lacks, too: a note says so.
    """
    for parent in (*people, *([base] if base else [])):
        if wrong := parent.view.mismatched:
            name, (has, wanted) = next(iter(wrong.items()))
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            text = f"its configuration does not fit its tensors: {name} is {list(has)}, not {list(wanted)}{more}"
            problems.add(CheckpointError(text, where=parent.checkpoint.name, mend="restore its config.json"))
    absent = people[0].view.missing
    text = f"not in the files of {people[0].title}, so that it opens with random numbers there and here"
    return [f"{listed(absent, 3)}: {text}"] if absent else []


def find_separate(recipe: Recipe, parents: Sequence[Parent], problems: ErrorCollector) -> tuple[tuple[str, ...], ...]:
    """Each contributor's own tensors that the recipe keeps separate; patterns that match nothing are mistakes."""
    everything = [
        tuple(name for name in parent.checkpoint.tensors if matches(name, recipe.keep_separate)) for parent in parents
    ]
    available = sorted({name for parent in parents for name in parent.checkpoint.tensors})
    for option, patterns in (("keep_separate", recipe.keep_separate), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in available):
                problems.add(
                    RecipeError(
                        f"no tensor is called {pattern!r}",
                        where=option,
                        mend=f"use a name or a pattern with *, such as {available[-1]!r}",
                    )
                )
    return tuple(everything)


def match_shapes(
    parents: Sequence[Parent], names: Sequence[str], rows: Mapping[str, RowMap], problems: ErrorCollector
) -> None:
    """Check presence, dtype kind and shape of every tensor whose rows are not matched."""
    first, lacking, differing = parents[0], dict[int, list[str]](), dict[str, str]()
    for name in names:
        infos = [parent.info(name) for parent in parents]
        if None in infos:
            if is_floating(first.checkpoint.tensors[name].dtype):  # else a buffer that some versions do not store
                for number, info in enumerate(infos):
                    lacking.setdefault(number, []).extend([name] if info is None else [])
            continue
        shapes = [info.shape for info in infos if info is not None]
        if name not in rows and any(shape != shapes[0] for shape in shapes):
            differing[name] = ", ".join(f"{p.title} {list(s)}" for p, s in zip(parents, shapes, strict=True))
    for number, absent in lacking.items():
        if absent:
            text = f"{_tensors(absent)} missing (in {first.title} there)"
            mend = _separate(absent, f"so that only those who have it keep it; the result opens with {first.title}'s")
            problems.add(CheckpointError(text, where=parents[number].checkpoint.name, mend=mend))
    if differing:
        name, listing = next(iter(differing.items()))
        more = f", and {len(differing) - 1} more do" if len(differing) > 1 else ""
        mend = _separate([*differing], "so that each contributor keeps its own")
        if all(info.shape[:1] == (p.checkpoint.config.get("vocab_size"),) for p in parents if (info := p.info(name))):
            mend = "--vocabulary largest if the longer ones only appended tokens to the shorter"
        problems.add(CheckpointError(f"tensor {name!r} differs in shape: {listing}{more}", mend=mend))


def check_unmatched(parents: Sequence[Parent], separate: Sequence[Sequence[str]], problems: ErrorCollector) -> None:
    """Tensors that another contributor has and the first lacks would be lost: say so."""
    first = parents[0]
    for parent, kept in zip(parents, separate, strict=True):
        used = {stored for source in parent.sources.values() for stored in source.tensors()}
        used |= set(kept)
        lost = [name for name, i in parent.checkpoint.tensors.items() if name not in used and is_floating(i.dtype)]
        lost = [name for name in lost if name not in parent.copies and name not in parent.view.ignored]
        if lost:
            text = f"{_tensors(lost)} not in {first.title} and would be lost"
            mend = f"name {parent.title} first"
            if not any(first.view.place_of(name) for stored in lost for name in parent.view.uses.get(stored, ())):
                mend = _separate(lost, "so that it is kept", mend)
            problems.add(CheckpointError(text, where=parent.checkpoint.name, mend=mend))


def _tensors(names: Sequence[str]) -> str:
    """Some tensors, for the beginning of a sentence, with the verb."""
    few = listed([repr(name) for name in names], 3)
    return f"tensors {few} are" if len(names) > 1 else f"tensor {few} is"


def _separate(names: Sequence[str], why: str, before: str = "") -> str:
    """The mend for a few modules that contributors do not share; of many there is another cause."""
    stems = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    if len(stems) > _FEW:
        return "give models of one architecture and size: these differ in more than their heads"
    patterns = " ".join(f"--keep-separate '{stem}*'" for stem in stems)
    return f"{before}{', and ' if before else ''}{patterns} {why}"


def check_needs(
    method: Method,
    recipe: Recipe,
    parents: Sequence[Parent],
    base: Parent | None,
    problems: ErrorCollector,
    coefficients: Sequence[float],
    place: str | None = None,
    *,
    partly: bool = False,
) -> None:
    """The method has what it needs: a package, base model, statistics of these tensors, coefficients with a meaning.

    Args:
        method: with its options.
        recipe: for the base that it names.
        parents: those who have a say where this method is used.
        base: the base model, where there is one.
        problems: receives what is missing.
        coefficients: of these parents, as they are for some tensors.
        place: of the recipe that asks for this method; None: the recipe's own.
        partly: other tensors have coefficients that are not all 0. Those where all are 0 are the base's.
    """
    if method.needs.package and importlib.util.find_spec(method.needs.package[0]) is None:
        problems.add(
            RecipeError(
                f"method {method.name!r} needs {method.needs.package[1]}, which is not installed",
                where=place or "method",
                mend=f"pip install {method.needs.package[1]}",
            )
        )
    exactly, least = method.needs.models, method.needs.at_least
    if (exactly is not None and len(parents) != exactly) or len(parents) < least:
        wanted = f"{least} models or more" if least > 1 else "1 model or more"
        wanted = wanted if exactly is None else f"exactly {exactly} model{'s' if exactly > 1 else ''}"
        are = "is" if len(parents) == 1 else "are"
        problems.add(
            RecipeError(
                f"method {method.name!r} merges {wanted}, {len(parents)} {are} given",
                where=place or "contributors",
                mend=f"give {wanted.removeprefix('exactly ')}, or choose another method",
            )
        )
    if method.needs.base and recipe.base is None and base is None:
        problems.add(
            RecipeError(
                f"method {method.name!r} needs the pre-trained model that the contributors started from",
                where=place,
                mend="add --base MODEL",
            )
        )
    if method.needs.base and base is not None and not base.sources:
        problems.add(
            CheckpointError(
                "holds none of the contributors' tensors", where=base.checkpoint.name, mend="give the right base model"
            )
        )
    _check_signs(method, [parent.title for parent in parents], coefficients, problems, place, partly=partly)
    for parent in parents if method.needs.statistics else ():
        option = {"fisher": " --fisher", "kfac": " --kfac"}.get(method.needs.statistics or "", "")
        mend = f"merganser collect {parent.contributor.model} --data …{option}"
        if parent.statistics is None:
            what = f"{parent.title} has no statistics, and method {method.name!r} needs them"
            problems.add(StatisticsError(what, where=parent.checkpoint.name, mend=mend))
        elif method.needs.statistics == "kfac" and parent.statistics.header.kfac is None:
            what = f"{parent.title} publishes no gradients of outputs, and method {method.name!r} needs them"
            problems.add(StatisticsError(what, where=parent.statistics.path, mend=f"{mend} --overwrite"))
        else:
            problems.add(*parent.statistics.check_names(parent.checkpoint))


def _check_signs(
    method: Method,
    titles: Sequence[str],
    coefficients: Sequence[float],
    problems: ErrorCollector,
    place: str | None,
    *,
    partly: bool,
) -> None:
    """Negative coefficients, and those that sum to zero, are for methods in which they have a meaning."""
    for title, coefficient in zip(titles, coefficients, strict=True):
        if coefficient < 0 and not method.needs.signed:
            what = f"{title}: the coefficient {coefficient:g} is negative, which has no meaning for method "
            what += f"{method.name!r}"
            able = ", ".join(name for name, one in METHODS.items() if one.needs.signed)
            mend = f"use a coefficient of at least 0, or a method that takes negative ones: {able}"
            problems.add(RecipeError(what, where=place, mend=mend))
    if not coefficients or (not any(coefficients) and partly and method.needs.base):
        return  # where nobody has a say, that is the mistake
    if not method.needs.weighted and len({one for one in coefficients if one}) > 1:
        what = f"method {method.name!r} does not weigh models, so that coefficients {listed_coefficients(coefficients)}"
        mend = "give every model the same coefficient, or leave them out"
        problems.add(RecipeError(f"{what} have no meaning", where=place or "coefficients", mend=mend))
    if not any(coefficients):
        what = "every coefficient is zero"
        problems.add(RecipeError(what, where=place or "coefficients", mend="give one that is not"))
    elif method.needs.normalised and sums_to_zero(coefficients):
        able = ", ".join(name for name, one in METHODS.items() if one.needs.signed and not one.needs.normalised)
        few = listed_coefficients(coefficients)
        what = f"coefficients {few} sum to zero, and method {method.name!r} divides by their sum"
        mend = f"give coefficients with another sum, or a method that adds task vectors: {able}"
        problems.add(RecipeError(what, where="coefficients", mend=mend))
