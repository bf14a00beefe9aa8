"""A method in words: what it needs, what may be set, and how much memory it asks for, as values for people and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merganser.methods.auto import AUTO
from merganser.methods.base import Method, Options

_STATISTICS = {
    "gram": "statistics (Gram matrices)",
    "fisher": "statistics collected with --fisher",
    "kfac": "statistics collected with --kfac",
}
_NAMES = {
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "string": "text",
    "object": "mapping",
    "null": "none",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class OptionDescription:
    """An option of a method.

    Attributes:
        name: its key in recipes.
        kind: what values it takes, with their bounds.
        default: its value where nothing is said.
        meaning: what it does.
    """

    name: str
    kind: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class MethodDescription:
    """What there is to know of a method before one chooses it.

    Attributes:
        name, title, summary, formula, reference: see :class:`~merganser.methods.base.Method`.
        needs: what it asks for, in words; empty where any models do.
        streaming: how much of a model lies in memory while it is merged.
        signed: whether negative coefficients have a meaning.
        options: what may be set.
    """

    name: str
    title: str
    summary: str
    formula: str
    reference: str
    needs: tuple[str, ...]
    streaming: str
    signed: bool
    options: tuple[OptionDescription, ...]


def describe(method: Method) -> MethodDescription:
    """A method in words."""
    needs, found = method.needs, list[str]()
    if needs.models is not None:
        found.append("one model" if needs.models == 1 else f"exactly {needs.models} models")
    elif needs.at_least > 1:
        found.append(f"at least {needs.at_least} models")
    if needs.base:
        found.append("the base model")
    if needs.statistics is not None:
        found.append(_STATISTICS[needs.statistics])
    if needs.data:
        found.append("texts at hand (--data)")
    if not needs.weighted:
        found.append("equal coefficients")
    if needs.package is not None:
        found.append(f"the package {needs.package[1]}")
    return MethodDescription(
        name=method.name,
        title=method.title,
        summary=method.summary,
        formula=method.formula,
        reference=method.reference,
        needs=tuple(found),
        streaming=method.streaming,
        signed=needs.signed,
        options=_options(method.options),
    )


def describe_auto() -> MethodDescription:
    """``auto`` in words, which is no method but chooses one."""
    return MethodDescription(
        name=AUTO,
        title="Auto",
        summary="what was measured to be best with what is at hand: statistics, the base model, adapters, or nothing",
        formula="that of the method it chooses; merganser methods auto has the table",
        reference="docs/choosing.md",
        needs=(),
        streaming="as the method it chooses",
        signed=False,
        options=(),
    )


def _options(options: Options) -> tuple[OptionDescription, ...]:
    properties = type(options).model_json_schema()["properties"] if type(options).model_fields else {}
    return tuple(
        OptionDescription(name, _kind(properties[name]), getattr(options, name), field.description or "")
        for name, field in type(options).model_fields.items()
    )


def _kind(schema: dict[str, Any]) -> str:
    """What values a JSON schema allows, in words; a tuple beside single values is one for each contributor."""
    if "anyOf" in schema:
        kinds = [_kind(one) for one in schema["anyOf"] if one.get("type") != "array"]
        each = any(one.get("type") == "array" for one in schema["anyOf"])
        return " or ".join(dict.fromkeys(kinds)) + (", or one for each model" if each else "")
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    limits = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_NAMES.get(schema.get("type", ""), schema.get("type", "any")), " and ".join(limits)]).strip()
