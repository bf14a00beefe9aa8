"""What a mixture of experts is made of: the values that mergekit-moe reads from YAML, checked.

base_model: mistralai/Mistral-7B-v0.1
gate_mode: hidden
experts:
  - source_model: models/code
    positive_prompts: ["Write a function that"]
  - source_model: models/prose
    positive_prompts: ["Once upon a time"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from merganser.errors import ErrorCollector, RecipeError, UserError, validated
from merganser.merging.recipe import read_mapping
from merganser.paths import path_as_text

RANDOM = ("random", "uniform_random")
_KEYS = "'base_model:', 'gate_mode:' and 'experts:'"
#: How mergekit, following torch, calls dtypes.
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LARGEST_SCALE = 1e6


def _reference(value: Any) -> Any:
    """A model as one text; mergekit may also write it as a mapping of path, revision and adapter."""
    if not isinstance(value, Mapping):
        return path_as_text(value)
    text = _placed(value.get("model"))
    return f"{text}+{_placed(value['lora'])}" if value.get("lora") else text


def _placed(value: Any) -> Any:
    """A path with its revision."""
    if isinstance(value, Mapping):
        return f"{value.get('path')}@{value['revision']}" if value.get("revision") else value.get("path")
    return value


def _tuple(value: Any) -> Any:
    """No list stands for an empty one."""
    return () if value is None else value


def _prompts(value: Any) -> Any:
    """One text stands for a list of one."""
    return (value,) if isinstance(value, str) else _tuple(value)


Reference = Annotated[str, BeforeValidator(_reference), Field(min_length=1)]
Prompts = Annotated[tuple[str, ...], BeforeValidator(_prompts)]


class Expert(BaseModel):
    """A model whose feed-forward blocks become one expert of each layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source_model: Reference = Field(description="a model folder, org/name@revision on the Hub, or base+adapter")
    positive_prompts: Prompts = Field((), description="texts that are to reach this expert")
    negative_prompts: Prompts = Field((), description="texts that are not")
    noise_scale: float | None = Field(
        None, ge=0, le=_LARGEST_SCALE, description="standard deviation of noise that is added to its weights"
    )
    residual_scale: float | None = Field(
        None, ge=-_LARGEST_SCALE, le=_LARGEST_SCALE, description="factor of what it adds to the residual stream"
    )


class MoeConfig(BaseModel):
    """A mixture of experts, as a value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: Reference = Field(description="whose embeddings, attention, norms, head and tokenizer the result has")
    experts: Annotated[tuple[Expert, ...], Field(min_length=1)] = Field(description="in their order")
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = Field(
        "hidden", description="what the routers are made of"
    )
    dtype: Literal["F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"] | None = Field(
        None, description="storage dtype of the result; by default the base model's"
    )
    experts_per_token: int = Field(2, ge=1, description="how many experts work on each token")
    shared_experts: Annotated[tuple[Expert, ...], BeforeValidator(_tuple)] = Field(
        (), description="experts that work on every token"
    )
    architecture: str | None = Field(None, description="of the result: mixtral, qwen or qwen3; by default what fits")
    seed: int = Field(0, ge=0, lt=2**63, description="of random routers and of noise")

    @property
    def storage(self) -> str | None:
        """The storage dtype by its name in safetensors files."""
        return None if self.dtype is None else _DTYPES.get(self.dtype, self.dtype)

    @property
    def everyone(self) -> tuple[Expert, ...]:
        """The experts, and the shared ones behind them."""
        return (*self.experts, *self.shared_experts)


def load_config(path: Path) -> dict[str, Any]:
    """The values of a file.

    Raises:
        RecipeError: unreadable, not YAML, or not a mapping.
    """
    return read_mapping(path, "a mixture of experts", _KEYS)


def make_config(values: Mapping[str, Any], where: str = "mixture of experts", *, allow_same: bool = False) -> MoeConfig:
    """A mixture of experts from plain values, all mistakes reported at once.

    Args:
        values: as the YAML file has them.
        where: it, for messages.
        allow_same: all experts may be one model, which is of use where the result is trained afterwards.

    Raises:
        RecipeError: one mistake; several come as ``Problems``.
    """
    config = validated(MoeConfig, dict(values) if isinstance(values, Mapping) else values, where)
    problems = ErrorCollector()
    problems.add(*_problems(config, where, allow_same))
    problems.raise_all()
    return config


def _problems(config: MoeConfig, where: str, allow_same: bool) -> Iterator[UserError]:
    """What holds between the values."""
    if config.experts_per_token > len(config.experts):
        what = f"experts_per_token is {config.experts_per_token}, and there are {len(config.experts)} experts"
        yield RecipeError(what, where=where, mend="name more experts, or let fewer work on each token")
    if config.gate_mode in RANDOM:
        return
    silent = [expert.source_model for expert in config.everyone if not expert.positive_prompts]
    if silent:
        what = f"gate_mode {config.gate_mode} makes routers of prompts, and these have none: {', '.join(silent)}"
        yield RecipeError(what, where=where, mend="give each its positive_prompts, or choose gate_mode: random")
    empty = [one for expert in config.everyone for one in (*expert.positive_prompts, *expert.negative_prompts)]
    if any(not prompt.strip() for prompt in empty):
        yield RecipeError("a prompt is empty", where=where, mend="leave it out, or write a text")
    texts = {(expert.positive_prompts, expert.negative_prompts) for expert in config.experts}
    if len(config.experts) > 1 and len(texts) == 1 and not silent:
        what = "all experts have the same prompts, so that no router can tell them apart"
        yield RecipeError(what, where=where, mend="give each expert prompts of its own, or choose gate_mode: random")
    if len(config.experts) > 1 and len({one.source_model for one in config.experts}) == 1 and not allow_same:
        what = "all experts are one model, so that the result computes what that model computes, at a higher price"
        yield RecipeError(what, where=where, mend="name several models; to train the result afterwards, --allow-same")
