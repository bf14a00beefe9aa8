"""The recipe: what to merge and how. A YAML file and the command line's flags mean the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from merganser.errors import RecipeError, UserError, did_you_mean, raise_all, validated
from merganser.methods import METHODS


class Contributor(BaseModel):
    """A checkpoint that takes part in a merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="a model folder, or org/name@revision on the Hub")
    coefficient: float = Field(1.0, description="its weight in the merge, relative to the others'")
    statistics: str | None = Field(None, description="its statistics file; by default the one in its folder")
    labels: tuple[str, ...] | None = Field(None, description="the labels it votes on; by default all it knows")
    name: str | None = Field(None, description="what to call it; by default the folder's name")

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or Path(self.model.rsplit("@", 1)[0]).name


class Recipe(BaseModel):
    """A merge, as a value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contributors: tuple[Contributor, ...] = Field(description="the checkpoints to merge, at least one")
    method: str = Field("auto", description=f"auto, {', '.join(METHODS)}")
    base: str | None = Field(None, description="the pre-trained model that all of them started from")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    exclude: tuple[str, ...] = Field((), description="name patterns of tensors to average instead")
    keep_separate: tuple[str, ...] = Field((), description="name patterns of tensors that each contributor keeps")
    labels: Literal["same", "union"] = Field("same", description="union: a head that knows every label")
    vocabulary: Literal["same", "largest"] = Field(
        "same", description="largest: tokens appended by some contributors are taken from those"
    )
    dtype: Literal["F64", "F32", "F16", "BF16"] | None = Field(
        None, description="storage dtype of the result; by default the widest of the contributors'"
    )
    max_shard_size: str = Field("5GB", description="largest weight file")
    allow_pickle: bool = Field(False, description="accept pytorch_model.bin (read with weights_only=True)")

    @field_validator("contributors", mode="before")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"model": str(item)} if isinstance(item, (str, Path)) else item for item in value]
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict):
            lists = {k: [v] for k, v in value.items() if k in ("exclude", "keep_separate") and isinstance(v, str)}
            return {**value, **lists}
        return value


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, all mistakes reported at once.

    Raises:
        RecipeError: unknown or malformed keys, coefficients that are no weights, no contributor.
        Problems: several of these.
    """
    recipe = validated(Recipe, values, where)
    problems: list[UserError] = []
    if not recipe.contributors:
        problems.append(RecipeError("there is nothing to merge", where=where, mend="name at least one model"))
    coefficients = [contributor.coefficient for contributor in recipe.contributors]
    if not all(math.isfinite(c) for c in coefficients):
        problems.append(RecipeError(f"coefficients {coefficients} are not finite", where=where, mend="use numbers"))
    elif recipe.contributors and abs(sum(coefficients)) < 1e-12 * max(map(abs, coefficients), default=1.0) + 1e-300:
        problems.append(
            RecipeError(f"coefficients {coefficients} sum to zero", where=where, mend="give weights with another sum")
        )
    if recipe.method != "auto" and recipe.method not in METHODS:
        problems.append(
            RecipeError(
                f"unknown method {recipe.method!r}", where=where, mend=did_you_mean(recipe.method, [*METHODS, "auto"])
            )
        )
    raise_all(problems)
    return recipe


def load_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe file.

    Raises:
        RecipeError: see :func:`read_mapping`.
    """
    return read_mapping(path, "a recipe", "'contributors:' and 'method:'")


def read_mapping(path: Path, what: str, keys: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: of the file.
        what: it is, such as ``a recipe``.
        keys: some that it could have, for the mend.

    Raises:
        RecipeError: unreadable, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"unreadable: {reason}", where=path, mend="check the path") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}", where=path, mend="correct the file") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{what} is a mapping, this is {type(values).__name__}", where=path, mend=f"write keys such as {keys}"
        )
    return values


def method_options(recipe: Recipe, method: str, where: str = "recipe") -> Any:
    """The validated options of ``method``.

    Raises:
        RecipeError: an option that the method does not have, or a value that it cannot take.
    """
    return validated(METHODS[method].options_type, recipe.options, f"{where}: options of {method}")
