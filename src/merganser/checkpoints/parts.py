"""What each stored tensor is for (its roles), and in which layer of which stack of layers it lies.

Both are told by the model class: by the modules that a parameter lies in, their names and classes. Where transformers
cannot build the model, the names on disk have to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from merganser.checkpoints.layers import Layer
from merganser.checkpoints.layout import ties

#: What recipes can say of a tensor beside its name.
ROLES = (
    "attention",
    "mlp",
    "mixer",
    "expert",
    "router",
    "embedding",
    "head",
    "norm",
    "bias",
    "linear",
    "vision",
    "audio",
)
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MIXER = re.compile(r"mixer|mamba|ssm|recurrent|deltanet|rwkv|hyena|shortconv", re.IGNORECASE)
_EXPERT = re.compile(r"(?<![a-z])(shared_?)?experts?(?!_gate|[a-z])|Experts?(?![a-z])")
_ROUTER = re.compile(r"router|top_?k|gating|expert_gate|moegate", re.IGNORECASE)
_NORM = re.compile(r"norm(?!al)|^ln_|(^|_)ln(_|$)", re.IGNORECASE)
_HEAD = re.compile(r"^(lm_head|classifier|score|qa_outputs|cls|head|embed_out)(\.|$)")
_TOWERS = {"vision": re.compile(r"vision|visual", re.IGNORECASE), "audio": re.compile(r"audio|speech", re.IGNORECASE)}


@dataclass(frozen=True)
class Depth:
    """A layer of a stack.

    Attributes:
        stack: the name of the list of layers in the model, such as ``model.layers``.
        number: of the layer, from 0.
        count: how many the stack has.
    """

    stack: str
    number: int
    count: int

    @property
    def share(self) -> float:
        """How deep it lies: 0 for the first layer, 1 for the last one, and for the only one."""
        return self.number / (self.count - 1) if self.count > 1 else 1.0


@dataclass(frozen=True)
class Part:
    """What a stored tensor is in the model: its roles, and its layer where it lies in one."""

    roles: frozenset[str]
    depth: Depth | None = None


def stacks_of(model: nn.Module) -> dict[str, int]:
    """The stacks of layers of a model, each by the name of its list, and how many layers it has.

    A list inside a layer is none, nor is one whose members are single maps, as heads can be.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        deep = all(next(one.children(), None) is not None for one in module)
        if deep and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = len(module)
    return found


def depth_of(parameter: str, stacks: Mapping[str, int]) -> Depth | None:
    """The layer that a parameter lies in."""
    for stack, count in stacks.items():
        if parameter.startswith(f"{stack}."):
            number = parameter[len(stack) + 1 :].partition(".")[0]
            return Depth(stack, int(number), count) if number.isdecimal() else None
    return None


def find_parts(
    model: nn.Module | None,
    shapes: Mapping[str, Sequence[int]],
    uses: Mapping[str, Sequence[str]],
    layers: Mapping[str, Layer],
) -> dict[str, Part]:
    """The part of each stored tensor.

    Args:
        model: on the meta device; None where there is none.
        shapes: of the stored tensors.
        uses: the parameters of the model that each is a part of.
        layers: the linear maps by the names of their weights.
    """
    if model is None:
        stacks = _numbered(shapes)
        return {name: _part(name, name, [name], shapes, layers, stacks) for name in shapes}
    stacks, classes = stacks_of(model), {name: type(module).__name__ for name, module in model.named_modules()}
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {name for name, module in model.named_modules() if outputs is not None and module is outputs}
    base = getattr(model, "base_model", model)
    if base is not model:
        heads |= {name for name, module in model.named_children() if module is not base}
    twins = {name: group for group in ties(model) for name in group}
    found = {}
    for name in shapes:
        roles: set[str] = set()
        depth = None
        for parameter in uses.get(name, ()) or (name,):
            path = parameter.split(".")[:-1]
            above = [".".join(path[: end + 1]) for end in range(len(path))]
            words = [word for place, part in zip(above, path, strict=True) for word in (part, classes.get(place, ""))]
            part = _part(name, parameter, words, shapes, layers, stacks)
            shared = {twin.rpartition(".")[0] for twin in twins.get(parameter, ())}
            roles |= part.roles | ({"head"} if heads.intersection([*above, *shared]) else set())
            depth = depth or part.depth
        found[name] = Part(frozenset(roles), depth)
    return found


def _part(
    name: str,
    parameter: str,
    words: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    layers: Mapping[str, Layer],
    stacks: Mapping[str, int],
) -> Part:
    """Of one parameter, by the names and classes of the modules that it lies in, from the outermost."""
    layer, depth, roles = layers.get(name), depth_of(parameter, stacks), set[str]()

    def any_is(pattern: re.Pattern[str], some: Iterable[str] = words) -> bool:
        return any(pattern.search(word) for word in some)

    leaf = parameter.rpartition(".")[2]
    parents = [name] if words == [name] else words[-2:]
    if re.search(r"(^|_)bias$", leaf):
        roles.add("bias")
    if layer is not None:
        roles.add("embedding" if layer.kind == "embedding" else "linear")
    elif words and words[-1].endswith("Embedding"):
        roles.add("embedding")
    is_norm = any_is(_NORM, parents)
    if is_norm:
        roles.add("norm")
    if any_is(_ATTENTION, words[: -len(parents)] if is_norm else words):  # a norm after attention is none of it
        roles.add("attention")
    if any_is(_MIXER):
        roles.add("mixer")
    if any_is(_ROUTER) or leaf.startswith("router"):
        roles.add("router")
    if any_is(_EXPERT) or (layer is not None and layer.experts is not None):
        roles.add("expert")
    if words == [name] and _HEAD.search(name):
        roles.add("head")
    roles |= {tower for tower, pattern in _TOWERS.items() if any_is(pattern)}
    if depth is not None and len(shapes[name]) and not roles & {"attention", "mixer", "router", "norm", "embedding"}:
        roles.add("mlp")
    return Part(frozenset(roles), depth)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Stacks by the first number in each name on disk."""
    found: dict[str, int] = {}
    for name in names:
        if number := re.search(r"\.(\d+)\.", name):
            stack = name[: number.start()]
            found[stack] = max(found.get(stack, 0), int(number[1]) + 1)
    return found
