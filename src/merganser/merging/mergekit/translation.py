"""From a configuration of mergekit to a recipe of ours that computes the same, with everything spelled out.

The translation is pure: it opens no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.errors import did_you_mean
from merganser.merging.mergekit.parameters import (
    Decided,
    check_parameters,
    decide,
    fixed_options,
    settle_method,
    within,
)
from merganser.merging.mergekit.parts import MODULES, Part, Work, check_inputs, find_parts
from merganser.merging.mergekit.schema import Configuration
from merganser.merging.mergekit.tokens import tokenizer_keys

#: What our recipes call a dtype; mergekit also knows int64, which no weight of a model has.
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BASE = "base"
_RESERVED = frozenset({_BASE, "mean", "auto"})  # names that a recipe's keys have for something else


@dataclass(frozen=True)
class Translation:
    """What a configuration of mergekit is here.

    Attributes:
        recipe: the values of our recipe.
        notes: where the same name means something else here, and what will differ.
    """

    recipe: dict[str, Any]
    notes: tuple[str, ...] = ()


def translate(configuration: Configuration, where: str) -> Translation:
    """Our recipe for a configuration of mergekit.

    Args:
        configuration: what was read.
        where: it stands, for errors.

    Raises:
        RecipeError: what cannot be honoured, by its name and with a mend; several as ``Problems``.
    """
    work = Work(configuration, where)
    parts = find_parts(work)
    work.raise_all()
    for part in parts:
        check_inputs(work, part)
    check_parameters(work, parts)
    settle_method(work, parts)
    work.raise_all()
    names = _named(dict.fromkeys(source.model for part in parts for source in work.contributors(part)))
    decided = [decide(work, part, names) for part in parts]
    work.raise_all()
    recipe: dict[str, Any] = {"contributors": [], "method": work.method.ours}
    base = configuration.base_model
    if base is not None and work.method.base.startswith("origin"):
        recipe["base"] = base
    recipe |= _placed(work, parts, decided, names)
    recipe |= _dtypes(work)
    known = dict(names) if base is None else {base: _BASE, **names}
    recipe |= work.problems.catch(tokenizer_keys, configuration, known, where) or {}
    if (template := configuration.chat_template) is not None:
        recipe["chat_template"] = known.get(template, template)
        if template not in {"auto", *known, *known.values()} and "{" not in template:
            mend = f"give the template itself, auto, or whose it is: one of {', '.join(dict.fromkeys(known.values()))}"
            work.refuse(f"chat_template {template!r}: merganser has no templates of its own", mend)
    work.raise_all()
    return Translation(_without_empty(recipe), tuple(work.notes))


def _placed(work: Work, parts: Sequence[Part], decided: Sequence[Decided], names: Mapping[str, str]) -> dict[str, Any]:
    """Contributors, options, rules and layers."""
    people: list[dict[str, Any]] = [{"model": model, "name": name} for model, name in names.items()]
    if work.by_module:
        return {"contributors": people, "options": fixed_options(work), "rules": _module_rules(work, parts, decided)}
    if len(parts) > 1:
        layers = [_entry(work, part, found, names) for part, found in zip(parts, decided, strict=True)]
        return {"contributors": people, "options": fixed_options(work), "layers": layers}
    (part,), (found,) = parts, decided
    keys = {
        "contributors": [{**one, **found.people[one["name"]]} for one in people],
        "options": found.options,
        "rules": found.rules,
    }
    return keys if part.sources[0].range is None else {**keys, "layers": [{"sources": _ranges(part, names, {})}]}


def _entry(work: Work, part: Part, found: Decided, names: Mapping[str, str]) -> dict[str, Any]:
    """A slice as an entry of ``layers``; one source without any values is taken as it is.

    What lies before the layers is the first slice's, and what lies behind them the last one's, as for mergekit.
    """
    entry: dict[str, Any] = {"sources": _ranges(part, names, found.people)}
    if len(part.sources) > 1 or found:
        entry |= {"method": work.method.ours, "options": found.options, "rules": found.rules}
    return _without_empty(entry)


def _ranges(part: Part, names: Mapping[str, str], people: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sources of a slice as an entry of ``layers`` has them; a base that is no contributor is ``base``."""
    found = []
    for source in part.sources:
        name = names.get(source.model, _BASE)
        found.append({"contributor": name, "range": list(source.range or ()), **people.get(name, {})})
    return found


def _module_rules(work: Work, parts: Sequence[Part], decided: Sequence[Decided]) -> list[dict[str, Any]]:
    """Modules of whole models: every one is rules for the names of its tensors."""
    rules: list[dict[str, Any]] = []
    everyone = {name for found in decided for name in found.people}
    given = dict(zip(work.configuration.modules, zip(parts, decided, strict=True), strict=True))
    if "text_decoder" in given and not {"vision_tower", "vision_model"} & given.keys():
        work.note("modules that are not named are merged as text_decoder is; mergekit leaves them out of its result")
    elif {"encoder", "decoder"} & given.keys() and "shared" not in given:
        work.note("modules that are not named are merged, with equal weights; mergekit leaves them out of its result")
    for name, (part, found) in sorted(given.items(), key=lambda one: [*MODULES].index(one[0])):
        patterns = MODULES[name]
        if len(part.sources) == 1 and not found:
            rules.append({"tensors": list(patterns), "optional": True, "take": next(iter(found.people))})
            continue
        if everyone - set(found.people):
            what = f"{part.where}: every module has to be merged from the same models"
            work.refuse(what, "add the missing models with weight 0, or merge in stages")
        whole = _without_empty({"options": found.options, "contributors": _without_empty(found.people)})
        rules += [within(rule, patterns) for rule in [*found.rules, *([{"optional": True, **whole}] if whole else [])]]
    return rules


def _dtypes(work: Work) -> dict[str, Any]:
    """Storage and computation dtype; mergekit also rounds the inputs to ``dtype`` and computes in it."""
    found: dict[str, Any] = {}
    for key in ("dtype", "out_dtype"):
        given = getattr(work.configuration, key)
        if given is None:
            continue
        name = given.removeprefix("torch.")
        if name not in _DTYPES:
            work.refuse(f"{key}: {given!r} is no dtype of weights", did_you_mean(name, _DTYPES))
            continue
        found["dtype"] = _DTYPES[name]
        if key == "dtype" and name == "float64":
            found["computation"] = "F64"
        elif key == "dtype" and name != "float32":
            work.note(
                f"dtype {name}: mergekit rounds the inputs to it, and most of its methods compute in it; "
                "here the sums are float32 and the result alone is rounded"
            )
    return found


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in ({}, [])}


def _named(models: Iterable[str]) -> dict[str, str]:
    """A name for each model: the last part of its path or repository, with a number where it would come twice."""
    names: dict[str, str] = {}
    for model in models:
        adapter = model.rsplit("+", 1)[-1]
        stem = Path(adapter.rsplit("@", 1)[0]).name or "model"
        name, again = stem, 2
        while name in names.values() or name in _RESERVED:
            name, again = f"{stem}-{again}", again + 1
        names[model] = name
    return names
