"""What must hold before a merge starts; every violation is added to one list, with its mend."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fnmatch import fnmatchcase

from merganser.errors import CheckpointError, RecipeError, StatisticsError, UserError
from merganser.merging.parents import Parent
from merganser.merging.recipe import Recipe
from merganser.merging.rows import Rows, match_vocabulary
from merganser.methods import Method
from merganser.tensors import is_floating


def matches(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern (``*`` and ``?``) that a name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_architectures(parents: Sequence[Parent], base: Parent | None, problems: list[UserError]) -> None:
    """Every contributor and the base are of one model type."""
    expected = parents[0].checkpoint.config.get("model_type")
    for parent in [*parents[1:], *([base] if base else [])]:
        found = parent.checkpoint.config.get("model_type")
        if found != expected:
            problems.append(
                CheckpointError(
                    f"another architecture: {found!r}, while {parents[0].title} is {expected!r}",
                    where=parent.checkpoint.name,
                    mend="merge models of one architecture that started from one pre-trained model",
                )
            )


def find_separate(recipe: Recipe, parents: Sequence[Parent], problems: list[UserError]) -> tuple[tuple[str, ...], ...]:
    """Each contributor's own tensors that the recipe keeps separate; patterns that match nothing are mistakes."""
    everything = [
        tuple(name for name in parent.checkpoint.tensors if matches(name, recipe.keep_separate)) for parent in parents
    ]
    available = sorted({name for parent in parents for name in parent.checkpoint.tensors})
    for option, patterns in (("keep_separate", recipe.keep_separate), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in available):
                problems.append(
                    RecipeError(
                        f"no tensor is called {pattern!r}",
                        where=option,
                        mend=f"use a name or a pattern with *, such as {available[-1]!r}",
                    )
                )
    return tuple(everything)


def match_shapes(
    recipe: Recipe, parents: Sequence[Parent], names: Sequence[str], rows: dict[str, Rows], problems: list[UserError]
) -> None:
    """Check presence, dtype kind and shape of every tensor; add the rows of vocabularies of different length."""
    for name in names:
        infos = [parent.info(name) for parent in parents]
        absent = [p for p, info in zip(parents, infos, strict=True) if info is None]
        if absent:
            if not is_floating(parents[0].checkpoint.tensors[name].dtype):
                continue  # a buffer that some versions of the library store and some do not
            for parent in absent:
                problems.append(
                    CheckpointError(
                        f"tensor {name!r} is missing (it is in {parents[0].title})",
                        where=parent.checkpoint.name,
                        mend=f"--keep-separate '{name}' if only some contributors have it",
                    )
                )
            continue
        shapes = [info.shape for info in infos if info is not None]
        if all(shape == shapes[0] for shape in shapes) or name in rows:
            continue
        listing = ", ".join(f"{p.title} {list(s)}" for p, s in zip(parents, shapes, strict=True))
        grows = all(len(s) == len(shapes[0]) and s[1:] == shapes[0][1:] for s in shapes)
        if grows and recipe.vocabulary == "largest":
            rows[name] = match_vocabulary(parents, name)
            continue
        vocabulary = [p.checkpoint.config.get("vocab_size") for p in parents]
        if grows and [s[0] for s in shapes] == vocabulary:
            mend = "--vocabulary largest if the longer ones only appended tokens to the shorter"
        else:
            mend = f"--keep-separate '{name}' so that each contributor keeps its own"
        problems.append(CheckpointError(f"tensor {name!r} differs in shape: {listing}", mend=mend))


def check_unmatched(parents: Sequence[Parent], separate: Sequence[Sequence[str]], problems: list[UserError]) -> None:
    """A tensor that another contributor has and the first lacks would be lost: say so."""
    for parent, kept in zip(parents, separate, strict=True):
        twins = set(parent.names.values())
        for name, info in parent.checkpoint.tensors.items():
            if name not in twins and name not in kept and is_floating(info.dtype):
                problems.append(
                    CheckpointError(
                        f"tensor {name!r} is not in {parents[0].title} and would be lost",
                        where=parent.checkpoint.name,
                        mend=f"--keep-separate '{name}' so that it is kept",
                    )
                )


def check_needs(
    method: Method, recipe: Recipe, parents: Sequence[Parent], base: Parent | None, problems: list[UserError]
) -> None:
    """The method has what it needs: a package, base model, statistics of these tensors, coefficients with a meaning."""
    if method.needs.package and importlib.util.find_spec(method.needs.package[0]) is None:
        problems.append(
            RecipeError(
                f"method {method.name!r} needs {method.needs.package[1]}, which is not installed",
                where="method",
                mend=f"pip install {method.needs.package[1]}",
            )
        )
    if method.needs.models is not None and len(parents) != method.needs.models:
        problems.append(
            RecipeError(
                f"method {method.name!r} merges exactly {method.needs.models} models, {len(parents)} are given",
                where="contributors",
                mend=f"give {method.needs.models} models, or choose another method",
            )
        )
    if method.needs.base and recipe.base is None and base is None:
        problems.append(
            RecipeError(
                f"method {method.name!r} needs the pre-trained model that the contributors started from",
                mend="add --base MODEL",
            )
        )
    if method.needs.base and base is not None and not base.names:
        problems.append(
            CheckpointError(
                "holds none of the contributors' tensors", where=base.checkpoint.name, mend="give the right base model"
            )
        )
    for parent in parents:
        if parent.contributor.coefficient < 0 and not method.needs.signed:
            problems.append(
                RecipeError(
                    f"{parent.title}: the coefficient {parent.contributor.coefficient} is negative, "
                    f"which has no meaning for method {method.name!r}",
                    mend="use a coefficient of at least 0",
                )
            )
        if not method.needs.statistics:
            continue
        if parent.statistics is None:
            problems.append(
                StatisticsError(
                    f"{parent.title} has no statistics, and method {method.name!r} needs them",
                    where=parent.checkpoint.name,
                    mend=f"merganser collect {parent.contributor.model} --data …"
                    + (" --fisher" if method.needs.statistics == "fisher" else ""),
                )
            )
        else:
            problems += parent.statistics.check_names(parent.checkpoint)
