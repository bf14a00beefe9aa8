"""From a configuration of mergekit to a recipe of ours that computes the same, with everything spelled out.

The translation is pure: it opens no model. A parameter may be set at four places, of which the innermost counts: at a
slice's source or a model, at the slice, at the module, and for the whole merge. At each place it may have several
values, for the tensors whose names contain a text, and a list of numbers is a gradient over the layers. All values of
one parameter are therefore one list of decisions, of which the first that holds for a tensor counts: the last of them
becomes the recipe's own key, those before it become rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merganser.errors import ErrorCollector, RecipeError, did_you_mean
from merganser.merging.mergekit.methods import (
    COEFFICIENT,
    KNOWN_PARAMETERS,
    METHODS,
    REQUIRED,
    MergekitMethod,
    Parameter,
)
from merganser.merging.mergekit.schema import Condition, Configuration, Parameters, Setting, Slice
from merganser.merging.mergekit.tokens import tokenizer_keys

#: Where a plan has its dtypes; mergekit also knows int64, which no weight of a model has.
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_RESERVED = frozenset({"base", "mean", "auto"})  # names that a recipe's keys have for something else
#: The parts that mergekit knows models of several parts to have, by patterns of the names of their tensors.
MODULES: Mapping[str, tuple[str, ...]] = {
    "text_decoder": ("*language_model.*", "lm_head.*"),
    "multi_modal_projector": ("*multi_modal_projector.*", "*visual.merger.*"),
    "vision_tower": ("*vision_tower.*", "*visual.*"),
    "vision_model": ("*vision_model.*",),
    "encoder": ("encoder.*", "model.encoder.*"),
    "decoder": ("decoder.*", "model.decoder.*"),
    "shared": ("shared.*", "lm_head.*"),
}
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


@dataclass(frozen=True)
class Translation:
    """What a configuration of mergekit is here.

    Attributes:
        recipe: the values of our recipe.
        notes: where the same name means something else here, and what will differ.
    """

    recipe: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A model that a part is merged from; ``range`` are its layers, None for all."""

    model: str
    parameters: Parameters
    range: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Part:
    """Layers of the result (or all of it) that are merged from some sources, with the places of its parameters."""

    sources: tuple[_Source, ...]
    places: tuple[Parameters, ...]
    where: str


@dataclass
class _Decided:
    """Keys of a recipe, or of an entry of its layers: what holds for every tensor, and the rules before it."""

    options: dict[str, Any] = field(default_factory=dict)
    people: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)


def translate(configuration: Configuration, where: str) -> Translation:
    """Our recipe for a configuration of mergekit.

    Args:
        configuration: what was read.
        where: it stands, for errors.

    Raises:
        RecipeError: what cannot be honoured, by its name and with a mend; several as ``Problems``.
    """
    return _Translator(configuration, where).translation()


class _Translator:
    """One translation; collects problems and notes on the way."""

    def __init__(self, configuration: Configuration, where: str) -> None:
        self.configuration, self.where = configuration, where
        self.problems, self.notes = ErrorCollector(), dict[str, None]()
        name = configuration.merge_method
        if name not in METHODS:
            raise RecipeError(f"unknown merge_method {name!r}", where=where, mend=did_you_mean(name, METHODS))
        self.method: MergekitMethod = METHODS[name]
        self.names: dict[str, str] = {}

    def translation(self) -> Translation:
        parts = list(self._parts())
        self.problems.raise_all()
        for part in parts:
            self._check_inputs(part)
        self._check_parameters(parts)
        self.problems.raise_all()
        self.names = _named(dict.fromkeys(source.model for part in parts for source in self._contributors(part)))
        decided = [self._decided(part) for part in parts]
        self.problems.raise_all()
        recipe = {"contributors": [], "method": self.method.ours, **self._base()}
        recipe |= self._placed(parts, decided)
        recipe |= self._dtypes()
        recipe |= self._tokens()
        if self.configuration.chat_template is not None:
            recipe["chat_template"] = self.configuration.chat_template
        self.problems.raise_all()
        return Translation({key: value for key, value in recipe.items() if value not in ({}, [])}, tuple(self.notes))

    # ── structure ──

    def _parts(self) -> Iterable[_Part]:
        """The parts of the result, every one with the places that its parameters can stand at."""
        conf = self.configuration
        everything = conf.parameters
        if conf.models:
            yield self._whole(conf.models, (everything,), "models")
        for number, one in enumerate(conf.slices):
            yield self._slice(one, (everything,), f"slices[{number}]")
        if conf.modules and set(conf.modules) == {"default"}:
            (module,) = conf.modules.values()
            if module.models:
                yield self._whole(module.models, (module.parameters, everything), "modules.default.models")
            for number, one in enumerate(module.slices):
                yield self._slice(one, (module.parameters, everything), f"modules.default.slices[{number}]")
        elif conf.modules:
            yield from self._modules()

    def _modules(self) -> Iterable[_Part]:
        """Parts by the names of modules; each has to be whole models, since ``layers`` means a model's only stack."""
        for name, module in self.configuration.modules.items():
            place = f"modules.{name}"
            if name not in MODULES:
                mend = did_you_mean(name, [*MODULES, "default"])
                self.problems.add(RecipeError(f"unknown module {name!r}", where=self.where, mend=mend))
            elif module.slices:
                what = f"{place}.slices: layers of one of several modules cannot be chosen here"
                mend = f"give {place}.models, with whole models"
                self.problems.add(RecipeError(what, where=self.where, mend=mend))
            else:
                yield self._whole(module.models, (module.parameters, self.configuration.parameters), place)

    def _whole(self, models: Sequence[Any], places: tuple[Parameters, ...], where: str) -> _Part:
        """Whole models; mergekit adds a base model that is not among them as the last."""
        sources = [_Source(one.model, one.parameters) for one in models]
        base = self.configuration.base_model
        if base is not None and all(source.model != base for source in sources):
            sources.append(_Source(base, {}))
        return _Part(tuple(sources), places, where)

    def _slice(self, one: Slice, places: tuple[Parameters, ...], where: str) -> _Part:
        sources = tuple(_Source(source.model, source.parameters, source.layer_range) for source in one.sources)
        if one.base_model not in (None, self.configuration.base_model):
            what = f"{where}.base_model: one merge has one base model here"
            mend = "give one base_model for the whole merge, or merge in stages, one for each base model"
            self.problems.add(RecipeError(what, where=self.where, mend=mend))
        if one.residual_weight is not None:
            self._note(f"{where}.residual_weight is skipped: no method of mergekit 0.1.5 reads it")
        lengths = {stop - start for start, stop in (source.range for source in sources if source.range)}
        if any(start < 0 for start, _ in (s.range for s in sources if s.range)) or min(lengths) < 1:
            mend = "give the first layer and the one after the last, such as [0, 8]"
            self.problems.add(RecipeError(f"{where}: a layer_range is empty or negative", where=self.where, mend=mend))
        if len(lengths) > 1:
            what = f"{where}: its sources have different numbers of layers: {sorted(lengths)}"
            mend = "give every source of a slice as many layers"
            self.problems.add(RecipeError(what, where=self.where, mend=mend))
        return _Part(sources, places if not one.parameters else (one.parameters, *places), where)

    def _contributors(self, part: _Part) -> list[_Source]:
        """The sources that are contributors here; one that is both ends of a method's, the base comes first."""
        base = self.configuration.base_model
        if self.method.base == "input" or base is None:
            return list(part.sources)
        if self.method.base == "first":
            return sorted(part.sources, key=lambda source: source.model != base)
        return [source for source in part.sources if source.model != base]

    def _base(self) -> dict[str, Any]:
        """The base model, where it is no contributor."""
        base = self.configuration.base_model
        return {} if base is None or self.method.base in ("input", "first") else {"base": base}

    def _check_inputs(self, part: _Part) -> None:
        """The method gets as many models as it merges, and the base that it needs, as mergekit asks of it."""
        name, base = self.configuration.merge_method, self.configuration.base_model
        models = [source.model for source in part.sources]
        twice = next((model for model in models if models.count(model) > 1), None)
        if twice is not None:
            what, mend = f"{part.where}: {twice} is there twice", "name each model once; add up its weights"
            self.problems.add(RecipeError(what, where=self.where, mend=mend))
            return
        if self.method.base in ("origin", "first") and base is None:
            what = f"merge_method {name} needs a base model"
            self.problems.add(RecipeError(what, where=self.where, mend="add base_model: MODEL"))
            return
        if self.method.base != "input" and base is not None and base not in models:
            what = f"{part.where}: the base model {base} is none of its sources"
            mend = "add it to the sources, with the layers that the others' weights are compared with"
            self.problems.add(RecipeError(what, where=self.where, mend=mend))
        (low, high), count = self.method.inputs, len(self._contributors(part))
        if count < low or (high is not None and count > high):
            wanted = f"at least {low}" if high is None else f"exactly {low}"
            beside = " besides the base model" if self.method.base.startswith("origin") and base is not None else ""
            what = f"{part.where}: merge_method {name} merges {wanted}{beside}, and there {_are(count)}"
            mend = "add or leave out models" + (
                "; put every model into a slice of its own" if name == "passthrough" else ""
            )
            self.problems.add(RecipeError(what, where=self.where, mend=mend))

    # ── parameters ──

    def _check_parameters(self, parts: Sequence[_Part]) -> None:
        """Names that no method knows are errors; those of other methods, or at a base that has none, are told of."""
        base, skipped = self.configuration.base_model, set[str]()
        places: list[tuple[Parameters, str | None]] = [(place, None) for part in parts for place in part.places]
        places += [(source.parameters, source.model) for part in parts for source in part.sources]
        for place, model in places:
            for name in place:
                known = self.method.parameters.get(name)
                if known is None and name not in KNOWN_PARAMETERS:
                    mend = did_you_mean(name, self.method.parameters)
                    self.problems.add(RecipeError(f"unknown parameter {name!r}", where=self.where, mend=mend))
                elif known is None:
                    skipped.add(name)
                elif model is not None and known.scope == "method":
                    what = f"parameters.{name} of {model} is skipped: it is one for the whole method"
                    self._note(f"{what}, and mergekit does not read it there")
                elif model is not None and model == base and known.scope == "not base":
                    self._note(f"parameters.{name} of {model} is skipped: it is the base model, which has none")
        for name in sorted(skipped):
            self._note(f"parameters.{name} is skipped: {self.configuration.merge_method} has no such parameter")

    def _decided(self, part: _Part) -> _Decided:
        """Every parameter of a part as keys of a recipe."""
        found = _Decided(options=self._fixed_options())
        people = self._contributors(part)
        found.people = {self.names[source.model]: {} for source in people}
        for name, parameter in self.method.parameters.items():
            if parameter.scope == "method":
                decisions = self._decisions(name, parameter, part.places, part.where)
                if self.method.switch is not None and name == self.method.switch[0]:
                    self._switch(name, [value for _, value in decisions])
                self._put(found, parameter, decisions, None)
                self._tell(name, parameter, [value for _, value in decisions], bool(_given(name, part.places)))
                continue
            for source in people:
                if parameter.scope == "not base" and source.model == self.configuration.base_model:
                    continue
                where = f"{part.where}: {source.model}"
                places = (source.parameters, *part.places)
                decisions = self._decisions(name, parameter, places, where)
                self._put(found, parameter, decisions, self.names[source.model])
                self._tell(name, parameter, [value for _, value in decisions], bool(_given(name, places)))
        return found

    def _fixed_options(self) -> dict[str, Any]:
        """Our options that no parameter says, but what the method is for mergekit."""
        based = self.configuration.base_model is not None
        return {**self.method.options, **(self.method.with_base if based else {})}

    def _switch(self, name: str, values: Sequence[Any]) -> None:
        """A parameter that makes another method of it where it is off."""
        off = self.method.switch[1] if self.method.switch else None
        if all(value is True for value in values):
            return
        if len(values) > 1 or isinstance(values[0], list):
            what, mend = f"{name} is one for the whole merge here", f"give {name} one value, or merge in stages"
            self.problems.add(RecipeError(what, where=self.where, mend=mend))
        elif off is None:
            what = f"{name}: false has no counterpart here, where weights are relative"
            self.problems.add(RecipeError(what, where=self.where, mend=f"leave out {name}"))
        else:
            self.method = replace(self.method, ours=off, switch=None)

    def _tell(self, name: str, parameter: Parameter, values: Sequence[Any], given: bool) -> None:
        """What a reader of both tools should know of a parameter."""
        numbers = [one for value in values for one in (value if isinstance(value, list) else [value])]
        if name == "density" and parameter.becomes is not None:
            if not given:
                self._note(
                    "density is 1 where nothing is said, so that nothing is dropped; our methods' own defaults drop"
                )
            elif self.method.draws and any(number < 1 for number in numbers):
                self._note(_MASKS)
        elif name == "weight" and self.method.elects and any(number < 0 for number in numbers):
            self._note(_NEGATIVE)
        elif name == "rescale" and parameter.becomes is not None and any(numbers):
            self._note(_RESCALED)
        elif given and (note := _SAID.get((name, self.method.ours), _SAID.get((name, "")))) is not None:
            self._note(note)

    def _decisions(
        self, name: str, parameter: Parameter, places: Sequence[Parameters], where: str
    ) -> list[tuple[str | None, Any]]:
        """(text in a tensor's name, value), the first that holds counts; the last one always holds (None)."""
        found: list[tuple[str | None, Any]] = []
        conditions: Iterable[Condition] = (one for place in places for one in _setting(place, name))
        for condition in conditions:
            value = self._value(name, parameter, condition.value)
            found.append((None if condition.holds_always else condition.filter, value))
            if condition.holds_always:
                return found
        if parameter.default is REQUIRED:
            rest = " of tensors that no filter holds for" if found else ""
            mend = f"add '- value: …' behind the others of {name}" if found else f"add parameters: {{{name}: …}}"
            self.problems.add(RecipeError(f"{where}: the {name}{rest} is missing", where=self.where, mend=mend))
        return [*found, (None, parameter.default)]

    def _value(self, name: str, parameter: Parameter, value: Any) -> Any:
        """A value, or a gradient of them, of the parameter's kind; texts such as 1e-3 are numbers, as for mergekit."""
        if isinstance(value, tuple):
            values = [self._value(name, parameter, one) for one in value]
            return values if len(values) > 1 else values[0]
        if parameter.kind is bool:
            words = {
                "true": True,
                "yes": True,
                "on": True,
                "1": True,
                "false": False,
                "no": False,
                "off": False,
                "0": False,
            }
            found = (
                words.get(str(value).lower()) if not isinstance(value, float) else {0.0: False, 1.0: True}.get(value)
            )
            if found is not None:
                return found
        else:
            try:
                number = float(value)
                if math.isfinite(number) and (parameter.kind is float or number.is_integer()):
                    return parameter.kind(number)
            except (ValueError, OverflowError):
                pass
        kind = {bool: "true or false", float: "a number", int: "a whole number"}[parameter.kind]
        self.problems.add(RecipeError(f"{name}: {value!r} is not {kind}", where=self.where, mend=f"correct {name}"))
        return parameter.default

    def _put(
        self, found: _Decided, parameter: Parameter, decisions: Sequence[tuple[str | None, Any]], person: str | None
    ) -> None:
        """Decisions into a recipe's keys: the last one as what holds otherwise, the others as rules before it."""
        if parameter.becomes is None:
            return
        *conditional, (_, otherwise) = decisions
        at = 0
        for text, value in conditional:
            pattern = f"*{_escaped(text or '')}*"
            while at < len(found.rules) and found.rules[at]["tensors"] != [pattern]:
                at += 1
            if at == len(found.rules):
                found.rules.append({"tensors": [pattern]})
            _set(found.rules[at], parameter, value, person)
            at += 1
        if otherwise is not None and otherwise is not REQUIRED:
            whole: dict[str, Any] = {"options": found.options, "contributors": found.people}
            _set(whole, parameter, otherwise, person)

    # ── places in the recipe ──

    def _placed(self, parts: Sequence[_Part], decided: Sequence[_Decided]) -> dict[str, Any]:
        """Keys for the whole recipe where there is one part, and entries of ``layers`` where there are slices."""
        models = {name: model for model, name in self.names.items()}
        first = decided[0]
        keys: dict[str, Any] = {"options": first.options}
        keys["contributors"] = [{"model": models[name], "name": name, **first.people.get(name, {})} for name in models]
        keys["rules"] = first.rules
        if self.configuration.modules and "default" not in self.configuration.modules:
            return self._by_module(parts, decided, keys)
        if len(parts) == 1:
            if parts[0].sources[0].range is not None:
                keys["layers"] = [{"sources": self._ranges(parts[0], {})}]
            return keys
        return self._stacked(parts, decided, keys)

    def _ranges(self, part: _Part, people: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The sources of a slice as an entry of ``layers`` has them; a base that is no contributor is ``base``."""
        found = []
        for source in part.sources:
            name = self.names.get(source.model, "base")
            found.append({"contributor": name, "range": list(source.range or ()), **people.get(name, {})})
        return found

    def _stacked(self, parts: Sequence[_Part], decided: Sequence[_Decided], keys: dict[str, Any]) -> dict[str, Any]:
        """Several slices: each is an entry of ``layers`` with its own values.

        What lies before the layers is the first slice's, and what lies behind them the last one's, as for mergekit.
        """
        keys["contributors"] = [{"model": one["model"], "name": one["name"]} for one in keys["contributors"]]
        keys["options"], keys["rules"], keys["layers"] = self._fixed_options(), [], []
        for part, found in zip(parts, decided, strict=True):
            entry: dict[str, Any] = {"sources": self._ranges(part, found.people)}
            if len(entry["sources"]) > 1 or _says_anything(found):
                entry |= {"method": self.method.ours, "options": found.options, "rules": found.rules}
            keys["layers"].append({key: value for key, value in entry.items() if value not in ({}, [])})
        return keys

    def _by_module(self, parts: Sequence[_Part], decided: Sequence[_Decided], keys: dict[str, Any]) -> dict[str, Any]:
        """Modules of whole models: every one is rules for the names of its tensors."""
        keys["contributors"] = [{"model": one["model"], "name": one["name"]} for one in keys["contributors"]]
        keys["options"], keys["rules"] = self._fixed_options(), []
        names = {one["name"] for one in keys["contributors"]}
        for name, part, found in zip(self.configuration.modules, parts, decided, strict=True):
            if len(part.sources) == 1 and not _says_anything(found):
                keys["rules"].append({"tensors": list(MODULES[name]), "take": self.names[part.sources[0].model]})
                continue
            if names - set(found.people):
                what = f"{part.where}: every module has to be merged from the same models"
                mend = "add the missing models with weight 0, or merge in stages"
                self.problems.add(RecipeError(what, where=self.where, mend=mend))
            whole = {"options": found.options, "contributors": {k: v for k, v in found.people.items() if v}}
            rules = [*found.rules, {key: value for key, value in whole.items() if value}]
            keys["rules"] += [_within(rule, MODULES[name]) for rule in rules if set(rule) - {"tensors"}]
        return keys

    # ── the rest ──

    def _dtypes(self) -> dict[str, Any]:
        """Storage and computation dtype; mergekit also rounds the inputs to ``dtype`` and computes in it."""
        found: dict[str, Any] = {}
        for key in ("dtype", "out_dtype"):
            given = getattr(self.configuration, key)
            name = None if given is None else given.removeprefix("torch.")
            if name is None:
                continue
            if name not in _DTYPES:
                what, mend = f"{key}: {given!r} is no dtype of weights", did_you_mean(name, _DTYPES)
                self.problems.add(RecipeError(what, where=self.where, mend=mend))
                continue
            found["dtype"] = _DTYPES[name]
            if key == "dtype" and name == "float64":
                found["computation"] = "F64"
            elif key == "dtype" and name != "float32":
                self._note(
                    f"dtype {name}: mergekit rounds the inputs to it, and most of its methods compute in it; "
                    "here the sums are float32 and the result alone is rounded"
                )
        return found

    def _tokens(self) -> dict[str, Any]:
        """Keys of vocabulary and tokenizer."""
        known = dict(self.names)
        base = self.configuration.base_model
        if base is not None:
            known.setdefault(base, "base")
        keys = self.problems.catch(tokenizer_keys, self.configuration, known, self.where)
        return keys or {}

    def _note(self, text: str) -> None:
        self.notes.setdefault(text)


def _setting(place: Parameters, name: str) -> Setting:
    return place.get(name, ())


def _given(name: str, places: Iterable[Parameters]) -> bool:
    """Whether a parameter is set at any place."""
    return any(name in place for place in places)


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _set(place: dict[str, Any], parameter: Parameter, value: Any, person: str | None) -> None:
    """A value at a place that has ``options``, and ``contributors`` with a coefficient and options each."""
    value = parameter.turned(value)
    if person is not None:
        place = place.setdefault("contributors", {}).setdefault(person, {})
    if parameter.becomes == COEFFICIENT:
        place[COEFFICIENT] = value
    else:
        place.setdefault("options", {})[parameter.becomes] = value


def _says_anything(found: _Decided) -> bool:
    """Whether a part has any values, so that its layers are not simply taken as they are."""
    return bool(found.options or found.rules or any(found.people.values()))


def _within(rule: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """A rule for those of its tensors that match one of some patterns, all of which end in ``*``."""
    own = rule.get("tensors", ["*"])
    both = [pattern + one.removeprefix("*") for pattern in patterns for one in own]
    return {**rule, "tensors": both}


def _escaped(text: str) -> str:
    """A text as a pattern that only it matches."""
    return re.sub(r"([*?\[])", r"[\1]", text)


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
