"""What an experiment's configuration may say. One configuration describes a whole grid.

The keys of the original's command line are kept where they make sense (``default_model_args``, ``load_from_zoo``,
``zoo_filter``); a contributor inherits every key of ``default_model_args`` that it does not set itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merganser.errors import RecipeError, UserError, did_you_mean, raise_all
from merganser.files import parse_size
from merganser.lab.suites import SUITES
from merganser.methods import METHODS


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Frozen):
    """At most so many examples of a data set, a seeded sample; None for all."""

    train: int | None = Field(default=None, ge=1)
    dev: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class SuiteConfig(_Frozen):
    """Which data: a suite, where it lies, and how much of it."""

    name: str = Field(description=f"one of {', '.join(SUITES)}")
    root: str | None = Field(
        default=None,
        description="the folder that holds the data sets; 'hub' or null: through the datasets library, where the "
        "suite can (GLUE)",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="of the suite")
    limits: Limits = Limits()
    sample_seed: int = Field(default=1, description="of the samples that the limits draw; the same for every cell")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}. {did_you_mean(name, SUITES)}")
        return name

    @field_validator("root")
    @classmethod
    def _hub(cls, root: str | None) -> str | None:
        return None if root == "hub" else root


class Pretrained(_Frozen):
    """The model that every contributor starts from."""

    model: str = Field(description="a folder, org/name@revision, or the name of a folder in resources_dir")
    title: str = Field(description="what tables call it")
    architecture: str | None = Field(
        default=None, description="its model_type, which chooses the published hyper-parameters before it is on disk"
    )


class StatisticsConfig(_Frozen):
    """How the statistics of a contributor are collected, on its training data."""

    examples: int | None = Field(default=16_000, ge=1, description="for Gram matrices and counts; None for all")
    fisher: Literal["expected", "empirical", "predicted"] = "expected"
    fisher_examples: int | None = Field(default=16_000, ge=1, description="for Fisher information; None for all")


class ModelArgs(_Frozen):
    """A contributor, or what all of them share (``default_model_args``)."""

    set: str | None = Field(default=None, description="its data set; by default the contributor's name")
    training: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters that differ from the published ones"
    )
    checkpoint: str | None = Field(default=None, description="a fine-tuned model to take instead of training one")
    load_from_zoo: Literal["maybe", "yes", "no"] = Field(
        default="maybe",
        description="maybe: train where the zoo has none; yes: fail where it has none; no: train anew, once for these "
        "results",
    )
    zoo_filter: dict[str, Any] = Field(
        default_factory=dict,
        description="take the zoo's newest model of this base, data set and seed with these entries in its key",
    )
    place: int | None = Field(
        default=None,
        ge=0,
        description="its number among all contributors, from 0, which its seed depends on; --filter-model keeps it",
    )

    @field_validator("load_from_zoo", mode="before")
    @classmethod
    def _unquoted(cls, value: Any) -> Any:
        """YAML reads an unquoted yes or no as a boolean."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


class Search(_Frozen):
    """Coefficients chosen on development data: a grid for two contributors, Dirichlet samples for more."""

    grid: int = Field(default=11, ge=2, description="points of the grid from 0 to 1")
    samples: int = Field(default=20, ge=1, description="Dirichlet samples, beside the uniform coefficients")


class Finetune(_Frozen):
    """Fine-tuning after the merge, on a sample of every contributor's training data."""

    examples: int = Field(default=100, ge=1, description="of each contributor")
    training: dict[str, Any] = Field(default_factory=dict)


class MethodConfig(_Frozen):
    """A merging method with its options, as one line of the result tables."""

    method: str
    title: str = Field(default="", description="what tables call it; must differ between entries of one method")
    options: dict[str, Any] = Field(default_factory=dict)
    exclude: tuple[str, ...] = Field(
        default=(), description="name patterns of tensors that are averaged instead, among those who vote on a row"
    )
    search: Search | None = None
    finetune: Finetune | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}. {did_you_mean(self.method, METHODS)}")
        METHODS[self.method].options_type.model_validate(self.options)
        return self

    @property
    def key(self) -> str:
        """What tells it from the others in result rows: ``regmean``, ``simple+search``, ``regmean+finetune``."""
        parts = [self.method, *(["search"] if self.search else []), *(["finetune"] if self.finetune else [])]
        return "+".join(parts) if not self.title else self.title

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.title or self.key


class Tests(_Frozen):
    """What the cells are scored on: always the contributors' own tests, and these."""

    out_of_domain: tuple[str, ...] = ()
    out_split: Literal["test", "all"] = Field(default="test", description="all: every split of these sets together")


class Partitions(_Frozen):
    """Parts of one data set, each of which makes a contributor (layout ``partitions``)."""

    parts: int = Field(default=2, ge=2)
    total: int = Field(default=2000, ge=2, description="examples of all parts together")
    iid: bool = False


class Resources(_Frozen):
    """What an engine reserves for each job."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="of training, statistics, merges and predictions; auto: a GPU where there is one"
    )
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    memory: str | None = Field(
        default=None, description="such as 8GB; by default an estimate from the pretrained model's size"
    )

    @field_validator("memory")
    @classmethod
    def _size(cls, memory: str | None) -> str | None:
        if memory is not None:
            try:
                parse_size(memory)
            except UserError as error:
                raise ValueError(error.what) from None
        return memory


Comparator = Literal["individual", "ensemble", "multitask"]
Heads = Literal["same", "different", "separate"]


class ExperimentConfig(_Frozen):
    """A grid: contributors × methods × seeds × head initialisation, scored on test sets."""

    name: str = Field(pattern=r"^[\w.-]+$", description="names the results' folder")
    description: str = ""
    suite: SuiteConfig
    pretrained: Pretrained
    resources_dir: str | None = Field(
        default=None, description="a folder in which pretrained models are looked for by their names"
    )
    local_zoo_dir: str | None = Field(default=None, description="the zoo, where --zoo names none")
    training: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters that differ from the published ones"
    )
    statistics: StatisticsConfig = StatisticsConfig()
    contributors: dict[str, ModelArgs] = Field(min_length=1)
    default_model_args: ModelArgs = ModelArgs()
    layout: Literal["pairs", "greedy", "all", "partitions"]
    partitions: Partitions = Partitions()
    heads: tuple[Heads, ...] = Field(default=("same",), min_length=1)
    order: Literal["computed"] | tuple[str, ...] = Field(
        default="computed", description="of the greedy merge; computed on development data, or the names in order"
    )
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    comparators: tuple[Comparator, ...] = ("individual",)
    seeds: tuple[int, ...] = Field((1,), min_length=1)
    tests: Tests = Tests()
    resources: Resources = Resources()
    batch_size: int = Field(default=32, ge=1, description="for predicting; changes speed only")
    bootstrap: int = Field(
        default=0, ge=0, description="samples of a test's examples for the standard error of its score; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for key in ("heads", "seeds", "comparators"):
            if key in value and not isinstance(value[key], list | tuple):
                value[key] = [value[key]]
        defaults = value.get("default_model_args") or {}
        listed = value.get("contributors")
        if isinstance(listed, list):
            listed = {str(name): {} for name in listed}
        if isinstance(listed, dict) and isinstance(defaults, dict):
            value["contributors"] = {name: _inherit(defaults, given) for name, given in listed.items()}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        keys = [method.key for method in self.methods]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two methods are called {_twice(keys)!r}: give them titles that differ")
        if self.layout in ("pairs", "greedy", "all") and len(self.contributors) < 2:
            raise ValueError(f"layout {self.layout!r} needs at least two contributors")
        if self.order != "computed" and set(self.order) != set(self.contributors):
            raise ValueError(f"order must name every contributor once: {', '.join(self.contributors)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        if "different" in self.heads and len(self.seeds) < 2:
            raise ValueError("different heads are those of other seeds: give at least two seeds")
        if "separate" in self.heads:
            self._check_separate()
        return self

    def _check_separate(self) -> None:
        """Refuse what has no meaning where each contributor's task has a head of its own."""
        if "ensemble" in self.comparators:
            raise ValueError(
                "an ensemble averages outputs of one task, and with heads: separate each contributor has a task of its "
                "own: leave ensemble out of comparators (individual scores each model by its own head)"
            )
        if self.tests.out_of_domain:
            raise ValueError(
                "with heads: separate no head is made for tests.out_of_domain: leave these tests out, or give "
                "heads: same"
            )
        if self.layout == "partitions":
            raise ValueError("the parts of one data set share its labels: give heads: same")

    def remarks(self) -> list[str]:
        """What is allowed and may not be meant."""
        found = []
        if "different" in self.heads and len(self.seeds) < len(self.contributors):
            found.append(
                f"{len(self.contributors)} contributors draw their heads from {len(self.seeds)} seeds: some start from "
                "the same head though heads are 'different'; give as many seeds as contributors to avoid it"
            )
        return found

    def set_of(self, contributor: str) -> str:
        """The data set of a contributor."""
        return self.contributors[contributor].set or contributor

    @property
    def ordered(self) -> dict[str, int]:
        """Contributors in the configuration's order, whatever order a filter names them in, with their places."""
        places = {
            name: number if args.place is None else args.place
            for number, (name, args) in enumerate(self.contributors.items())
        }
        return dict(sorted(places.items(), key=lambda item: item[1]))

    def method(self, key: str) -> MethodConfig:
        """The method of a merge cell."""
        return next(method for method in self.methods if method.key == key)


def _inherit(defaults: dict[str, Any], given: Any) -> Any:
    if given is None:
        given = {}
    if not isinstance(given, dict):
        return given
    training = {**(defaults.get("training") or {}), **(given.get("training") or {})}
    return {**defaults, **given, **({"training": training} if training else {})}


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def make_config(values: dict[str, Any], where: str) -> ExperimentConfig:
    """A validated configuration; every mistake names its file and key.

    Args:
        values: the merged files, templates filled in.
        where: the files, for messages.

    Raises:
        RecipeError: one mistake; several come as :class:`~merganser.errors.Problems`.
    """
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        problems: list[UserError] = []
        for entry in error.errors():
            place = ".".join(str(part) for part in entry["loc"])
            if entry["type"] == "extra_forbidden":
                what, mend = (f"unknown key {place!r}", did_you_mean(str(entry["loc"][-1]), _fields(entry["loc"])))
            elif entry["type"] == "missing":
                what, mend = f"{place!r} is missing", "give it in one of the files"
            else:
                what = f"{place}: {entry['msg'].removeprefix('Value error, ')}" if place else entry["msg"]
                mend = "correct the value"
            problems.append(RecipeError(what, where=where, mend=mend))
        raise_all(problems)
        raise  # not reached


def _fields(place: tuple[int | str, ...]) -> list[str]:
    """The valid keys at a place of the configuration."""
    model: Any = ExperimentConfig
    nested = {
        "suite": SuiteConfig, "limits": Limits, "pretrained": Pretrained, "statistics": StatisticsConfig,
        "contributors": ModelArgs, "default_model_args": ModelArgs, "methods": MethodConfig, "search": Search,
        "finetune": Finetune, "tests": Tests, "partitions": Partitions, "resources": Resources,
    }  # fmt: skip
    for part in place[:-1]:
        model = nested.get(str(part), model)
    return list(model.model_fields)


def localised(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with absolute paths, for workers that stand in another folder.

    A pretrained model that is no folder is looked for in ``resources_dir`` by its name, with and without its
    organisation: ``FacebookAI/roberta-base`` may be ``<resources_dir>/roberta-base``.
    """
    suite, pretrained = config.suite, config.pretrained
    if suite.root is not None:
        suite = suite.model_copy(update={"root": str(Path(suite.root).expanduser().resolve())})
    model = pretrained.model
    if config.resources_dir is not None and not Path(model).expanduser().is_dir():
        names = dict.fromkeys((model.partition("@")[0], Path(model.partition("@")[0]).name))
        places = [Path(config.resources_dir).expanduser() / name for name in names]
        model = next((str(place) for place in places if (place / "config.json").is_file()), model)
    pretrained = pretrained.model_copy(update={"model": _absolute(model)})
    people = {
        name: args.model_copy(update={"checkpoint": args.checkpoint and _absolute(args.checkpoint)})
        for name, args in config.contributors.items()
    }
    return config.model_copy(update={"suite": suite, "pretrained": pretrained, "contributors": people})


def _absolute(reference: str) -> str:
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else reference
