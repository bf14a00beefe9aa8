"""What a benchmark is made of: suites, which are experiments, and methods, each with the options that it may try.

    load_benchmark(["leaderboard/ner", "mine.yaml"], ["leaderboard/methods"], templates={"base": "all-MiniLM-L6-v2"})

A file of methods has a list ``methods`` of names, or of mappings such as

    - method: ties
      family: published                                  # or ours
      grid: {density: [0.1, 0.2], scale: [0.5, 1, 2]}    # every combination is a candidate

A grid may be a list of such mappings, whose candidates are joined; a value that is no list stands for itself, and
options that are not named have their defaults. ``auto`` has no grid: it is on each suite what its table has there.

    - {method: auto, title: "Auto, with statistics", family: ours, published: [gram, kfac]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from merganser.errors import ErrorCollector, RecipeError, did_you_mean, validated
from merganser.lab.grid.cells import expand
from merganser.lab.grid.config import ExperimentConfig, MethodConfig, check_title
from merganser.lab.grid.loading import find_file, load_config, read_values, templates_of
from merganser.lab.suites import SUITES
from merganser.lab.suites.texts import Texts
from merganser.methods import METHODS
from merganser.methods.auto import AUTO, Published, Situation, Tasks, choose
from merganser.methods.base import Needs
from merganser.methods.names import suggest_method
from merganser.text import listed

Family = Literal["published", "ours"]
#: The methods that come with merganser, and what they may try.
METHODS_FILE = "leaderboard/methods"
#: More are a slip of the pen: each is a merge on every suite.
MAX_CANDIDATES = 100


@dataclass(frozen=True)
class Candidate:
    """A method with options, as one that a benchmark may choose.

    Attributes:
        title: what rows call it.
        options: those that the file of methods names.
        needs: what the method needs with them.
    """

    title: str
    options: dict[str, Any]
    needs: Needs


class Entry(BaseModel):
    """A method of a benchmark, a line of its table.

    Attributes:
        method: its name, or ``auto``.
        title: of the line; the method's own unless given.
        family: whether others published it.
        grid: option → the values to try, or a list of such.
        published: for ``auto``, the statistics that every contributor publishes; the base model is always known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    title: str = Field(default="", validate_default=True)
    family: Family = "published"
    grid: tuple[dict[str, Any], ...] = ({},)
    published: tuple[Published, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        value = {"method": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("grid"), dict):
            value = {**value, "grid": [value["grid"]]}
        return value

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS and name != AUTO:
            raise ValueError(f"unknown method {name!r}. {suggest_method(name, METHODS)}")
        return name

    @field_validator("title")
    @classmethod
    def _titled(cls, title: str, info: ValidationInfo) -> str:
        name = info.data.get("method", "")
        check_title(title)
        return title or (METHODS[name].title if name in METHODS else name.capitalize())

    @model_validator(mode="after")
    def _tried(self) -> Entry:
        if self.method == AUTO and self.grid != ({},):
            raise ValueError("auto has the options of its table (merganser methods auto): leave grid out")
        if self.method != AUTO and self.published:
            raise ValueError(f"published is for auto alone: leave it out with {self.method}")
        if not 1 <= len(self.candidates) <= MAX_CANDIDATES:
            counted = f"{len(self.candidates)} candidates, 1 to {MAX_CANDIDATES} are accepted"
            raise ValueError(f"the grid of {self.title} has {counted}: leave some of its values out")
        return self

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Each combination of options, none twice, called by the options that differ; of ``auto`` one without any.

        Raises:
            ValueError: an option that the method does not have, or a value that it does not take.
        """
        if self.method == AUTO:
            kind = self.published[-1] if self.published else None
            return (Candidate(self.title, {}, Needs(base=True, statistics=kind)),)
        found: dict[str, Candidate] = {}
        for options in _combinations(self.grid):
            config = MethodConfig(method=self.method, title=_called(self.title, options), options=options)
            resolved = METHODS[self.method].options_type(**options).model_dump(mode="json")
            key = json.dumps(resolved, sort_keys=True)
            found.setdefault(key, Candidate(config.title, options, config.needs))
        return tuple(found.values())

    def merges(self, suite: ExperimentConfig) -> tuple[MethodConfig, ...]:
        """The candidates as methods of the suite's experiment."""
        method, options = self.method, dict[str, Any]()
        if method == AUTO:
            row = choose(situation_of(suite, self.published))
            method, options = row.method, dict(row.options)
        return tuple(
            MethodConfig(method=method, title=candidate.title, options=options or candidate.options)
            for candidate in self.candidates
        )

    def obstacle(self, suite: ExperimentConfig) -> str | None:
        """Why the method cannot merge what the suite has it merge; None where it can."""
        needs = METHODS[self.merges(suite)[0].method].needs
        sizes = {len(cell.contributors) for cell in expand(suite) if cell.kind == "merge"}
        there = f"the suite merges {listed([str(size) for size in sorted(sizes)], 3)}"
        if needs.data:
            return "it needs texts at hand"
        if needs.models is not None and sizes != {needs.models}:
            return f"it merges exactly {needs.models} models, and {there}"
        return None if min(sizes) >= needs.at_least else f"it merges {needs.at_least} models or more, and {there}"

    def applies(self, suite: ExperimentConfig) -> bool:
        """Whether the method can merge what the suite has it merge."""
        return self.obstacle(suite) is None


def situation_of(suite: ExperimentConfig, published: Sequence[Published] = ()) -> Situation:
    """What is at hand where a suite's models are merged, as ``--method auto`` finds it from their files.

    Args:
        suite: whose contributors publish
        published: these statistics.
    """
    labelled: Tasks = "different" if "separate" in suite.heads else "same"
    sizes = [len(cell.contributors) for cell in expand(suite) if cell.kind == "merge"]
    return Situation(
        published=frozenset([*published, "gram"]) if "kfac" in published else frozenset(published),
        base=True,
        tasks=None if issubclass(SUITES[suite.suite.name], Texts) else labelled,
        low_rank=all("lora" in {**suite.training, **one.training} for one in suite.contributors.values()),
        models=min(sizes),
    )


class MethodsFile(BaseModel):
    """What a file of methods holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Benchmark:
    """Suites, methods, and on how many seeds options are chosen.

    Attributes:
        suites: experiments; their own methods do not count.
        entries: the methods that are run.
        known: these, and the methods that are left out of this run.
        dev_seeds: how many seeds of each suite, from the first, options are chosen on.
    """

    suites: tuple[ExperimentConfig, ...]
    entries: tuple[Entry, ...]
    known: tuple[Entry, ...]
    dev_seeds: int = 1

    def whole(self, suite: ExperimentConfig, entries: Sequence[Entry]) -> ExperimentConfig | None:
        """All candidates of the methods that apply, on the suite's tests: what all inputs are checked by.

        None where no method applies.
        """
        return _with(suite, [one for entry in entries if entry.applies(suite) for one in entry.merges(suite)])

    def development(self, suite: ExperimentConfig, entries: Sequence[Entry]) -> ExperimentConfig | None:
        """Those of methods with a choice, and the individual models, on the contributors' development data."""
        found = self.whole(suite, [entry for entry in entries if len(entry.candidates) > 1])
        seeds = list((suite.keep_seeds or suite.seeds)[: self.dev_seeds])
        changes = {"comparators": ["individual"], "tests": {"split": "dev"}, "keep_seeds": seeds, "bootstrap": 0}
        return None if found is None else _varied(found, **changes)

    def test(self, suite: ExperimentConfig, chosen: Mapping[str, str]) -> ExperimentConfig | None:
        """The chosen candidates and the suite's own comparators on its tests.

        Args:
            suite: one of the benchmark's.
            chosen: title of a method → that of its candidate; methods that it lacks are left out.

        Returns:
            None where nothing is left.
        """
        entries = [one for one in self.entries if one.title in chosen and one.applies(suite)]
        return _with(suite, [c for one in entries for c in one.merges(suite) if c.title == chosen[one.title]])


def load_benchmark(
    suites: Sequence[str | Path],
    methods: Sequence[str | Path] = (METHODS_FILE,),
    *,
    templates: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    dev_seeds: int = 1,
    device: str | None = None,
) -> Benchmark:
    """Read suites and methods.

    Args:
        suites: configurations of experiments, or names of those that come with merganser, each a suite.
        methods: files of methods, whose lists are joined, or names of such that come with merganser.
        templates: values of ``{name}`` in the suites.
        only: names or titles of the methods to run; empty for all.
        seeds: work on these seeds of each suite alone; empty for all.
        dev_seeds: how many seeds of each suite options are chosen on.
        device: where to work (auto, cpu or cuda), instead of what the suites say.

    Raises:
        UserError: files that cannot be read, unknown or malformed keys, two suites or methods of one name, a template
            that no suite uses, a method that applies to no suite; each with file and key.
    """
    errors = ErrorCollector()
    known = [entry for file in methods for entry in errors.catch(read_methods, file) or ()]
    _check_unlike([entry.title for entry in known], "methods", "give one of them another title", errors)
    given, used = dict(templates or {}), set[str]()
    configs = []
    for file in suites:
        own = errors.catch(templates_of, [file]) or set()
        used |= own
        values = {name: value for name, value in given.items() if name in own}
        config = errors.catch(_read_suite, file, values, seeds, device)
        configs += [config] if config is not None else []
    if not errors.found:
        for name in sorted(set(given) - used):
            mend = did_you_mean(name, used) if used else "leave it out: these suites have no templates"
            errors.add(RecipeError(f"--templates {name}=… changes nothing: no suite has {{{name}}}", mend=mend))
        _check_unlike([config.name for config in configs], "suites", "give one of them another name", errors)
    errors.raise_all()
    if not configs:
        raise RecipeError("no suite", where="benchmark", mend="give at least one YAML file of an experiment")
    entries = _kept(known, only)
    usable = [entry for entry in entries if any(entry.applies(config) for config in configs)]
    if not usable:
        what = "none of the methods applies to any of the suites"
        raise RecipeError(what, where="benchmark", mend="give other methods or other suites")
    return Benchmark(tuple(configs), tuple(usable), tuple(known), dev_seeds)


def read_methods(file: str | Path) -> tuple[Entry, ...]:
    """The methods of a file, or of one that comes with merganser.

    Raises:
        RecipeError: it cannot be read, or a method, option or value that there is none.
    """
    place = find_file(file)
    return validated(MethodsFile, read_values(place), str(place)).methods


def _read_suite(
    file: str | Path, templates: Mapping[str, str], seeds: Sequence[int], device: str | None
) -> ExperimentConfig:
    config = load_config([file], templates=templates, replaced={"methods": ["simple"]})
    if seeds:
        own = [seed for seed in config.seeds if seed in seeds]
        if not own:
            there = ", ".join(map(str, config.seeds))
            what = f"has none of the seeds {', '.join(map(str, seeds))}"
            raise RecipeError(what, where=file, mend=f"give --seeds some of {there}")
        config = _varied(config, keep_seeds=own)
    if device is not None:
        config = _varied(config, resources={**config.resources.model_dump(mode="json"), "device": device})
    return config


def _kept(entries: Sequence[Entry], only: Sequence[str]) -> list[Entry]:
    """The methods that are named, in the files' order; all where none is."""
    errors = ErrorCollector()
    names = {entry.title.lower() for entry in entries} | {entry.method for entry in entries}
    wanted = {name.lower() for name in only}
    for name in sorted(wanted - names):
        errors.add(RecipeError(f"no method {name!r} in the files of methods", mend=did_you_mean(name, names)))
    errors.raise_all()
    return [entry for entry in entries if not wanted or wanted & {entry.title.lower(), entry.method}]


def _check_unlike(names: Sequence[str], what: str, mend: str, errors: ErrorCollector) -> None:
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        errors.add(RecipeError(f"two {what} are called {name!r}", where="benchmark", mend=mend))


def _varied(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    """A configuration with other values, validated again."""
    return validated(ExperimentConfig, {**config.model_dump(mode="json"), **changes}, config.name)


def _with(suite: ExperimentConfig, methods: Sequence[MethodConfig]) -> ExperimentConfig | None:
    return _varied(suite, methods=[one.model_dump(mode="json") for one in methods]) if methods else None


def _combinations(grid: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in grid:
        values = [value if isinstance(value, list | tuple) else [value] for value in part.values()]
        yield from (dict(zip(part, chosen, strict=True)) for chosen in product(*values))


def options_text(options: Mapping[str, Any]) -> str:
    """Options as titles and tables say them, such as ``density 0.5, scale 1``."""
    return ", ".join(f"{name} {_short(value)}" for name, value in options.items())


def _called(title: str, options: Mapping[str, Any]) -> str:
    return f"{title} ({options_text(options)})" if options else title


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
