"""What an experiment's configuration may say. One configuration describes a whole grid.

The keys of the original's command line are kept where they make sense (``default_model_args``, ``load_from_zoo``,
``zoo_filter``); a contributor inherits every key of ``default_model_args`` that it does not set itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from merganser.errors import Problems, UserError, did_you_mean, validated
from merganser.files import parse_size
from merganser.lab.suites import SUITES
from merganser.methods import METHODS, Needs
from merganser.methods.auto import AUTO
from merganser.methods.names import suggest_method
from merganser.paths import expanded, real


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes
#: What a grid may have: more is a slip of the pen, and would be found by a machine that has no memory left.
MAX_SEEDS, MAX_CELLS, MAX_CANDIDATES, MAX_PARTS, MAX_SAMPLES = 1_000, 50_000, 10_001, 1_000, 1_000_000


class Limits(_Frozen):
    """At most so many examples of a data set, a seeded sample; None for all."""

    train: Count | None = None
    dev: Count | None = None
    test: Count | None = None


class SuiteConfig(_Frozen):
    """Which data: a suite, where it lies, and how much of it.

    Attributes:
        name: of the suite.
        root: the folder that holds the data sets; 'hub' or null: through the datasets library, where the suite can
            (GLUE).
        options: of the suite.
        sample_seed: of the samples that the limits draw; the same for every cell.
    """

    name: str
    root: str | None = None
    options: dict[str, Any] = {}
    limits: Limits = Limits()
    sample_seed: Seed = 1

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
    """The model that every contributor starts from.

    Attributes:
        model: a folder, org/name@revision, or the name of a folder in resources_dir.
        title: what tables call it.
        architecture: its model_type, which chooses the published hyper-parameters before it is on disk.
    """

    model: str
    title: str
    architecture: str | None = None


class StatisticsConfig(_Frozen):
    """How the statistics of a contributor are collected, on its training data.

    Attributes:
        examples: for Gram matrices and counts; None for all.
        fisher_examples: for Fisher information; None for all.
    """

    examples: Count | None = 16_000
    fisher: Literal["expected", "empirical", "predicted"] = "expected"
    fisher_examples: Count | None = 16_000


class ModelArgs(_Frozen):
    """A contributor, or what all of them share (``default_model_args``).

    Attributes:
        set: its data set; by default the contributor's name.
        training: hyper-parameters that differ from the published ones.
        checkpoint: a fine-tuned model to take instead of training one.
        load_from_zoo: maybe: train where the zoo has none; yes: fail where it has none; no: train anew, once for
            these results.
        zoo_filter: take the zoo's newest model of this base, data set and seed with these entries in its key.
        place: its number among all contributors, from 0, which its seed depends on; --filter-model keeps it.
    """

    set: str | None = None
    training: dict[str, Any] = {}
    checkpoint: str | None = None
    load_from_zoo: Literal["maybe", "yes", "no"] = "maybe"
    zoo_filter: dict[str, Any] = {}
    place: Annotated[int, Field(ge=0)] | None = None

    @field_validator("load_from_zoo", mode="before")
    @classmethod
    def _unquoted(cls, value: Any) -> Any:
        """YAML reads an unquoted yes or no as a boolean."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


class Search(_Frozen):
    """Coefficients chosen on development data: a grid for two contributors, Dirichlet samples for more.

    Attributes:
        grid: points of the grid from 0 to 1.
        samples: Dirichlet samples, beside the uniform coefficients.
    """

    grid: int = Field(default=11, ge=2, le=MAX_CANDIDATES)
    samples: int = Field(default=20, ge=1, le=MAX_CANDIDATES)


class Finetune(_Frozen):
    """Fine-tuning after the merge, on a sample of every contributor's training data.

    Attributes:
        examples: of each contributor.
    """

    examples: Count = 100
    training: dict[str, Any] = {}


Comparator = Literal["individual", "ensemble", "multitask"]
TITLES: dict[str, str] = {"individual": "Individual", "ensemble": "Ensemble", "multitask": "Multi-task"}


def check_title(title: str) -> None:
    """Refuse what tables call models that are not merged.

    Raises:
        ValueError: a method has the title of a comparator.
    """
    if title.casefold() in {*TITLES, *(known.casefold() for known in TITLES.values())}:
        raise ValueError(f"{title!r} is what tables call a comparator, not a merge: give the method another title")


class MethodConfig(_Frozen):
    """A merging method with its options, as one line of the result tables.

    Attributes:
        title: what tables call it; must differ between entries of one method.
        exclude: name patterns of tensors that are averaged instead, among those who vote on a row.
    """

    method: str
    title: str = ""
    options: dict[str, Any] = {}
    exclude: tuple[str, ...] = ()
    search: Search | None = None
    finetune: Finetune | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        if self.method == AUTO:
            raise ValueError("auto chooses one of the methods (merganser methods auto), and an experiment names them")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}. {suggest_method(self.method, METHODS)}")
        check_title(self.title)
        try:
            validated(METHODS[self.method].options_type, self.options, f"options of {self.method}")
        except Problems as error:
            raise ValueError("; ".join(f"{one.what} ({one.mend})" for one in error.problems)) from None
        except UserError as error:
            raise ValueError(f"{error.what} ({error.mend})") from None
        return self

    @property
    def needs(self) -> Needs:
        """What the method needs with these options: some options ask for the base model."""
        method = METHODS[self.method]
        return method.configured(method.options_type.model_validate(self.options)).needs

    @property
    def key(self) -> str:
        """What tells it from the others in result rows: its title, or the method with ``+search``, ``+finetune``."""
        more = ["search"] * bool(self.search) + ["finetune"] * bool(self.finetune)
        return self.title or "+".join([self.method, *more])


class Tests(_Frozen):
    """What the cells are scored on: always the contributors' own tests, and these.

    Attributes:
        split: dev: the contributors' development data instead of their tests, for whoever has something to choose.
        out_split: all: every split of these sets together.
    """

    split: Literal["test", "dev"] = "test"
    out_of_domain: tuple[str, ...] = ()
    out_split: Literal["test", "all"] = "test"

    @model_validator(mode="after")
    def _no_test_in_development(self) -> Tests:
        if self.split == "dev" and self.out_of_domain:
            raise ValueError("out_of_domain sets are tests: leave them out with split: dev")
        return self


class Partitions(_Frozen):
    """Parts of one data set, each of which makes a contributor (layout ``partitions``).

    Attributes:
        total: examples of all parts together.
    """

    parts: int = Field(default=2, ge=2, le=MAX_PARTS)
    total: int = Field(default=2000, ge=2)
    iid: bool = False


def _size(text: str) -> str:
    try:
        parse_size(text)
    except UserError as error:
        raise ValueError(error.what) from None
    return text


class Resources(_Frozen):
    """What an engine reserves for each job.

    Attributes:
        device: of training, statistics, merges and predictions; auto: a GPU where there is one.
        merge_devices: of merges, by method or ``"*"`` for any other, where it differs: many jobs that share a GPU
            merge small models faster on the processor, but for methods of heavy linear algebra.
        memory: such as 8GB; by default an estimate from the pretrained model's size.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    merge_devices: dict[str, Literal["cpu", "cuda"]] = {}
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    memory: Annotated[str, AfterValidator(_size)] | None = None


Heads = Literal["same", "different", "separate"]


class ExperimentConfig(_Frozen):
    """A grid: contributors × methods × seeds × head initialisation, scored on test sets.

    Attributes:
        name: names the results' folder.
        resources_dir: a folder in which pretrained models are looked for by their names.
        local_zoo_dir: the zoo, where --zoo names none.
        training: hyper-parameters that differ from the published ones.
        separate: name patterns of what each contributor keeps beside its head with ``heads: separate``, such as a
            pooler that nobody has pre-trained.
        order: of the greedy merge; computed on development data, or the names in order.
        keep_seeds: work on these of the seeds alone, as --filter-model does for contributors; none: on all.
        batch_size: for predicting; changes speed only.
        bootstrap: samples of a test's examples for the standard error of its score; 0: none.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""
    suite: SuiteConfig
    pretrained: Pretrained
    resources_dir: str | None = None
    local_zoo_dir: str | None = None
    training: dict[str, Any] = {}
    statistics: StatisticsConfig = StatisticsConfig()
    contributors: dict[str, ModelArgs] = Field(min_length=1)
    default_model_args: ModelArgs = ModelArgs()
    layout: Literal["pairs", "greedy", "all", "partitions"]
    partitions: Partitions = Partitions()
    heads: tuple[Heads, ...] = Field(default=("same",), min_length=1)
    separate: tuple[str, ...] = ()
    order: Literal["computed"] | tuple[str, ...] = "computed"
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    comparators: tuple[Comparator, ...] = ("individual",)
    seeds: tuple[Seed, ...] = Field((1,), min_length=1, max_length=MAX_SEEDS)
    keep_seeds: tuple[Seed, ...] = ()
    tests: Tests = Tests()
    resources: Resources = Resources()
    batch_size: Count = 32
    bootstrap: int = Field(default=0, ge=0, le=MAX_SAMPLES)

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for key in ("heads", "seeds", "comparators", "separate"):
            if key in value and not isinstance(value[key], list | tuple):
                value[key] = [value[key]]
        defaults, listed = value.get("default_model_args") or {}, as_mapping(value.get("contributors"))
        if isinstance(listed, dict) and isinstance(defaults, dict):
            value["contributors"] = {name: _inherit(defaults, given) for name, given in listed.items()}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        keys = [method.key for method in self.methods]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"two methods are called {twice!r}: give them titles that differ")
        if self.layout in ("pairs", "greedy", "all") and len(self.contributors) < 2:
            raise ValueError(f"layout {self.layout!r} needs at least two contributors")
        if self.order != "computed" and sorted(self.order) != sorted(self.contributors):
            raise ValueError(f"order must name every contributor once: {', '.join(self.contributors)}")
        if (cells := self._most_cells()) > MAX_CELLS:
            raise ValueError(f"the grid has up to {cells} cells, {MAX_CELLS} are accepted: give it less of something")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        if unknown := [seed for seed in self.keep_seeds if seed not in self.seeds]:
            raise ValueError(f"keep_seeds has {unknown[0]}, which is none of seeds: {', '.join(map(str, self.seeds))}")
        if "different" in self.heads and len(self.seeds) < 2:
            raise ValueError("different heads are those of other seeds: give at least two seeds")
        separate = "separate" in self.heads  # each contributor's task has a head of its own
        if separate and "ensemble" in self.comparators:
            raise ValueError(
                "an ensemble averages outputs of one task, and with heads: separate each contributor has a task of its "
                "own: leave ensemble out of comparators (individual scores each model by its own head)"
            )
        if separate and self.tests.out_of_domain:
            mend = "leave these tests out, or give heads: same"
            raise ValueError(f"with heads: separate no head is made for tests.out_of_domain: {mend}")
        if self.separate and not separate:
            raise ValueError("what is kept beside a separate head is given (separate), but heads: separate is not")
        if separate and self.layout == "partitions":
            raise ValueError("the parts of one data set share its labels: give heads: same")
        return self

    def _most_cells(self) -> int:
        """The number of cells, each individual model counted once for each group that it is in."""
        people = len(self.contributors)
        groups, largest = {
            "pairs": (people * (people - 1) // 2, 2),
            "greedy": (people - 1, people),
            "all": (1, people),
            "partitions": (people, self.partitions.parts),
        }[self.layout]
        return groups * (largest + len(self.comparators) + len(self.methods)) * len(self.heads) * len(self.seeds)

    def remarks(self) -> list[str]:
        """What is allowed and may not be meant."""
        if "different" not in self.heads or len(self.seeds) >= len(self.contributors):
            return []
        return [
            f"{len(self.contributors)} contributors draw their heads from {len(self.seeds)} seeds: some start from the "
            "same head though heads are 'different'; give as many seeds as contributors to avoid it"
        ]

    def set_of(self, contributor: str) -> str:
        """The data set of a contributor."""
        return self.contributors[contributor].set or contributor

    @property
    def ordered(self) -> dict[str, int]:
        """Contributors in the configuration's order, whatever order a filter names them in, with their places."""
        people = enumerate(self.contributors.items())
        places = {name: number if args.place is None else args.place for number, (name, args) in people}
        return dict(sorted(places.items(), key=lambda item: item[1]))

    def method(self, key: str) -> MethodConfig:
        """The method of a merge cell."""
        return next(method for method in self.methods if method.key == key)


def as_mapping(contributors: Any) -> Any:
    """Contributors that are listed, by name or as mappings with a ``name``, as a mapping; anything else as it is."""
    if not isinstance(contributors, list):
        return contributors
    found: dict[str, Any] = {}
    for one in contributors:
        own = dict(one) if isinstance(one, dict) and isinstance(one.get("name"), str) else {"name": str(one)}
        found[own.pop("name")] = own
    return found


def _inherit(defaults: dict[str, Any], given: Any) -> Any:
    if not isinstance(given, dict | None):
        return given
    training = {**(defaults.get("training") or {}), **((given or {}).get("training") or {})}
    return {**defaults, **(given or {}), **({"training": training} if training else {})}


def make_config(values: dict[str, Any], where: str) -> ExperimentConfig:
    """A validated configuration; every mistake names its file and key.

    Args:
        values: the merged files, templates filled in.
        where: the files, for messages.

    Raises:
        RecipeError: one mistake; several come as :class:`~merganser.errors.Problems`.
    """
    return validated(ExperimentConfig, values, where)


def localised(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with absolute paths, for workers that stand in another folder.

    A pretrained model that is no folder is looked for in ``resources_dir`` by its name, with and without its
    organisation: ``FacebookAI/roberta-base`` may be ``<resources_dir>/roberta-base``.
    """
    suite, pretrained = config.suite, config.pretrained
    if suite.root is not None:
        suite = suite.model_copy(update={"root": str(real(expanded(suite.root)))})
    model = pretrained.model
    if config.resources_dir is not None and not expanded(model).is_dir():
        names = dict.fromkeys((model.partition("@")[0], Path(model.partition("@")[0]).name))
        places = [expanded(config.resources_dir) / name for name in names]
        model = next((str(place) for place in places if (place / "config.json").is_file()), model)
    pretrained = pretrained.model_copy(update={"model": _absolute(model)})
    people = {
        name: args.model_copy(update={"checkpoint": args.checkpoint and _absolute(args.checkpoint)})
        for name, args in config.contributors.items()
    }
    return config.model_copy(update={"suite": suite, "pretrained": pretrained, "contributors": people})


def _absolute(reference: str) -> str:
    path = expanded(reference)
    return str(real(path)) if path.exists() else reference
