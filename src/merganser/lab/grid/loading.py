"""From YAML files to one configuration: ``extends``, merged left to right, ``{templates}`` filled in.

    load_config(["defaults.yaml", "emotion.yaml", "roberta.yaml"], templates={"seed": "1"}, keep=["model0", "model1"])

Mappings are merged key by key, anything else is replaced by the later file's, and so are ``contributors``, which are a
list of models whether they are written as a list or as a mapping. A file may name others in ``extends`` (relative to
itself), which count as standing to its left, and values of templates in ``templates``. A file that is not where its
name says is looked for among the configurations that come with merganser.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import merganser
from merganser.errors import ErrorCollector, RecipeError, UserError, did_you_mean, raise_all
from merganser.lab.grid.config import ExperimentConfig, as_mapping, make_config
from merganser.merging.recipe import read_mapping

_TEMPLATE = re.compile(r"\{(\w+)\}")
MAX_FILES = 100  # that one file extends, those that these extend included
MAX_FILLED = 2**22  # values and characters of a configuration, once its templates are filled in
_INTEGER = re.compile(r"[+-]?\d{1,40}")


def load_config(
    files: Sequence[str | Path],
    *,
    templates: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    replaced: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """Read, merge, fill in and validate.

    Args:
        files: YAML files, merged left to right.
        templates: values of ``{name}``; numeric ones become numbers where they are the whole value.
        keep: the contributors to keep, in this order; empty for all.
        replaced: keys with values that stand instead of the files' own.

    Raises:
        UserError: unreadable files, templates without a value or that no file uses, unknown or malformed keys, a
            filter that matches nothing; each with file and key.
    """
    if not files:
        raise RecipeError("no configuration", where="experiment", mend="give at least one YAML file")
    where = " + ".join(str(file) for file in files)
    values, own = _read_files(files, where)
    values.update(replaced or {})
    given = {**own, **(templates or {})}
    errors = ErrorCollector()
    errors.catch(_check_used, values, given, list(templates or {}), where)
    _check_growth(list(given.values()), given, where)
    closed = {name: _insert(value, given) for name, value in given.items()}  # their values may name others
    _check_growth(values, closed, where)
    filled = errors.catch(fill, values, closed, where)
    errors.raise_all()
    values = dict(filled or {})
    if keep:
        values = filter_models(values, keep, where)
    return make_config(values, where)


def _read_files(files: Sequence[str | Path], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The merged values of files, and the templates that they give values to."""
    values: dict[str, Any] = {}
    for file in files:
        values = merge_values(values, read_values(find_file(file)))
    own = values.pop("templates", None) or {}
    if not isinstance(own, dict) or not all(isinstance(name, str) for name in own):
        what = f"templates: {own!r} is no mapping of names to values"
        raise RecipeError(what, where=where, mend="write each as 'name: value'")
    return values, own


def templates_of(files: Sequence[str | Path]) -> set[str]:
    """The names of all templates that files use, also in values of templates.

    Raises:
        RecipeError: files that cannot be read.
    """
    values, own = _read_files(files, " + ".join(map(str, files)))
    used = _used(values)
    return used | _used([own[name] for name in used if name in own])


def named_folder() -> Path:
    """The folder of the configurations that come with merganser: in the package, or beside it in a checkout."""
    package = Path(merganser.__file__).parent
    installed = package / "configurations"
    return installed if installed.is_dir() else package.parents[1] / "experiments"


def find_file(file: str | Path) -> Path:
    """A file as it is given, or the one of that name (with or without its ending) in :func:`named_folder`."""
    path = Path(file)
    places = [path, *(named_folder() / f"{file}{ending}" for ending in ("", ".yaml"))]
    return next((place for place in places if place.is_file()), path)


def named_configurations() -> dict[str, str]:
    """Name → description of every whole experiment that comes with merganser; "" of parts to be combined."""
    found, folder = {}, named_folder()
    for path in sorted(folder.rglob("*.yaml")):
        inside = path.relative_to(folder)
        whole = inside.parts[0] not in ("datasets", "exps", "models")
        found[inside.with_suffix("").as_posix()] = str(_read(path).get("description", "")) if whole else ""
    return found


def read_values(file: Path, known: dict[str, dict[str, Any] | None] | None = None) -> dict[str, Any]:
    """The mapping of a file, merged over those that it extends.

    Args:
        file: the file.
        known: the mappings of files that were read before, None for those that are being read. Added to, so that a
            file that many others extend is read once.

    Raises:
        RecipeError: unreadable, not YAML, no mapping, or files that extend each other or too many others.
    """
    known = {} if known is None else known
    place = os.path.realpath(file)
    done = known.get(place)
    if done is not None:
        return done
    if place in known:
        raise RecipeError("extends itself", where=file, mend="remove the circle of extends")
    if len(known) >= MAX_FILES:
        raise RecipeError(f"extends more than {MAX_FILES} files", where=file, mend="put some of them together")
    known[place] = None
    values = _read(file)
    parents = values.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise RecipeError(f"extends: {parents!r} names no files", where=file, mend="give a file or a list of files")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge_values(merged, read_values(file.parent / parent, known))
    merged = merge_values(merged, values)
    known[place] = merged
    return merged


def _read(file: Path) -> dict[str, Any]:
    return read_mapping(file, "a configuration", "'suite:' and 'methods:'")


def merge_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``: mappings key by key, anything else replaced, and ``contributors`` as well."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and key != "contributors"
        merged[key] = merge_values(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _insert(text: Any, templates: Mapping[str, Any]) -> Any:
    """A text with the values that there are; what has none stays, for the check of the whole."""
    if not isinstance(text, str):
        return text
    return _TEMPLATE.sub(lambda match: str(templates.get(match[1], match[0])), text)


def _used(values: Any) -> set[str]:
    """The names of all templates in a configuration."""
    if isinstance(values, Mapping):
        return _used(list(values)) | _used(list(values.values()))
    if isinstance(values, list):
        return set().union(*map(_used, values))
    return set(_TEMPLATE.findall(values)) if isinstance(values, str) else set()


def _check_used(values: Mapping[str, Any], given: Mapping[str, Any], asked: Sequence[str], where: str) -> None:
    """Refuse templates of the command line that change nothing."""
    used = _used(values)
    used |= _used([given[name] for name in used if name in given])
    problems = []
    for name in asked:
        if name not in used:
            mend = did_you_mean(name, used) if used else "leave it out: these files have no templates"
            what = f"--templates {name}=… changes nothing: no file has {{{name}}}"
            problems.append(RecipeError(what, where=where, mend=mend))
    raise_all(problems)


def _check_growth(values: Any, templates: Mapping[str, Any], where: str) -> None:
    """Refuse templates that make far more of a configuration than anybody has written.

    Raises:
        RecipeError: filled in, it has more than :data:`MAX_FILLED` values and characters.
    """
    sizes = {name: _size(value, {}) for name, value in templates.items()}
    size = _size(values, sizes)
    if size > MAX_FILLED:
        what = f"filled in, its templates make {size} characters and values of it, {MAX_FILLED} are accepted"
        raise RecipeError(what, where=where, mend="give templates shorter values, or name them less often")


def _size(values: Any, sizes: Mapping[str, int]) -> int:
    """How many characters and values a part of a configuration has, its templates being of these sizes."""
    if isinstance(values, Mapping):
        return _size(list(values), sizes) + _size(list(values.values()), sizes)
    if isinstance(values, list):
        return 1 + sum(_size(value, sizes) for value in values)
    if not isinstance(values, str):
        return 1
    return 1 + len(values) + sum(sizes.get(name, 0) for name in _TEMPLATE.findall(values))


def fill(values: Any, templates: Mapping[str, Any], where: str) -> Any:
    """Fill in ``{name}`` in every text.

    A text that is nothing but one template takes the value itself, a number where it looks like one.

    Raises:
        RecipeError: templates without a value, with their keys; several at once.
    """
    problems: list[UserError] = []

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            above = f"{place}." if place else ""
            return {_insert(key, templates): walk(item, f"{above}{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, f"{place}[{number}]") for number, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        absent = next((name for name in _TEMPLATE.findall(value) if name not in templates), None)
        if absent is not None:
            hint = f" ({did_you_mean(absent, map(str, templates))})" if templates else ""
            what, mend = f"{place}: template {{{absent}}} has no value", f"give --templates {absent}=…{hint}"
            problems.append(RecipeError(what, where=where, mend=mend))
            return value
        whole = _TEMPLATE.fullmatch(value)
        return number_of(templates[whole[1]]) if whole else _insert(value, templates)

    filled = walk(values, "")
    raise_all(problems)
    return filled


def number_of(value: Any) -> Any:
    """Numeric text as a number, anything else as it is; what is no finite number is a text."""
    if not isinstance(value, str):
        return value
    if _INTEGER.fullmatch(value):
        return int(value)
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def filter_models(values: dict[str, Any], keep: Sequence[str], where: str) -> dict[str, Any]:
    """Keep some of the contributors; each remembers its place among all, from which its seed comes.

    Raises:
        RecipeError: a name that is no contributor.
    """
    listed = as_mapping(values.get("contributors"))
    if not isinstance(listed, dict):
        return values
    errors = ErrorCollector()
    for name in keep:
        if name not in listed:
            mend = did_you_mean(name, map(str, listed))
            errors.add(RecipeError(f"--filter-model {name} matches no contributor", where=where, mend=mend))
    errors.raise_all()
    places = {name: place for place, name in enumerate(listed)}
    people = {
        name: {"place": places[name], **args} if isinstance(args := listed[name] or {}, dict) else args
        for name in dict.fromkeys(keep)
    }
    kept = {**values, "contributors": people}
    if isinstance(kept.get("order"), list):
        kept["order"] = [name for name in kept["order"] if name in keep]
    return kept
