"""Merges computed in memory from what ``from_pretrained`` opens, without a word of merganser's.

A family is a base model and two contributors, written as a user writes them. How the files cut a model into tensors
(fused or separate projections, packed experts or single ones, transposed or not) is found by saving the same model once
more with every number of its parameters replaced by its position: what then lies in the files are the positions.

TIES and ACTMat depend on that cut, and that of the files is meant: a projection that is fused on disk is one matrix,
gate and up weights that the files have apart are two. A packed tensor of experts counts as one matrix for each expert.
Everything else is elementwise.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from architectures.tiny import WIDTH, Tiny

NOISE = 0.02
CONTRIBUTORS = 2
SCALE, DENSITY, RIDGE = 0.4, 0.2, 0.01
#: What float32 files and arithmetic may add to a parameter of size 1 or less.
TOLERANCE = 3e-6


@dataclass(frozen=True)
class Role:
    """How a parameter is made of linear maps.

    Attributes:
        kind: a linear map, a stack of experts, the bias of one, an embedding, one that is a head as well, or other.
        shape: to see the parameter in; its own unless experts are flattened into its rows.
        stack: the axis along which separate maps lie behind each other.
        inputs: the axes of a map's input; all others are of its output.
    """

    kind: str
    shape: tuple[int, ...]
    stack: int | None = None
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Alternatives:
    """What a stored tensor may be merged into.

    Attributes:
        name: of the stored tensor.
        kind: the role's.
        places: positions of its numbers among those of all parameters, (n,).
        values: by what was done; each (n,).
    """

    name: str
    kind: str
    places: Tensor
    values: dict[str, Tensor]


class Family:
    """A tiny base model, two contributors, and their merges.

    Args:
        tiny: the architecture.
        folder: where the models are written: ``base``, ``a`` and ``b``.
    """

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny = tiny
        self.model_class: type[PreTrainedModel] = getattr(transformers, tiny.model_class)
        self.base = folder / "base"
        self.contributors = [folder / name for name in "ab"[:CONTRIBUTORS]]
        _save_settled(tiny.build(), self.base)
        for number, path in enumerate(self.contributors):
            model = self.open(self.base)
            generator = torch.Generator().manual_seed(1 + number)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
            _save_settled(model, path)
        self.model = self.open(self.base)
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.before = flat(self.model)
        self.after = [flat(self.open(path)) for path in self.contributors]
        self.stored = _stored(self.open(self.base), folder / "numbered")

    def open(self, path: Path) -> PreTrainedModel:
        """The model that a user gets, in eval mode."""
        return self.model_class.from_pretrained(path, dtype=torch.float32).eval()

    def parameter_at(self, place: int) -> tuple[str, int]:
        """The parameter that a position is in, and where in it."""
        for name, shape in self.shapes.items():
            if place < prod(shape):
                return name, place
            place -= prod(shape)
        raise IndexError(place)

    # merges, as vectors of all parameters

    def average(self, coefficients: Sequence[float]) -> Tensor:
        """Σ cᵢθᵢ / Σ cᵢ."""
        return sum(c * after for c, after in zip(coefficients, self.after, strict=True)) / sum(coefficients)

    def task_arithmetic(self, coefficients: Sequence[float]) -> Tensor:
        """θ₀ + s Σ cᵢ(θᵢ − θ₀)."""
        deltas = (c * (after - self.before) for c, after in zip(coefficients, self.after, strict=True))
        return self.before + SCALE * sum(deltas)

    # merges that depend on the cut

    def ties(self, coefficients: Sequence[float]) -> Iterator[Alternatives]:
        """Trim each matrix, elect signs, average what agrees."""
        for name, kind, places in self.cut():
            found = {}
            stacks = self.stacks(places)
            if len(stacks) == 1 or kind != "experts":
                found["whole"] = self.before[places] + self._trim(places, coefficients)
            if len(stacks) > 1:
                found["by expert"] = self.before[places]
                for own in stacks:
                    found["by expert"][own] += self._trim(places[own], coefficients)
            yield Alternatives(name, kind, places, found)

    def actmat(self, coefficients: Sequence[float]) -> Iterator[Alternatives]:
        """Least squares on ΔᵀΔ for linear maps; the same with an input of 1 for biases, of one-hots for embeddings."""
        average = self.average(coefficients)
        for name, kind, places in self.cut():
            found = {"average": average[places]}
            if kind in ("linear", "experts", "tied"):
                found["actmat"] = self._solve(places, coefficients)
            if kind in ("embedding", "tied"):
                found["rows"] = self._weigh(places, self._row[places], coefficients)
            if kind == "bias":
                found["bias"] = average[places]
                for own in self.stacks(places):
                    found["bias"][own] = self._weigh(places[own], self._stack[places[own]], coefficients)
            yield Alternatives(name, kind, places, found)

    def _trim(self, places: Tensor, coefficients: Sequence[float]) -> Tensor:
        return _ties([after[places] - self.before[places] for after in self.after], coefficients)

    def cut(self) -> Iterator[tuple[str, str, Tensor]]:
        """Each stored tensor's name, kind and positions, and each parameter that is not stored."""
        seen = torch.zeros(len(self.before), dtype=torch.bool)
        for name, places in self.stored.items():
            kinds = {self._kinds[int(kind)] for kind in self._kind[places].unique()}
            seen[places] = True
            yield name, kinds.pop() if len(kinds) == 1 else "other", places
        if not bool(seen.all()):
            yield "what is not stored", "other", (~seen).nonzero()[:, 0]

    def stacks(self, places: Tensor) -> list[Tensor]:
        """Which of a stored tensor's numbers belong to each expert."""
        stack = self._stack[places]
        return [(stack == one).nonzero()[:, 0] for one in stack.unique()]

    def _solve(self, places: Tensor, coefficients: Sequence[float]) -> Tensor:
        """W̄ + Σcᵢ(Wᵢ − W̄)Gᵢ (ΣcᵢGᵢ + λI)⁻¹ with λ = ridge · tr(ΣcᵢGᵢ)/d, for each map of a stored tensor."""
        solved = torch.empty(len(places), dtype=torch.float64)
        for own in self.stacks(places):
            at = places[own]
            rows, columns = self._row[at], self._column[at]
            order = (rows * (int(columns.max()) + 1) + columns).argsort()
            height = len(rows.unique())
            before = self.before[at][order].reshape(height, -1)
            weights = [after[at][order].reshape(height, -1) for after in self.after]
            grams = [c * (w - before).T @ (w - before) for c, w in zip(coefficients, weights, strict=True)]
            mean = sum(c * w for c, w in zip(coefficients, weights, strict=True)) / sum(coefficients)
            system = sum(grams)
            system = system + RIDGE * system.trace() / len(system) * torch.eye(len(system), dtype=torch.float64)
            right = sum((w - mean) @ gram for w, gram in zip(weights, grams, strict=True))
            solved[own[order]] = (mean + torch.linalg.solve(system, right.T).T).reshape(-1)
        return solved

    def _weigh(self, places: Tensor, groups: Tensor, coefficients: Sequence[float]) -> Tensor:
        """The average weighted by the squared change of each group, with the ridge relative to their mean."""
        _, group = groups.unique(return_inverse=True)
        changes = []
        for c, after in zip(coefficients, self.after, strict=True):
            square = (after[places] - self.before[places]).square()
            changes.append(c * torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, square))
        mean = self.average(coefficients)[places]
        ridge = RIDGE * sum(changes).mean()
        right = sum(change[group] * (after[places] - mean) for change, after in zip(changes, self.after, strict=True))
        return mean + right / (sum(changes)[group] + ridge).clamp_min(1e-300)

    # roles

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The role of each parameter."""
        return dict(_roles(self.model, self.tiny))

    _kinds = ("linear", "experts", "bias", "embedding", "tied", "other")

    @cached_property
    def _coordinates(self) -> Tensor:
        """For each number: its kind, its expert, its row and its column, (4, n)."""
        found, start = [], 0
        for name, shape in self.shapes.items():
            role = self.roles[name]
            zero = torch.zeros(shape, dtype=torch.int64).reshape(role.shape or (1,))  # a scalar is a row
            axes = torch.meshgrid(*(torch.arange(size) for size in zero.shape), indexing="ij")
            outputs = [axis for axis in range(zero.dim()) if axis != role.stack and axis not in role.inputs]
            row, column = (_combined(axes, zero.shape, which, zero) for which in (outputs, role.inputs))
            stack = zero if role.stack is None else axes[role.stack]
            kind = zero + self._kinds.index(role.kind)
            found.append(torch.stack([kind, stack, row + start, column]).reshape(4, -1))
            start += prod(shape)
        return torch.cat(found, 1)

    _kind = property(lambda self: self._coordinates[0])
    _stack = property(lambda self: self._coordinates[1])
    _row = property(lambda self: self._coordinates[2])
    _column = property(lambda self: self._coordinates[3])


@dataclass(frozen=True)
class Comparison:
    """How a merge compares with what it may be.

    Attributes:
        wrong: stored tensors that are none of the alternatives, with the distance from the nearest.
        counts: numbers in each kind of tensor by what was done, as (kind, done).
    """

    wrong: dict[str, float]
    counts: dict[tuple[str, str], int]

    @property
    def coverage(self) -> float:
        """The share of the numbers of linear maps that are not merely averaged."""
        linear = [(done, n) for (kind, done), n in self.counts.items() if kind in ("linear", "experts")]
        return sum(n for done, n in linear if done != "average") / max(sum(n for _, n in linear), 1)


def compare(merged: Tensor, alternatives: Iterator[Alternatives]) -> Comparison:
    """Which alternative each stored tensor was merged into; the last named is preferred where several fit."""
    wrong: dict[str, float] = {}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for one in alternatives:
        errors = {done: error(merged[one.places], value) for done, value in one.values.items()}
        done = min(reversed(errors), key=lambda name: (errors[name] > TOLERANCE, errors[name]))
        if errors[done] > TOLERANCE:
            wrong[one.name] = errors[done]
        counts[one.kind, done] += len(one.places)
    return Comparison(wrong, dict(counts))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to numbers above 1."""
    return float(((found - expected).abs() / expected.abs().clamp_min(1)).max()) if len(found) else 0.0


def flat(model: nn.Module) -> Tensor:
    """All parameters in float64, one after the other, each that is tied once."""
    return torch.cat([parameter.detach().to(torch.float64).reshape(-1) for parameter in model.parameters()])


def _save_settled(model: PreTrainedModel, path: Path) -> None:
    """Save, open and save again: what opening sets anew (rows of padding, sines) is then the same on disk."""
    model.save_pretrained(path)
    type(model).from_pretrained(path, dtype=torch.float32).save_pretrained(path)


def _stored(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """For each stored tensor the positions of its numbers among those of all parameters.

    Raises:
        ValueError: the files have more of a tensor than a parameter's numbers in another order.
    """
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(start, start + parameter.numel(), dtype=torch.float32)
            parameter.copy_(numbers.reshape(parameter.shape))
            start += parameter.numel()
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    if start > 2**24:
        raise ValueError(f"{start} positions are not exact in float32")
    model.save_pretrained(folder)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                places = file.get_tensor(name)
                if not places.is_floating_point() or bool(places.isnan().any()):
                    continue  # a buffer
                if not torch.equal(places, places.round().clamp(0, start - 1)):
                    raise ValueError(f"{name} is not made of a parameter's numbers")
                found[name] = places.to(torch.int64).reshape(-1)
    shutil.rmtree(folder)
    return found


def _ties(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The merged task vector of one tensor."""
    if not len(deltas[0]):
        return deltas[0]
    kept = max(1, int(DENSITY * len(deltas[0])))
    trimmed = []
    for delta in deltas:
        threshold = delta.abs().to(torch.float32).sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(delta.abs().to(torch.float32) >= threshold, delta, 0.0))
    sign = torch.where(sum(c * delta for c, delta in zip(coefficients, trimmed, strict=True)) >= 0, 1.0, -1.0)
    agreed, weight = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for c, delta in zip(coefficients, trimmed, strict=True):
        agrees = delta * sign > 0
        agreed += torch.where(agrees, c * delta, 0.0)
        weight += torch.where(agrees, c, 0.0)
    return agreed / weight.clamp_min(1e-300)


def _combined(axes: Sequence[Tensor], shape: Sequence[int], which: Sequence[int], zero: Tensor) -> Tensor:
    """One index from those along some axes."""
    index = zero
    for axis in which:
        index = index * shape[axis] + axes[axis]
    return index


#: Linear maps that are no layer of their own: axes of stack and inputs, by the module's class and the parameter's name.
_MAPS = {
    ("FunnelRelMultiheadAttention", "r_kernel"): (None, (0,)),
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): (None, (0,)),
    ("MultiheadAttention", "in_proj_weight"): (None, (1,)),
    ("RecurrentGemmaRglru", "input_gate_weight"): (0, (1,)),
    ("RecurrentGemmaRglru", "recurrent_gate_weight"): (0, (1,)),
    ("XLNetRelativeAttention", "k"): (None, (0,)),
    ("XLNetRelativeAttention", "o"): (None, (1, 2)),
    ("XLNetRelativeAttention", "q"): (None, (0,)),
    ("XLNetRelativeAttention", "r"): (None, (0,)),
    ("XLNetRelativeAttention", "v"): (None, (0,)),
    ("ZambaMambaMixer", "dt_proj_weight"): (0, (2,)),
    ("ZambaMambaMixer", "x_proj_weight"): (0, (2,)),
}  # fmt: skip


class _Multipliers(TorchFunctionMode):
    """Collects what ``torch.nn.functional.linear`` is given as weights, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, torch.Size] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.shapes[weight.data_ptr()] = weight.shape
        return function(*args, **kwargs)


def _roles(model: PreTrainedModel, tiny: Tiny) -> Iterator[tuple[str, Role]]:
    """The role of each parameter: by its module's class, and where that says nothing, by how the model uses it."""
    with torch.no_grad(), _Multipliers() as used:
        model(**tiny.batch())
    uses = defaultdict(set)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses[id(parameter)].add((id(module), name))
    modules = {id(module): module for module in model.modules()}
    for full_name, parameter in model.named_parameters():
        roles = {_role(modules[module], name, parameter, used) for module, name in uses[id(parameter)]}
        roles = {role for role in roles if role.kind != "other"} or roles
        role = roles.pop() if len(roles) == 1 else Role("tied", parameter.shape, inputs=(1,))
        yield full_name, role


def _role(module: nn.Module, name: str, parameter: Tensor, used: _Multipliers) -> Role:
    shape, kind = tuple(parameter.shape), type(module).__name__
    if name == "weight" and (isinstance(module, nn.Embedding) or kind == "QuantEmbedding"):
        return Role("embedding", shape, inputs=(1,))
    if name == "weight" and isinstance(module, nn.Linear):
        return Role("linear", shape, inputs=(1,))
    if name == "weight" and isinstance(module, Conv1D):
        return Role("linear", shape, inputs=(0,))
    if name == "weight" and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return Role("linear", shape, inputs=tuple(range(1, len(shape))))
    if (kind, name) in _MAPS:
        stack, inputs = _MAPS[kind, name]
        return Role("linear", shape, stack, inputs)
    if kind == "DbrxExpertGLU":  # its experts lie behind each other in the rows
        return Role("linear", (module.moe_num_experts, -1, shape[1]), 0, (1,) if name == "w2" else (2,))
    if "Experts" in kind and len(shape) == 3:
        return Role("experts", shape, 0, (_input_axis(module, name, shape),))
    if "Experts" in kind and len(shape) == 2 and name.endswith("bias"):
        return Role("bias", shape, 0)
    if used.shapes.get(parameter.data_ptr()) == parameter.shape and len(shape) == 2:
        return Role("linear", shape, inputs=(1,))
    weight = getattr(module, "weight", None)
    if name == "in_proj_bias":
        return Role("bias", shape)
    if name == "bias" and weight is not None and _role(module, "weight", weight, used).kind == "linear":
        return Role("bias", shape)
    return Role("other", shape)


def _input_axis(module: nn.Module, name: str, shape: Sequence[int]) -> int:
    """Which axis of packed experts is that of their inputs: the model's width comes in and goes out."""
    if hasattr(module, "input_size"):
        return shape.index(module.input_size, 1)
    outside = shape.index(WIDTH, 1)
    return 3 - outside if "down" in name else outside
