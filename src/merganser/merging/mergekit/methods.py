"""The merge methods of mergekit 0.1.5: their parameters and defaults, and which method with which options is the same.

What mergekit takes for granted becomes an option that is spelled out: the two tools have other defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Whose a parameter is: the method's, every input's, or every input's but the base's.
Scope = Literal["method", "input", "not base"]
#: What the base model is to a method: one more input, the origin of task vectors (perhaps), or one of two ends.
BaseRole = Literal["input", "origin", "origin if given", "end"]

COEFFICIENT = "coefficient"  # what a parameter becomes that is no option
REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method of mergekit.

    Attributes:
        kind: of its values.
        becomes: our option, :data:`COEFFICIENT`, or None for what changes nothing here.
        default: mergekit's.
        scope: whose it is.
        turned: our option's value, of mergekit's.
    """

    kind: type[float] | type[bool] | type[int]
    becomes: str | None
    default: Any = REQUIRED
    scope: Scope = "method"
    turned: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class MergekitMethod:
    """A method of mergekit, and the one of ours that does the same.

    Attributes:
        ours: our method's name.
        base: what the base model is to it.
        parameters: by mergekit's name.
        options: of ours, whatever the parameters are.
        inputs: how many models it merges at least and at most, the base counted.
        notes: what means something else here, and differences of the result.
    """

    ours: str
    base: BaseRole
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[int, int | None] = (1, None)
    notes: tuple[str, ...] = ()


_WEIGHT = Parameter(float, COEFFICIENT, scope="not base")
_INT8 = Parameter(bool, None, False)


def _task_vectors(
    ours: str,
    *,
    normalize: bool,
    rescale: bool,
    trims: bool = True,
    notes: tuple[str, ...] = (),
    more: Mapping[str, Parameter] | None = None,
) -> MergekitMethod:
    """One of the family that mergekit calls generalised task arithmetic."""
    parameters = {
        "weight": _WEIGHT,
        "density": Parameter(float, "density" if trims else None, 1.0, "not base"),
        "normalize": Parameter(bool, "normalize", normalize),
        "rescale": Parameter(bool, "rescale" if trims else None, rescale),
        "lambda": Parameter(float, "scale", 1.0),
        "int8_mask": _INT8,
    }
    return MergekitMethod(ours, "origin", {**parameters, **(more or {})}, notes=notes)


_RANDOM = (
    "mergekit draws its masks from one generator, merganser's are seeded by tensor and place: other numbers are dropped"
)
_GAMMA = {"gamma": Parameter(float, "gamma", 0.01, "not base")}
_EPSILON = {"epsilon": Parameter(float, "epsilon", 0.15, "not base")}
_RAM = {"epsilon": Parameter(float, "epsilon", 1e-5)}
_PAIR = (2, 2)

METHODS: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod(
        "simple",
        "input",
        {"weight": Parameter(float, COEFFICIENT, scope="input"), "normalize": Parameter(bool, "normalize", True)},
    ),
    "slerp": MergekitMethod("slerp", "end", {"t": Parameter(float, "t")}, inputs=_PAIR),
    "nuslerp": MergekitMethod(
        "nuslerp",
        "origin if given",
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": Parameter(bool, "flatten", True),
            "nuslerp_row_wise": Parameter(bool, "row_wise", False),
        },
    ),
    "multislerp": MergekitMethod(
        "multislerp",
        "origin if given",
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter(bool, "normalize", True),
            "eps": Parameter(float, "epsilon", 1e-8),
        },
    ),
    "karcher": MergekitMethod(
        "karcher",
        "input",
        {"max_iter": Parameter(int, "max_iterations", 10), "tol": Parameter(float, "tolerance", 1e-5)},
    ),
    "model_stock": MergekitMethod(
        "model_stock", "origin", {"filter_wise": Parameter(bool, "row_wise", False)}, inputs=(3, None)
    ),
    "nearswap": MergekitMethod("nearswap", "origin", {"t": Parameter(float, "t")}, inputs=_PAIR),
    "arcee_fusion": MergekitMethod("arcee_fusion", "origin", inputs=_PAIR),
    "passthrough": MergekitMethod(
        "passthrough", "input", {"scale": Parameter(float, "scale", None, "input")}, inputs=(1, 1)
    ),
    "sce": MergekitMethod("sce", "origin", {"select_topk": Parameter(float, "density", 1.0), "int8_mask": _INT8}),
    "ram": MergekitMethod("ram", "origin", _RAM),
    "ramplus_tl": MergekitMethod(
        "ram_plus", "origin", {"r": Parameter(float, "r", 0.1), "alpha": Parameter(float, "alpha", 0.2), **_RAM}
    ),
    "task_arithmetic": _task_vectors("task_arithmetic", normalize=False, rescale=False, trims=False),
    "ties": _task_vectors("ties", normalize=True, rescale=False),
    "dare_ties": _task_vectors("dare_ties", normalize=False, rescale=True, notes=(_RANDOM,)),
    "dare_linear": _task_vectors("dare_linear", normalize=False, rescale=True, notes=(_RANDOM,)),
    "breadcrumbs": _task_vectors("breadcrumbs", normalize=False, rescale=False, more=_GAMMA),
    "breadcrumbs_ties": _task_vectors("breadcrumbs_ties", normalize=False, rescale=False, more=_GAMMA),
    "della": _task_vectors("della", normalize=True, rescale=True, notes=(_RANDOM,), more=_EPSILON),
    "della_linear": _task_vectors("della_linear", normalize=False, rescale=True, notes=(_RANDOM,), more=_EPSILON),
}  # fmt: skip

#: Parameters of any method: one that the method at hand does not take is skipped, as mergekit does, and told of.
KNOWN_PARAMETERS = sorted({name for method in METHODS.values() for name in method.parameters})
