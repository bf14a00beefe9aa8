"""The recipe: what to merge and how. A YAML file and the command line's flags mean the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from merganser.documents import read_yaml
from merganser.errors import ErrorCollector, RecipeError, UserError, did_you_mean, raise_all, validated
from merganser.methods import IN_TURN, METHODS
from merganser.methods.auto import AUTO
from merganser.methods.base import LARGEST
from merganser.methods.names import KEYS_ELSEWHERE, name_here, suggest_method
from merganser.paths import expanded, path_as_text

MOST_PADDING = 2**16  # rows that are added at most
_LISTS = ("exclude", "keep_separate", "tensors", "role")  # keys under which one text is a list of one


def _number_or_gradient(value: Any) -> Any:
    """A number, or a list of them as a tuple; anything else is refused in one sentence."""
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError("an empty list has nothing to interpolate")
    try:
        if isinstance(value, bool):
            raise TypeError
        return tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)
    except (TypeError, ValueError):
        raise ValueError("give a number, or a list of numbers to interpolate over the layers") from None
    except OverflowError:
        raise ValueError(f"is beyond {LARGEST:g}, which float32 sums cannot hold") from None


#: One number, or several that are interpolated over the depth of the model.
Coefficient: TypeAlias = Annotated[float | tuple[float, ...], BeforeValidator(_number_or_gradient)]

#: A path or the name of a model, which Python may give as a ``Path``.
PathText: TypeAlias = Annotated[str, BeforeValidator(path_as_text)]


class _Part(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {**value, **{k: [v] for k, v in value.items() if k in _LISTS and isinstance(v, str)}}
        return value


class Contributor(_Part):
    """A checkpoint that takes part in a merge."""

    model: PathText = Field(description="a model folder, or org/name@revision on the Hub")
    coefficient: Coefficient = Field(1.0, description="its weight, relative to the others'; a list: over the layers")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's options, as they are for it alone")
    statistics: PathText | None = Field(None, description="its statistics file; by default the one in its folder")
    labels: tuple[str, ...] | None = Field(None, description="the labels it votes on; by default all it knows")
    name: str | None = Field(None, description="what to call it; by default the folder's name")

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or Path(self.model.rsplit("@", 1)[0]).name

    @property
    def single_coefficient(self) -> float:
        """Its coefficient; of several over the depth, their mean."""
        found = self.coefficient
        return math.fsum(found) / len(found) if isinstance(found, tuple) else found


class OwnSettings(_Part):
    """What a rule says of one contributor."""

    coefficient: Coefficient | None = Field(None, description="instead of the contributor's")
    options: dict[str, Any] = Field(default_factory=dict, description="as they are for this contributor alone")


class Rule(_Part):
    """What is done with some of the tensors; of several rules that set one key for a tensor, the first counts."""

    tensors: tuple[str, ...] = Field((), description="name patterns, of which a tensor has to match one")
    role: tuple[str, ...] = Field((), description="roles such as attention or mlp, of which it has to have one")
    method: str | None = Field(None, description="instead of the recipe's; its options start from their defaults")
    options: dict[str, Any] = Field(default_factory=dict, description="of the method")
    contributors: dict[str, OwnSettings] = Field(default_factory=dict, description="by name")
    take: str | None = Field(None, description="the model whose tensor is taken as it is: a name, or base")
    optional: bool = Field(False, description="it may match no tensor, which is a mistake otherwise")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.take is not None and (self.method is not None or self.options or self.contributors):
            raise ValueError("what is taken as it is has no method, options or contributors: leave these or take out")
        if self.take is None and self.method is None and not self.options and not self.contributors:
            raise ValueError("says nothing: give method, options, contributors or take")
        return self

    @property
    def settings(self) -> Mapping[str, OwnSettings]:
        """What it says of single models, by their names."""
        return self.contributors

    @property
    def named(self) -> list[str]:
        """The models that it names."""
        return [*self.contributors, *([] if self.take is None else [self.take])]

    def __str__(self) -> str:
        parts = [", ".join(self.tensors)] if self.tensors else []
        parts += [f"role {', '.join(self.role)}"] if self.role else []
        return " and ".join(parts) or "every tensor"


class LayerSource(OwnSettings):
    """Layers of one contributor."""

    contributor: str = Field(description="its name, or base")
    range: tuple[int, int] = Field(description="of its layers, from 0: the first, and the one behind the last")

    @field_validator("range")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("give the first layer, from 0, and the one behind the last")
        return value


class LayerBlock(_Part):
    """Some of the result's layers: those of one model, or those that several models' layers are merged into."""

    sources: tuple[LayerSource, ...] = Field(min_length=1, description="of equally many layers each")
    stack: str | None = Field(None, description="where a model has several stacks of layers, the one that is meant")
    method: str | None = Field(None, description="of several sources; one source's layers are taken as they are")
    options: dict[str, Any] = Field(default_factory=dict, description="of the method")
    rules: tuple[Rule, ...] = Field((), description="like the recipe's, for these layers, before them")

    @property
    def settings(self) -> Mapping[str, OwnSettings]:
        """What it says of single models, by their names."""
        return {source.contributor: source for source in self.sources}

    @property
    def named(self) -> list[str]:
        """The models that it names."""
        return [*self.settings]

    @property
    def size(self) -> int:
        """How many layers it is."""
        start, stop = self.sources[0].range
        return stop - start

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len({source.range[1] - source.range[0] for source in self.sources}) > 1:
            listed = ", ".join(f"{one.contributor} {one.range[1] - one.range[0]}" for one in self.sources)
            raise ValueError(f"sources of different length cannot be merged layer by layer: {listed}")
        own = self.sources[0]
        alone = len(self.sources) == 1 and self.method is None and not self.rules
        if alone and (self.options or own.options or own.coefficient is not None):
            raise ValueError("the layers of one source are taken as they are: give a method too")
        names = [source.contributor for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice!r} stands here twice: list the model twice among the contributors, by two names")
        return self


class TokenRow(_Part):
    """Where the row of one token comes from."""

    take: str | None = Field(None, description="a contributor's name, or base")
    token: str | None = Field(None, description="that model's row of this other token")
    id: int | None = Field(None, ge=0, description="that model's row of this number")
    zero: bool = Field(False, description="a row of zeros")
    force: bool = Field(False, description="also for contributors that know the token themselves")


class Recipe(_Part):
    """A merge, as a value."""

    contributors: tuple[Contributor, ...] = Field(description="the checkpoints to merge, at least one")
    method: str = Field(AUTO, description=f"auto, {', '.join(METHODS)}")
    base: PathText | None = Field(None, description="the pre-trained model that all of them started from")
    without_base: bool = Field(
        False, description="merge LoRA adapters with one another; their base is not read, and `base` only names it"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    rules: tuple[Rule, ...] = Field((), description="what is done otherwise with some of the tensors")
    layers: tuple[LayerBlock, ...] = Field((), description="the result's layers, in order: stacked, skipped, repeated")
    exclude: tuple[str, ...] = Field((), description="name patterns of tensors to average instead")
    keep_separate: tuple[str, ...] = Field((), description="name patterns of tensors that each contributor keeps")
    labels: Literal["same", "union"] = Field("same", description="union: a head that knows every label")
    vocabulary: Literal["same", "largest", "union", "tokenizer"] = Field(
        "same",
        description="largest: that of the contributor that has every token; union: every token of any of them; "
        "tokenizer: the tokens of the tokenizer that is written, and no others",
    )
    missing_rows: str = Field(
        "mean", description="whose row a token has that not every model knows: mean (of those that do), base, or a name"
    )
    fill_missing_rows: bool = Field(
        False, description="models that do not know a token vote on its row, too, as if they had that row"
    )
    tokens: dict[str, TokenRow] = Field(default_factory=dict, description="where the rows of some tokens come from")
    pad_to_multiple_of: int | None = Field(
        None, ge=1, le=MOST_PADDING, description="of which the number of tokens' rows is a multiple"
    )
    config_from: str | None = Field(None, description="whose configuration is written where they differ, or base")
    tokenizer_from: str | None = Field(None, description="whose tokenizer, chat template and generation settings")
    chat_template: str | None = Field(
        None, description="a model's name, base, auto (the most frequent one), or the template itself"
    )
    dtype: Literal["F64", "F32", "F16", "BF16"] | None = Field(
        None, description="storage dtype of the result; by default the widest of the contributors'"
    )
    computation: Literal["F64", "F32"] | None = Field(
        None, description="dtype to compute in; by default F32, and F64 where a tensor is stored so"
    )
    names: Literal["first", "canonical"] = Field(
        "first", description="of the result's tensors: the first contributor's, or those that transformers would save"
    )
    require_coverage: float | None = Field(
        None, ge=0, le=1, description="the share of the linear weights that the method has to reach"
    )
    max_shard_size: str = Field("5GB", description="largest weight file")
    accept_scales: bool = Field(
        False, description="merge statistics of another size than the others', of which one decides alone"
    )

    @field_validator("contributors", mode="before")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"model": str(item)} if isinstance(item, (str, Path)) else item for item in value]
        return value

    def places(self) -> Iterator[tuple[str, Rule | LayerBlock]]:
        """The rules and blocks of layers, each with where it stands."""
        for number, rule in enumerate(self.rules):
            yield f"rules.{number}", rule
        for number, block in enumerate(self.layers):
            yield f"layers.{number}", block
            for inner, rule in enumerate(block.rules):
                yield f"layers.{number}.rules.{inner}", rule

    def coefficients(self) -> Iterator[Coefficient]:
        """All that are given, those of rules and layers too."""
        yield from (contributor.coefficient for contributor in self.contributors)
        for _, place in self.places():
            yield from (own.coefficient for own in place.settings.values() if own.coefficient is not None)


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, all mistakes reported at once.

    Raises:
        RecipeError: unknown or malformed keys, coefficients that are no weights, no contributor, names of methods or
            of contributors that are none.
        Problems: several of these.
    """
    problems = ErrorCollector()
    if isinstance(values, dict) and "allow_pickle" in values:
        what = "a file cannot allow pickled weights: only who runs the merge can"
        problems.add(
            RecipeError(what, where=where, mend="leave out allow_pickle; if you trust the files, --allow-pickle")
        )
        values = {key: value for key, value in values.items() if key != "allow_pickle"}
    recipe = problems.catch(validated, Recipe, values, where, called=KEYS_ELSEWHERE)
    if recipe is None:
        raise_all(problems.found)
        raise RuntimeError("what is no recipe has a problem")
    if not recipe.contributors:
        problems.add(RecipeError("there is nothing to merge", where=where, mend="name at least one model"))
    flat = [n for one in recipe.coefficients() for n in (one if isinstance(one, tuple) else (one,))]
    problems.add(*coefficient_problems(flat, where))
    if recipe.method != AUTO and recipe.method not in METHODS:
        problems.add(unknown_method(recipe.method, where, [AUTO]))
    problems.add(*_place_problems(recipe, where))
    if recipe.base is not None:  # which may be one of the contributors, by its name
        named = {one.name: one.model for one in recipe.contributors if one.name is not None}
        recipe = recipe.model_copy(update={"base": named.get(recipe.base, recipe.base)})
    problems.add(*_name_problems(recipe, where))
    problems.raise_all()
    return recipe


def unknown_method(name: str, where: str, others: Sequence[str] = ()) -> RecipeError:
    """The mistake of a method that is none, with the nearest that is one, or what it is called here."""
    if name == AUTO:
        what = "auto chooses one method for the whole merge, by what all contributors bring, and none for a part of it"
        mend = "name the method that is meant here; merganser methods auto says which is best for what"
        return RecipeError(what, where=where, mend=mend)
    if (found := name_here(name, IN_TURN)) is not None:
        what = f"{found} merges layer after layer, with texts of every model at hand, and is no part of a plan"
        return RecipeError(what, where=where, mend=f"merganser merge MODEL… --method {found} --data FILE --data FILE")
    return RecipeError(f"unknown method {name!r}", where=where, mend=suggest_method(name, METHODS, others))


def _name_problems(recipe: Recipe, where: str) -> Iterator[UserError]:
    """Names that were given to two contributors, so that nobody could say whom they mean."""
    names = [one.name for one in recipe.contributors if one.name is not None]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield RecipeError(f"two contributors are called {name!r}", where=where, mend="give each a name of its own")


def _place_problems(recipe: Recipe, where: str) -> Iterator[UserError]:
    """Methods and contributors that rules and blocks of layers name and that do not exist."""
    titles = list(dict.fromkeys(contributor.title for contributor in recipe.contributors))
    people = {*titles, *(contributor.model for contributor in recipe.contributors)}
    known = people | {"base"}
    for place, part in recipe.places():
        if part.method is not None and part.method not in METHODS:
            yield unknown_method(part.method, f"{where}: {place}")
        for name in part.named:
            if name not in known:
                what, mend = f"no contributor is called {name!r}", did_you_mean(name, [*titles, "base"])
                yield RecipeError(what, where=f"{where}: {place}", mend=mend)
        said = part.settings.get("base")
        if said is not None and "base" not in people and (said.coefficient is not None or said.options):
            what = "the base is no contributor, so that it has no coefficient and no options of its own"
            yield RecipeError(what, where=f"{where}: {place}", mend="leave them out, or list it among the contributors")


def coefficient_problems(coefficients: Sequence[float], where: str) -> Iterator[UserError]:
    """Coefficients that are no numbers, or that float32 sums of what they multiply cannot hold."""
    for coefficient in coefficients:
        if not math.isfinite(coefficient):
            what = f"coefficients {listed_coefficients(coefficients)} are not finite"
            yield RecipeError(what, where=where, mend=f"use numbers of at most {LARGEST:g}")
            return
        if coefficient and not 1 / LARGEST <= abs(coefficient) <= LARGEST:
            what = f"the coefficient {coefficient:g} is not between {1 / LARGEST:g} and {LARGEST:g}, nor 0"
            mend = "divide all of them by the largest: an average counts their ratios; give 0 for next to nothing"
            yield RecipeError(what, where=where, mend=mend)


def listed_coefficients(coefficients: Sequence[float]) -> str:
    """Some coefficients, for a message."""
    shown = ", ".join(f"{one:g}" for one in coefficients[:8])
    return f"[{shown}{', …' if len(coefficients) > 8 else ''}]"


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The values of a recipe file.

    Raises:
        RecipeError: see :func:`read_mapping`.
        UserError: an object that is no path.
    """
    return read_mapping(expanded(path), "a recipe", "'contributors:' and 'method:'")


def read_mapping(path: Path, what: str, keys: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: of the file.
        what: it is, such as ``a recipe``.
        keys: some that it could have, for the mend.

    Raises:
        RecipeError: unreadable, not YAML, refused (see :func:`merganser.documents.parse_yaml`), or not a mapping.
    """
    values = read_yaml(path, RecipeError)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{what} is a mapping, this is {type(values).__name__}", where=path, mend=f"write keys such as {keys}"
        )
    return values


def method_options(recipe: Recipe, method: str, where: str = "recipe") -> Any:
    """The validated options of ``method``, of gradients what the first layer gets.

    Raises:
        RecipeError: an option that the method does not have, or a value that it cannot take.
    """
    kind, place = METHODS[method].options_type, f"{where}: options of {method}"
    gradients = {key: value for key, value in recipe.options.items() if isinstance(value, (list, tuple))}
    problems = ErrorCollector()
    for key, values in gradients.items():
        if not values:
            problems.add(RecipeError(f"{key}: an empty list has nothing to interpolate", where=place))
        for value in values:
            problems.catch(validated, kind, {**recipe.options, **_firsts(gradients), key: value}, place)
    problems.raise_all()
    return validated(kind, {**recipe.options, **_firsts(gradients)}, place, called=KEYS_ELSEWHERE)


def _firsts(gradients: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {key: values[0] for key, values in gradients.items() if values}


def recorded_options(recipe: Recipe, method: str) -> dict[str, Any]:
    """All options of ``method`` as they are written down: gradients as they are, and defaults spelled out.

    Raises:
        RecipeError: see :func:`method_options`.
    """
    gradients = {key: list(value) for key, value in recipe.options.items() if isinstance(value, (list, tuple))}
    return {**method_options(recipe, method).model_dump(mode="json"), **gradients}
