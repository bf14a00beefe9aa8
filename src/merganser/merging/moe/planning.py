"""The plan of a mixture of experts: which tensor of the result comes from where, from headers and configurations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.checkpoints.layers import load_config
from merganser.checkpoints.model_view import make_view
from merganser.checkpoints.sources import Source
from merganser.checkpoints.writer import TensorSpec
from merganser.errors import CheckpointError, ErrorCollector
from merganser.merging.inputs import Inputs, Parent, open_inputs
from merganser.merging.moe.architectures import DOWN, GATE, UP, Architecture, choose_architecture, new_configuration
from merganser.merging.moe.config import RANDOM, Expert, MoeConfig
from merganser.merging.plan import Plan, Step
from merganser.merging.recipe import Recipe
from merganser.methods import Facts, Unit
from merganser.tensors import is_floating
from merganser.text import listed

#: How a tensor of the result came to be: the method in plans and provenance.
MOE, BASE, EXPERT, SHARED, ROUTER = "moe", "base", "expert", "shared expert", "router"
_BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp\..+")
_ONE_KIND = "give experts that were trained from one model, or from models of one shape"


@dataclass(frozen=True)
class MoePlan:
    """A mixture of experts that can be made.

    Attributes:
        config: what was asked for.
        architecture: of the result.
        values: of its ``config.json``, but for the dtype.
        plan: its tensors and where they come from; contributors are the models that are read, the base model first.
        inputs: these, open.
    """

    config: MoeConfig
    architecture: Architecture
    values: dict[str, Any]
    plan: Plan
    inputs: Inputs


def plan_moe(config: MoeConfig, *, max_shard_size: str = "5GB", allow_pickle: bool = False) -> MoePlan:
    """Plan a mixture, reading headers and configurations only.

    Args:
        config: what is asked for.
        max_shard_size: the largest weight file.
        allow_pickle: accept ``pytorch_model.bin``.

    Raises:
        UserError: models that do not fit together; several mistakes come as ``Problems``.
    """
    recipe = recipe_of_moe(config, max_shard_size)
    models = [contributor.model for contributor in recipe.contributors]
    inputs = open_inputs(recipe, allow_pickle=allow_pickle)
    parents = dict(zip(models, inputs.parents, strict=True))
    base = inputs.parents[0]
    model_type = str(base.checkpoint.config.get("model_type"))
    architecture = choose_architecture(config, model_type, base.title)
    dense = load_config(base.checkpoint)
    problems = ErrorCollector()
    classes = base.checkpoint.config.get("architectures") or []
    if not all(str(name).endswith("ForCausalLM") for name in classes) or not classes:
        what = f"is no model that writes text, but {', '.join(map(str, classes)) or 'of no stated class'}"
        problems.add(CheckpointError(what, where=base.title, mend="give a base model of a class …ForCausalLM"))
    widths = {}
    for model in dict.fromkeys(expert.source_model for expert in config.everyone):
        widths[model] = problems.catch(_width, parents[model], dense, architecture)
    problems.raise_all()
    own = [widths[expert.source_model] or 0 for expert in config.experts]
    if len(set(own)) > 1:
        said = ", ".join(f"{e.source_model} {width}" for e, width in zip(config.experts, own, strict=True))
        what = f"the experts have feed-forward blocks of different widths: {said}"
        raise CheckpointError(what, where="experts", mend=_ONE_KIND)
    shared = widths[config.shared_experts[0].source_model] if config.shared_experts else None
    values = new_configuration(architecture, dense, own, shared, config.experts_per_token, base.title)
    steps, outputs = [], []
    for step, spec in _steps(config, architecture, inputs, models, dense.hidden_size, own[0], shared):
        steps.append(step)
        outputs.append(spec)
    _check_whole(values, outputs, base)
    plan = Plan(
        recipe=recipe,
        steps=tuple(steps),
        outputs=tuple(outputs),
        revisions=tuple(parent.checkpoint.revision for parent in inputs.parents),
        notes=tuple(_notes(config)),
        bytes_read=sum(info.nbytes for parent in inputs.parents for info in parent.checkpoint.tensors.values()),
    )
    return MoePlan(config, architecture, values, plan, inputs)


def recipe_of_moe(config: MoeConfig, max_shard_size: str) -> Recipe:
    """The recipe that is recorded: the models that are read, the base model first, and the mixture as its options."""
    models = dict.fromkeys([config.base_model, *(expert.source_model for expert in config.everyone)])
    values = {
        "contributors": [{"model": model} for model in models],
        "method": MOE,
        "options": config.model_dump(mode="json"),
        "names": "canonical",
        "max_shard_size": max_shard_size,
    }
    return Recipe.model_validate(values)


def _notes(config: MoeConfig) -> Iterator[str]:
    """What the user should know."""
    if config.gate_mode in RANDOM:
        yield "the routers are random: the result is of use only after training"
    if len(config.experts) > 1 and len({expert.source_model for expert in config.experts}) == 1:
        yield "all experts are one model: before training, the result computes what that model computes"


def _name(layer: int, matrix: str) -> str:
    """A matrix of a dense model's feed-forward block."""
    return f"model.layers.{layer}.mlp.{matrix}.weight"


def _width(expert: Parent, dense: Any, architecture: Architecture) -> int:
    """The hidden units of a model's feed-forward blocks, which fit into the base model's layers.

    Raises:
        UserError: they do not.
    """
    found = load_config(expert.checkpoint)
    title, problems = expert.title, ErrorCollector()
    if found.model_type not in architecture.dense:
        wanted = " or ".join(architecture.dense)
        what = f"is of type {found.model_type!r}; experts of a {architecture.name} are {wanted}"
        raise CheckpointError(what, where=title, mend=_ONE_KIND)
    for key in ("hidden_act", "hidden_size", "num_hidden_layers"):
        if (has := getattr(found, key)) != (wanted := getattr(dense, key)):
            what = f"its {key} is {has!r}, the base model's {wanted!r}"
            problems.add(CheckpointError(what, where=title, mend=_ONE_KIND))
    if getattr(found, "mlp_bias", False):
        what = f"its feed-forward blocks have biases, for which {architecture.name} has no place"
        problems.add(CheckpointError(what, where=title, mend="give models without mlp_bias"))
    problems.raise_all()
    hidden, width = found.hidden_size, found.intermediate_size
    wrong = []
    for layer in range(found.num_hidden_layers):
        for matrix in (GATE, UP, DOWN):
            source = expert.sources.get(_name(layer, matrix))
            shape = () if source is None else source.shape(expert.checkpoint)
            if shape != ((hidden, width) if matrix == DOWN else (width, hidden)):
                wrong.append(f"{_name(layer, matrix)} {list(shape) if source else 'is missing'}")
    if wrong:
        what = f"its feed-forward blocks are not those of its configuration: {listed(wrong, 5)}"
        raise CheckpointError(what, where=title, mend="give a whole checkpoint")
    return int(width)


def _steps(
    config: MoeConfig,
    architecture: Architecture,
    inputs: Inputs,
    models: Sequence[str],
    hidden: int,
    width: int,
    shared_width: int | None,
) -> Iterator[tuple[Step, TensorSpec]]:
    """The tensors of the result, layer by layer in the order of the base model's."""
    base, count = inputs.parents[0], len(inputs.parents)
    storage, done = config.storage, set[int]()

    def made(
        name: str, shape: tuple[int, ...], like: str, method: str, take: tuple[int, Source] | None, options: Any = None
    ) -> tuple[Step, TensorSpec]:
        stored = base.sources[like].dtype(base.checkpoint)
        dtype = storage if storage is not None and is_floating(stored) else stored
        sources = tuple({name: take[1]} if take and number == take[0] else {} for number in range(count))
        unit = Unit((name,), method, (Facts(name, shape),))
        return Step(unit, method, sources, (1.0,) * count, options or {}), TensorSpec(name, dtype, shape)

    def block(layer: int, place: int | None, expert: Expert, wide: int) -> Iterator[tuple[Step, TensorSpec]]:
        number = models.index(expert.source_model)
        for matrix in (GATE, UP, DOWN):
            name = f"model.layers.{layer}.{architecture.matrix(place, matrix)}"
            residual = expert.residual_scale if matrix == DOWN else None
            options = {"noise_scale": expert.noise_scale, "residual_scale": residual}
            given = {key: value for key, value in options.items() if value is not None}
            shape = (hidden, wide) if matrix == DOWN else (wide, hidden)
            source = inputs.parents[number].sources[_name(layer, matrix)]
            method = SHARED if place is None else EXPERT
            yield made(name, shape, _name(layer, matrix), method, (number, source), given)

    for name in inputs.reference.checkpoint.tensors:
        match = _BLOCK.fullmatch(name)
        if match is None:
            source = base.sources[name]
            yield made(name, source.shape(base.checkpoint), name, BASE, (0, source))
            continue
        layer = int(match[1])
        if layer in done:
            continue
        done.add(layer)
        routed = {architecture.router: len(config.experts)}
        routed |= {architecture.shared_router: 1} if architecture.shared else {}
        for router, rows in routed.items():
            yield made(f"model.layers.{layer}.{router}", (rows, hidden), _name(layer, GATE), ROUTER, None)
        for place, expert in enumerate(config.experts):
            yield from block(layer, place, expert, width)
        if shared_width is not None:
            yield from block(layer, None, config.shared_experts[0], shared_width)


def _check_whole(values: dict[str, Any], outputs: Sequence[TensorSpec], base: Parent) -> None:
    """Refuse a result that would not open with every tensor in its place.

    Raises:
        CheckpointError: names what the base model has and the mixture has no place for, or the other way round.
    """
    view = make_view(values, {spec.name: spec.shape for spec in outputs}, base.checkpoint.model_path)
    wrong = [f"{name} has no place" for name in sorted(view.unused)]
    wrong += [f"{name} is missing" for name in view.missing]
    wrong += [f"{name} is {list(has)} instead of {list(wanted)}" for name, (has, wanted) in view.mismatched.items()]
    if view.model is None:
        wrong.append(str(view.reason))
    if wrong:
        what = f"the base model is not one that this mixture can be made of: {listed(wrong, 5)}"
        raise CheckpointError(what, where=base.title, mend="give a base model without what has no place")
