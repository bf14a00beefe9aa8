"""Which tensor gets which method, options and coefficients, and why: the rules of a recipe, applied tensor by tensor.

What a recipe says of a tensor is said in up to four places, and for each key the first that says it counts: the rules
of the block of layers that the tensor lies in, the block itself, the recipe's rules, and the recipe with its
contributors. A list where one value is expected is a gradient over depth: over the block's layers where it stands in a
block, else over all layers of the stack that the tensor lies in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args, get_origin

from merganser.checkpoints.parts import ROLES, Part
from merganser.errors import ErrorCollector, RecipeError, UserError, did_you_mean, validated
from merganser.merging.layer_stacking import Scope
from merganser.merging.matching import BASE_NUMBER, matches
from merganser.merging.recipe import OwnSettings, Recipe, Rule
from merganser.methods import METHODS
from merganser.methods.base import Options
from merganser.methods.names import KEYS_ELSEWHERE
from merganser.text import listed


@dataclass(frozen=True)
class Assignment:
    """What is to be done with a tensor.

    Attributes:
        method: one of :data:`merganser.methods.METHODS`.
        options: of the method, all of them; those that differ between contributors as lists over all.
        coefficients: of each contributor.
        participants: the contributors that have a say.
        taken: whose tensor is taken as it is, instead of a merge: a contributor's number, or :data:`BASE_NUMBER`.
        why: the place of the recipe that said so; None for the recipe's own method and options.
    """

    method: str
    options: Mapping[str, Any]
    coefficients: tuple[float, ...]
    participants: tuple[int, ...]
    taken: int | None = None
    why: str | None = None

    @cached_property
    def key(self) -> str:
        """The same for tensors that are merged alike."""
        said = [self.method, dict(self.options), self.coefficients, self.participants, self.taken]
        return json.dumps(said, sort_keys=True)


@dataclass(frozen=True)
class _Saying:
    """What one place of the recipe says of a tensor."""

    place: str
    title: str
    share: float
    method: str | None
    take: str | None
    options: Mapping[str, Any]
    contributors: Mapping[int, OwnSettings] = field(default_factory=dict)


def interpolated(value: Any, share: float) -> Any:
    """A value at a depth: of several numbers what lies between two of them, of others one.

    Args:
        value: one for all layers, or a list over the depth.
        share: the depth, from 0 to 1.
    """
    if not isinstance(value, (list, tuple)):
        return value
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value)
    if not numbers:
        return value[int(share * (len(value) - 1))]
    place = share * (len(value) - 1)
    first = min(int(place), len(value) - 1)
    rest = place - first
    return value[first] if not rest else (1 - rest) * value[first] + rest * value[first + 1]


def options_of_contributors(kind: type[Options]) -> frozenset[str]:
    """The options that may differ between contributors, by their types (``PerContributor``)."""
    return frozenset(
        name
        for name, info in kind.model_fields.items()
        if any(get_origin(part) is tuple and get_args(part)[1:] == (...,) for part in get_args(info.annotation))
    )


def is_plain(recipe: Recipe) -> bool:
    """Whether every tensor gets the same: there are no rules, gradients or options of single contributors."""
    values = [*recipe.options.values(), *(one.coefficient for one in recipe.contributors)]
    gradients = any(isinstance(value, (list, tuple)) for value in values)
    return not (recipe.rules or recipe.layers or gradients or any(one.options for one in recipe.contributors))


def needs_parts(recipe: Recipe) -> bool:
    """Whether the recipe says anything by role or depth, which the model view has to tell."""
    places = [place for _, place in recipe.places()]
    roles = any(isinstance(place, Rule) and place.role for place in places)
    owners: list[OwnSettings] = []
    for place in places:
        owners += place.settings.values()
    options = [recipe, *recipe.contributors, *places, *owners]
    values = [value for one in options for value in one.options.values()]
    return roles or any(isinstance(value, (list, tuple)) for value in [*values, *recipe.coefficients()])


def assign(
    recipe: Recipe,
    names: Sequence[str],
    titles: Sequence[str],
    parts: Mapping[str, Part],
    scopes: Mapping[str, Scope],
    problems: ErrorCollector,
    notes: list[str],
) -> dict[str, Assignment]:
    """What is done with each tensor.

    Args:
        recipe: whose method is chosen.
        names: of the tensors.
        titles: what the contributors are called.
        parts: role and depth of each tensor, where :func:`needs_parts`.
        scopes: the block of layers that each belongs to, where the recipe has such blocks.
        problems: receives rules that match nothing, and options that cannot be.
        notes: receives rules that match nothing and may.
    """
    assigning = _Assigning(recipe, titles, parts, scopes, problems)
    found = assigning.run(names)
    notes += assigning.idle()
    return found


class _Assigning:
    """See :func:`assign`."""

    def __init__(
        self,
        recipe: Recipe,
        titles: Sequence[str],
        parts: Mapping[str, Part],
        scopes: Mapping[str, Scope],
        problems: ErrorCollector,
    ) -> None:
        self._recipe, self._parts, self._scopes, self._problems = recipe, parts, scopes, problems
        self._numbers: dict[str, int] = {}
        for number, (contributor, title) in enumerate(zip(recipe.contributors, titles, strict=True)):
            self._numbers.setdefault(title, number)
            self._numbers.setdefault(contributor.model, number)
        self._numbers.setdefault("base", BASE_NUMBER)
        self._own_settings = {
            number: OwnSettings(coefficient=one.coefficient, options=one.options)
            for number, one in enumerate(recipe.contributors)
        }
        self._validated: dict[str, dict[str, Any]] = {}
        self._matched: set[str] = set()
        self._astray: dict[tuple[str, str, int], list[str]] = {}  # (rule, who it takes, block without it), with tensors
        self._heeded: set[tuple[str, str]] = set()  # (place, option) that some tensor's method has
        self._unheeded: dict[tuple[str, str], set[str]] = {}  # the same of those that none has, with the methods

    def run(self, names: Sequence[str]) -> dict[str, Assignment]:
        if is_plain(self._recipe):
            return dict.fromkeys(names, self._of_tensor(""))
        found = {name: self._of_tensor(name) for name in names}
        self._check_matches(names)
        for (place, model, number), tensors in self._astray.items():
            lie = f"where {tensors[0]} lies" if len(tensors) == 1 else f"where {listed(tensors, 2)} lie"
            what, mend = f"{model} is no source of layers.{number}, {lie}", "name one of its sources, or match less"
            self._problems.add(RecipeError(what, where=place, mend=mend))
        for (place, option), methods in self._unheeded.items():
            if (place, option) not in self._heeded:
                known = {key for method in methods for key in METHODS[method].options_type.model_fields}
                what = f"no method of these tensors ({', '.join(sorted(methods))}) has an option {option!r}"
                mend = did_you_mean(KEYS_ELSEWHERE.get(option, option), known)
                self._problems.add(RecipeError(what, where=place, mend=mend))
        return found

    def idle(self) -> list[str]:
        """What may match no tensor, and matches none in any block of layers."""
        rules = {place: rule for place, rule in self._recipe.places() if isinstance(rule, Rule)}
        matched = {str(rules[place]) for place in self._matched}
        said = dict.fromkeys(str(rule) for rule in rules.values() if rule.optional)
        return [f"no tensor matches {rule}: what is said of such has no effect" for rule in said if rule not in matched]

    def _of_tensor(self, name: str) -> Assignment:
        recipe, scope = self._recipe, self._scopes.get(name)
        sayings = [*self._sayings(name)]
        said = next((one for one in sayings if one.method is not None or one.take is not None), None)
        people: Sequence[int] = range(len(recipe.contributors))
        if scope is not None:
            block = recipe.layers[scope.number]
            sources = [self._numbers[source.contributor] for source in block.sources]
            people = [number for number in sources if number != BASE_NUMBER]
            if len(sources) == 1 and (said is None or said is sayings[-1]):
                return self._taken(sources[0], f"layers.{scope.number}")
        if said is not None and said.take is not None:
            number = self._numbers[said.take]
            if scope is not None and number != BASE_NUMBER and number not in people:
                self._astray.setdefault((said.place, said.take, scope.number), []).append(name)
            return self._taken(number, said.title)
        method = recipe.method if said is None or said.method is None else said.method
        coefficients = tuple(
            self._coefficient(sayings, number) if number in people else 0.0
            for number in range(len(recipe.contributors))
        )
        options = self._options(method, sayings, people)
        why = None if said is None or said is sayings[-1] else said.title
        if why is None and len(sayings) > 1:
            why = next((one.title for one in sayings[:-1]), None)
        return Assignment(method, options, coefficients, tuple(people), why=why)

    def _taken(self, number: int, why: str) -> Assignment:
        count = len(self._recipe.contributors)
        return Assignment(
            self._recipe.method, {}, tuple(float(n == number) for n in range(count)), (), taken=number, why=why
        )

    def _sayings(self, name: str) -> Iterator[_Saying]:
        """What is said of a tensor, in the order in which it counts; the recipe's own is the last."""
        recipe, part, scope = self._recipe, self._parts.get(name), self._scopes.get(name)
        share = 0.0 if part is None or part.depth is None else part.depth.share
        if scope is not None:
            block, place = recipe.layers[scope.number], f"layers.{scope.number}"
            for number, rule in enumerate(block.rules):
                if self._applies(rule, f"{place}.rules.{number}", name):
                    yield self._said(rule, f"{place}.rules.{number}", scope.share)
            people = {self._numbers[source.contributor]: source for source in block.sources}
            own = {number: source for number, source in people.items() if number != BASE_NUMBER}
            yield _Saying(place, place, scope.share, block.method, None, block.options, own)
        for number, rule in enumerate(recipe.rules):
            if self._applies(rule, f"rules.{number}", name):
                yield self._said(rule, f"rules.{number}", share)
        yield _Saying("options", "the recipe", share, recipe.method, None, recipe.options, self._own_settings)

    def _said(self, rule: Rule, place: str, share: float) -> _Saying:
        people = {self._numbers[name]: own for name, own in rule.contributors.items()}
        return _Saying(place, f"{place} ({rule})", share, rule.method, rule.take, rule.options, people)

    def _applies(self, rule: Rule, place: str, name: str) -> bool:
        fits = not rule.tensors or matches(name, rule.tensors) is not None
        if fits and rule.role:
            fits = name in self._parts and bool(self._parts[name].roles.intersection(rule.role))
        if fits:
            self._matched.add(place)
        return fits

    @staticmethod
    def _coefficient(sayings: Sequence[_Saying], number: int) -> float:
        for saying in sayings:
            own = saying.contributors.get(number)
            if own is not None and own.coefficient is not None:
                return float(interpolated(own.coefficient, saying.share))
        raise RuntimeError("every contributor has a coefficient")

    def _options(self, method: str, sayings: Sequence[_Saying], people: Sequence[int]) -> dict[str, Any]:
        """The options of a method for one tensor, validated."""
        kind = METHODS[method].options_type
        general: dict[str, Any] = {}
        single: dict[str, dict[int, Any]] = {}
        said_of_all: dict[str, str] = {}
        places: dict[str, None] = {}
        for saying in sayings:
            if saying.method not in (None, method):
                continue
            for option, value in saying.options.items():
                if self._has(kind, option, saying, method):
                    general.setdefault(option, interpolated(value, saying.share))
                    said_of_all.setdefault(option, saying.place)
            for number, own in saying.contributors.items():
                for option, value in own.options.items():
                    if self._has(kind, option, saying, method) and self._may_differ(kind, option, saying):
                        if said_of_all.get(option, saying.place) != saying.place:
                            continue  # a place that counts before this one has said it of all
                        single.setdefault(option, {}).setdefault(number, interpolated(value, saying.share))
                        places.setdefault(saying.place)
        values = dict(general)
        for option, by_number in single.items():
            common = general.get(option, kind.model_fields[option].get_default(call_default_factory=True))
            values[option] = tuple(by_number.get(number, common) for number in range(len(self._recipe.contributors)))
        key = json.dumps([method, values], sort_keys=True, default=str)
        if key not in self._validated:
            where = f"{', '.join({**dict.fromkeys(said_of_all.values()), **places}) or 'options'}: options of {method}"
            checked = self._problems.catch(validated, kind, values, where, called=KEYS_ELSEWHERE)
            self._validated[key] = {} if checked is None else checked.model_dump(mode="json")
        return self._validated[key]

    def _has(self, kind: type[Options], option: str, saying: _Saying, method: str) -> bool:
        """Whether a method has an option; an option that is given for another method's sake is let be."""
        if option in kind.model_fields:
            self._heeded.add((saying.place, option))
            return True
        self._unheeded.setdefault((saying.place, option), set()).add(method)
        return False

    def _may_differ(self, kind: type[Options], option: str, saying: _Saying) -> bool:
        own = options_of_contributors(kind)
        if option in own:
            return True
        able = f"these can: {', '.join(sorted(own))}" if own else "this method has no option that can"
        what = f"the option {option!r} is one for all contributors; {able}"
        self._problems.add(RecipeError(what, where=saying.place, mend=f"give {option} under options, for all of them"))
        return False

    def _check_matches(self, names: Sequence[str]) -> None:
        """Rules that match no tensor, and the roles that are none."""
        for place, rule in self._recipe.places():
            if not isinstance(rule, Rule):
                continue
            unknown = [role for role in rule.role if role not in ROLES]
            for role in unknown:
                self._problems.add(RecipeError(f"unknown role {role!r}", where=place, mend=did_you_mean(role, ROLES)))
            if place not in self._matched and not unknown and not rule.optional:
                self._problems.add(self._unmatched(rule, place, names))

    def _unmatched(self, rule: Rule, place: str, names: Sequence[str]) -> UserError:
        """The mistake of a rule that matches no tensor, with names that are near to what it says."""
        if rule.role and not rule.tensors:
            there = sorted({role for part in self._parts.values() for role in part.roles})
            mend = f"the tensors of this model have the roles {', '.join(there)}"
        else:
            said = {pattern: pattern.replace("*", "").strip(".") for pattern in rule.tensors}
            near = [name for name in names for stem in said.values() if _alike(stem, name)]
            mend = f"use a name or a pattern with *, such as {(near or [*names])[0]!r}"
            if any(f"*{stem}*" not in rule.tensors and any(stem in name for name in names) for stem in said.values()):
                mend = f"a pattern is the whole name: write {' or '.join(f'*{stem}*' for stem in said.values())!r}"
        return RecipeError(f"no tensor matches {rule}", where=place, mend=mend)


def _alike(stem: str, name: str) -> bool:
    """Whether a part of a pattern resembles a part of a name."""
    import difflib

    pieces = [piece for piece in stem.split(".") if piece]
    return bool(pieces) and any(difflib.get_close_matches(pieces[-1], name.split("."), n=1, cutoff=0.7))
