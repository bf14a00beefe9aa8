"""Parameters of mergekit as keys of a recipe.

A parameter may be set at four places, of which the innermost counts: at a slice's source or a model, at the slice, at
the module, and for the whole merge. At each place it may have several values, for the tensors whose names contain a
text, and a list of numbers is a gradient over the layers. All values of one parameter are therefore one list of
decisions, of which the first that holds for a tensor counts: the last of them becomes the recipe's own key, those
before it become rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from merganser.errors import did_you_mean
from merganser.merging.mergekit.methods import COEFFICIENT, KNOWN_PARAMETERS, REQUIRED, Parameter
from merganser.merging.mergekit.parts import Part, Source, Work
from merganser.merging.mergekit.schema import Parameters

#: (text in a tensor's name, value), the first that holds counts; the last one always holds (None).
Decisions: TypeAlias = Sequence[tuple[str | None, Any]]

_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "off", "0", "0.0"), False),
}
_LAYER = re.compile(r"(?:^|(?<!experts)\.)(\d+)(?=\.|$)")  # the first number in a name that can be a layer's
_KINDS = {bool: "true or false", float: "a number", int: "a whole number"}
_MASKS = (
    "other numbers are dropped than by mergekit, and as many: its masks come from one generator, one after the other; "
    "ours come from a seed, a tensor's name and the place in it"
)
_NEGATIVE = (
    "a negative weight: mergekit divides by the sum of the weights that agree with their signs, and here it is that of "
    "their magnitudes"
)
_RESCALED = (
    "rescale: what is kept is scaled up to the sum of magnitudes before, as mergekit does; left to itself, merganser "
    "divides by the density"
)
_KEPT = "density is 1 where nothing is said, so that nothing is dropped; left to itself, merganser drops some"
#: Of (parameter, our method), or of a parameter of any method: what its name means here.
_SAID = {
    ("lambda", ""): "lambda is called scale here",
    ("scale", "passthrough"): "scale multiplies the tensors; other methods' option scale multiplies task vectors here",
    ("int8_mask", ""): "int8_mask is skipped: it saves memory that no mask takes here, and changes no result",
    ("eps", "multislerp"): "eps is skipped: lengths that are zero are treated as such",
    ("gamma", ""): "density is kept after the gamma largest numbers of a whole tensor are dropped, as by mergekit "
    "0.1.5; older versions kept nothing of tensors with less than 1/gamma numbers",
}


@dataclass
class Decided:
    """Keys of a recipe, or of an entry of its layers: what holds for every tensor, and the rules before it.

    Attributes:
        options: of the method.
        people: of each contributor, its coefficient and options.
        rules: for some of the tensors.
    """

    options: dict[str, Any] = field(default_factory=dict)
    people: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.options or self.rules or any(self.people.values()))


def check_parameters(work: Work, parts: Sequence[Part]) -> None:
    """Names that no method knows are errors; those of other methods, or at a base that has none, are told of."""
    base, skipped = work.configuration.base_model, set[str]()
    places: list[tuple[Parameters, str | None]] = [(place, None) for part in parts for place in part.places]
    places += [(source.parameters, source.model) for part in parts for source in part.sources]
    for place, model in places:
        for name in place:
            known = work.method.parameters.get(name)
            if known is None and name not in KNOWN_PARAMETERS:
                work.refuse(f"unknown parameter {name!r}", did_you_mean(name, work.method.parameters))
            elif known is None:
                skipped.add(name)
            elif model is not None and known.scope == "method":
                what = f"parameters.{name} of {model} is skipped: it is one for the whole method"
                work.note(f"{what}, and mergekit does not read it there")
            elif model is not None and model == base and known.scope == "not base":
                work.note(f"parameters.{name} of {model} is skipped: it is the base model, which has none")
    for name in sorted(skipped):
        work.note(f"parameters.{name} is skipped: {work.configuration.merge_method} has no such parameter")


def settle_method(work: Work, parts: Sequence[Part]) -> None:
    """The method with a parameter that makes another one of it where it is off; it is one for the whole merge."""
    if work.method.switch is None:
        return
    (name, off), parameter = work.method.switch, work.method.parameters[work.method.switch[0]]
    values = [v for part in parts for _, v in _decisions(work, name, parameter, part.places, part.where)]
    if all(value is True for value in values):
        return
    if any(value is not False for value in values):
        work.refuse(f"{name} is one for the whole merge here", f"give {name} one value, or merge in stages")
    elif off is None:
        work.refuse(f"{name}: false has no counterpart here, where weights are relative", f"leave out {name}")
    else:
        work.method = replace(work.method, ours=off)


def fixed_options(work: Work) -> dict[str, Any]:
    """Our options that no parameter says, but what the method is for mergekit."""
    based = work.configuration.base_model is not None
    return {**work.method.options, **(work.method.with_base if based else {})}


def decide(work: Work, part: Part, names: Mapping[str, str]) -> Decided:
    """Every parameter of a part as keys of a recipe.

    Args:
        work: the configuration.
        part: of the result.
        names: of the contributors, by their models.
    """
    people = work.contributors(part)
    found = Decided(fixed_options(work), {names[source.model]: {} for source in people})
    for name, parameter in work.method.parameters.items():
        owners: list[tuple[Source | None, tuple[Parameters, ...], str]]
        if parameter.scope == "method":
            owners = [(None, part.places, part.where)]
        else:
            owners = [
                (source, (source.parameters, *part.places), f"{part.where}: {source.model}")
                for source in people
                if parameter.scope == "input" or source.model != work.configuration.base_model
            ]
        for source, places, where in owners:
            decisions = _decisions(work, name, parameter, places, where)
            if source is None:
                _put(found, parameter, [([_pattern(text)], value) for text, value in decisions], None)
            else:
                own = [(_of_layers(text, source, part.first), value) for text, value in decisions]
                _put(found, parameter, own, names[source.model])
            _tell(work, name, parameter, [value for _, value in decisions], any(name in place for place in places))
    return found


def within(rule: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """A rule for those of its tensors that match one of some patterns, all of which end in ``*``."""
    own = rule.get("tensors", ["*"])
    both = [pattern + one.removeprefix("*") for pattern in patterns for one in own]
    return {**rule, "tensors": both}


def _decisions(work: Work, name: str, parameter: Parameter, places: Iterable[Parameters], where: str) -> Decisions:
    found: list[tuple[str | None, Any]] = []
    for condition in (one for place in places for one in place.get(name, ())):
        value = _value(work, name, parameter, condition.value)
        found.append((None if condition.holds_always else condition.filter, value))
        if condition.holds_always:
            return found
    if parameter.default is REQUIRED:
        rest = " of tensors that no filter holds for" if found else ""
        mend = f"add '- value: …' behind the others of {name}" if found else f"add parameters: {{{name}: …}}"
        work.missing.setdefault((f"the {name}{rest}", mend), {}).setdefault(where)
    return [*found, (None, parameter.default)]


def _value(work: Work, name: str, parameter: Parameter, value: Any) -> Any:
    """A value, or a gradient of them, of the parameter's kind; texts such as 1e-3 are numbers, as for mergekit."""
    if isinstance(value, tuple):
        values = [_value(work, name, parameter, one) for one in value]
        return values if len(values) > 1 else values[0]
    if parameter.kind is bool:
        if (found := _BOOLEANS.get(str(value).lower())) is not None:
            return found
    else:
        try:
            number = float(value)
            if math.isfinite(number) and (parameter.kind is float or number.is_integer()):
                return parameter.kind(number)
        except (ValueError, OverflowError):
            pass
    work.refuse(f"{name}: {value!r} is not {_KINDS[parameter.kind]}", f"correct {name}")
    return parameter.default


def _pattern(text: str | None) -> str:
    """The names that hold a text."""
    return f"*{_escaped(text or '')}*"


def _of_layers(text: str | None, source: Source, first: int) -> list[str]:
    """Patterns of the result's tensors for which a text is in the name of a source's own.

    mergekit looks for it in the names that the source's files have, whose layers may be numbered otherwise.

    Args:
        text: of a filter.
        source: whose layers are taken.
        first: the number that its first layer has in the result.
    """
    start, stop = source.range or (first, first)
    number = _LAYER.search(text or "")
    if start == first or text is None or number is None:
        return [_pattern(text)]
    before, digits, after = text[: number.start(1)], number[1], text[number.end(1) :]

    # Where the text does not go on, more digits may come.
    holds = re.compile(f"{'' if before else '[0-9]*'}{digits}{'' if after else '[0-9]*'}")
    layers = (layer + first - start for layer in range(start, stop) if holds.fullmatch(str(layer)))
    return [_pattern(f"{before or '.'}{layer}{after or '.'}") for layer in layers]


def _put(found: Decided, parameter: Parameter, decisions: Sequence[tuple[list[str], Any]], person: str | None) -> None:
    """Decisions into a recipe's keys: the last one as what holds otherwise, the others as rules before it."""
    if parameter.becomes is None:
        return
    *conditional, (_, otherwise) = decisions
    at = 0
    for patterns, value in conditional:
        if not patterns:  # a layer that is not taken
            continue
        while at < len(found.rules) and found.rules[at]["tensors"] != patterns:
            at += 1
        if at == len(found.rules):
            found.rules.append({"tensors": patterns, "optional": True})
        _set(found.rules[at], parameter, value, person)
        at += 1
    if otherwise is not None and otherwise is not REQUIRED:
        _set({"options": found.options, "contributors": found.people}, parameter, otherwise, person)


def _set(place: dict[str, Any], parameter: Parameter, value: Any, person: str | None) -> None:
    """A value at a place that has ``options``, and ``contributors`` with a coefficient and options each."""
    value = [parameter.turned(one) for one in value] if isinstance(value, list) else parameter.turned(value)
    if person is not None:
        place = place.setdefault("contributors", {}).setdefault(person, {})
    if parameter.becomes == COEFFICIENT:
        place[COEFFICIENT] = value
    else:
        place.setdefault("options", {})[parameter.becomes] = value


def _tell(work: Work, name: str, parameter: Parameter, values: Sequence[Any], given: bool) -> None:
    """What a reader of both tools should know of a parameter."""
    listed = (one for value in values for one in (value if isinstance(value, list) else [value]))
    numbers = [one for one in listed if isinstance(one, (int, float))]  # not what is missing
    if name == "density" and parameter.becomes is not None:
        if not given:
            work.note(_KEPT)
        elif work.method.draws and any(number < 1 for number in numbers):
            work.note(_MASKS)
    elif name == "weight" and work.method.elects and any(number < 0 for number in numbers):
        work.note(_NEGATIVE)
    elif name == "rescale" and parameter.becomes is not None and any(numbers):
        work.note(_RESCALED)
    elif given and (text := _SAID.get((name, work.method.ours), _SAID.get((name, "")))) is not None:
        work.note(text)


def _escaped(text: str) -> str:
    """A text as a pattern that only it matches."""
    return re.sub(r"([*?\[])", r"[\1]", text)
