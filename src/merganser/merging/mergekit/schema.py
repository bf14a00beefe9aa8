"""mergekit's configuration format (mergekit 0.1.5), read strictly: every key of it, and no other.

mergekit itself skips keys that it does not know, and parameters that its method does not take. Here an unknown key is
an error that names the nearest valid one; a parameter of another method is told of (see
:mod:`merganser.merging.mergekit.methods`).
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from merganser.errors import RecipeError, validated
from merganser.merging.mergekit.methods import KNOWN_PARAMETERS
from merganser.merging.recipe import MOST_PADDING, Recipe

RECOGNISED_BY = "merge_method"  # the key that every such configuration has, and no recipe of ours


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Condition(_Strict):
    """A value for the tensors whose names contain a text; None, ``*`` and the empty text are in every name."""

    value: Any
    filter: str | None = None

    @field_validator("value")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """A scalar, or a gradient as a tuple of them."""
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(one, (bool, int, float, str)) for one in values):
            raise ValueError("a value is a number, true, false or a text, or a list of them, one or more")
        return tuple(value) if isinstance(value, list) else value

    @property
    def holds_always(self) -> bool:
        """Whether it holds for every tensor."""
        return self.filter in (None, "*", "")


#: What a parameter is set to: of several conditions the first one that holds for a tensor counts.
Setting: TypeAlias = tuple[Condition, ...]
Parameters: TypeAlias = dict[str, Setting]


class _Configurable(_Strict):
    """A place that parameters can be set at."""

    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _settings(cls, values: Any) -> Any:
        """Every setting as conditions: a plain value is one that always holds."""
        if not isinstance(values, dict):
            return values
        if outside := [key for key in values if key in KNOWN_PARAMETERS]:
            written = ", ".join(f"{key}: {json.dumps(values[key], default=str)}" for key in outside)
            raise ValueError(f"not under parameters: {', '.join(outside)}; write parameters: {{{written}}}")
        if not isinstance(values.get("parameters"), dict):
            return {key: value for key, value in values.items() if not (key == "parameters" and value is None)}
        return {**values, "parameters": {key: _conditions(one) for key, one in values["parameters"].items()}}


def _is(values: Any) -> bool:
    return isinstance(values, dict)


def _conditions(setting: Any) -> Any:
    if isinstance(setting, dict):
        return (setting,)
    if isinstance(setting, list) and any(isinstance(one, dict) for one in setting):
        return tuple(one if isinstance(one, dict) else {"value": one} for one in setting)
    return ({"value": setting},)


class ModelInput(_Configurable):
    """A whole model."""

    model: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return with_references(values, "model")


class SliceInput(ModelInput):
    """Some layers of a model: from the first of ``layer_range`` to before the second."""

    layer_range: tuple[int, int]


class Slice(_Configurable):
    """Layers of the result, one behind the other, each merged from one layer of every source."""

    sources: tuple[SliceInput, ...] = Field(min_length=1)
    base_model: str | None = None
    residual_weight: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return with_references(values, "base_model")


class Module(_Configurable):
    """A part of a model with layers of its own, such as the text decoder of a vision-language model."""

    slices: tuple[Slice, ...] = ()
    models: tuple[ModelInput, ...] = ()


class TokenOfModel(_Strict):
    """The embedding of one token of a model, by its text or its id."""

    kind: Literal["model_token"]
    model: str
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return with_references(values, "model")

    @model_validator(mode="after")
    def _either(self) -> TokenOfModel:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give token or token_id, and not both")
        return self


class Zero(_Strict):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenSource(_Strict):
    """Where a token's row comes from in models that lack it, or with ``force`` in all of them."""

    source: TokenOfModel | Zero | str | None = None
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _told_apart(cls, values: Any) -> Any:
        """A mapping with ``kind`` is a token or zero, one without is a model."""
        source = values.get("source") if isinstance(values, dict) else None
        if not isinstance(source, dict):
            return values
        kinds: dict[Any, type[_Strict]] = {"model_token": TokenOfModel, "zero": Zero}
        if "kind" not in source:
            return with_references(values, "source")
        if not isinstance(source["kind"], str) or source["kind"] not in kinds:
            raise ValueError(f"the kind of a source is {' or '.join(kinds)}, not {source['kind']!r}")
        return {**values, "source": kinds[source["kind"]].model_validate(source)}


class Tokenizer(_Strict):
    """The tokens of the result, and where their rows come from."""

    source: str = "union"
    tokens: dict[str, TokenSource] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(None, ge=1, le=MOST_PADDING)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        values = with_references(values, "source")
        return {key: value for key, value in values.items() if value is not None} if _is(values) else values


class Configuration(_Configurable):
    """A whole merge."""

    merge_method: str
    models: tuple[ModelInput, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: dict[str, Module] = Field(default_factory=dict)
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = Field(None, description="of a stage of several, which later ones can use as a model")
    out_path: str | None = Field(None, description="the older way to name a stage: the folder that it is written to")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """An empty key is as good as none."""
        values = with_references(values, "base_model", "tokenizer_source")
        return {key: value for key, value in values.items() if value is not None} if _is(values) else values


def is_mergekit(values: Any) -> bool:
    """Whether these values are a configuration of mergekit, by its keys; what has keys of our recipes is none."""
    if not isinstance(values, dict) or set(values) & (set(Recipe.model_fields) - set(Configuration.model_fields)):
        return False
    return RECOGNISED_BY in values or any(key in values for key in ("models", "slices", "modules", "base_model"))


def read_configuration(values: dict[str, Any], where: str) -> Configuration:
    """A configuration from the values of a YAML document.

    Args:
        values: of the document.
        where: it stands, for errors.

    Raises:
        RecipeError: an unknown, missing or malformed key, with the nearest valid one; several as ``Problems``.
    """
    if "experts" in values and RECOGNISED_BY not in values:
        what, mend = "this is a configuration of mergekit-moe, a mixture of experts", "merganser moe FILE -o FOLDER"
        raise RecipeError(what, where=where, mend=mend)
    configuration = validated(Configuration, values, where)
    given = [key for key in ("models", "slices", "modules") if getattr(configuration, key)]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "there is nothing to merge"
        raise RecipeError(what, where=where, mend="give exactly one of models, slices and modules")
    if configuration.tokenizer_source and configuration.tokenizer:
        what = "tokenizer_source and tokenizer are both given"
        raise RecipeError(what, where=where, mend="leave out tokenizer_source: tokenizer: {source: …} says the same")
    for name, module in configuration.modules.items():
        if bool(module.models) == bool(module.slices):
            mend = "give exactly one of models and slices in it"
            raise RecipeError(f"modules.{name} has models and slices, or neither", where=where, mend=mend)
    return configuration


def with_references(values: Any, *keys: str) -> Any:
    """References to models as one text each, where they are written as mappings (``model: {path, revision}``).

    Raises:
        ValueError: a mapping that is no such reference, or asks for another architecture than the model's own.
    """
    if not isinstance(values, dict):
        return values
    return {key: reference(value) if key in keys else value for key, value in values.items()}


def reference(value: Any) -> Any:
    """``model``, ``model@revision`` or ``model+adapter`` of what a configuration says in either way."""
    if not isinstance(value, dict):
        return value
    if value.get("override_architecture") is not None:
        raise ValueError(
            "override_architecture opens a model as what it is not: leave it out, and mend its config.json"
        )
    parts = [value] if "path" in value else [value.get("model"), value.get("lora")]
    unknown = set(value) - {"path", "revision", "model", "lora", "override_architecture"}
    if unknown or parts[0] is None:
        raise ValueError(f"a model is a text, or has the keys model and lora: {', '.join(map(str, value))}")
    return "+".join(_path(part) for part in parts if part is not None)


def _path(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("path"), str) or set(part) - {"path", "revision"}:
        raise ValueError("a model is a text, or has the keys path and revision")
    return part["path"] + (f"@{part['revision']}" if part.get("revision") else "")
