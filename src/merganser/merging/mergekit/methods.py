"""The merge methods of mergekit 0.1.5: their parameters and defaults, and which method with which options is the same.

What mergekit takes for granted becomes an option that is spelled out: the two tools have other defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Whose a parameter is: the method's, every input's, or every input's but the base's.
Scope = Literal["method", "input", "not base"]
#: What the base model is to a method: one more input, the origin of task vectors (perhaps), or the first of two inputs.
BaseRole = Literal["input", "origin", "origin if given", "first"]

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
        with_base: options of ours where there is a base model.
        inputs: how many models it merges at least and at most, besides a base that is the origin.
        switch: a parameter that is on by default, and our method where it is off; None where there is none.
        draws: it drops at random what a density below 1 does not keep.
        elects: signs are elected.
    """

    ours: str
    base: BaseRole
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    with_base: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[int, int | None] = (1, None)
    switch: tuple[str, str | None] | None = None
    draws: bool = False
    elects: bool = False


def _rescaled(value: bool) -> str:
    return "l1" if value else "none"


_WEIGHT = Parameter(float, COEFFICIENT, scope="not base")
_INT8 = Parameter(bool, None, False)
_ON = Parameter(bool, None, True)


def _task_vectors(
    ours: str,
    *,
    normalize: bool,
    rescale: bool | None = None,
    more: Mapping[str, Parameter] | None = None,
    options: Mapping[str, Any] | None = None,
    draws: bool = False,
    elects: bool = False,
) -> MergekitMethod:
    """One of the family that mergekit calls generalised task arithmetic; without ``rescale`` nothing is trimmed."""
    trims = rescale is not None
    parameters = {
        "weight": _WEIGHT,
        "density": Parameter(float, "density" if trims else None, 1.0, "not base"),
        "normalize": Parameter(bool, "normalize", normalize),
        "rescale": Parameter(bool, "rescale" if trims else None, bool(rescale), turned=_rescaled),
        "lambda": Parameter(float, "scale", 1.0),
        "int8_mask": _INT8,
        **(more or {}),
    }
    return MergekitMethod(ours, "origin", parameters, options or {}, draws=draws, elects=elects)


_GAMMA = {"gamma": Parameter(float, "gamma", 0.01, "not base")}
_WINDOW = {"epsilon": Parameter(float, "epsilon", 0.15, "not base")}
_CHANGED = {"epsilon": Parameter(float, "epsilon", 1e-5)}
_TASK_VECTORS = {"task_vectors": True}
_WHOLE = {"whole": True}
_ONE, _PAIR = (1, 1), (2, 2)

METHODS: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod(
        "simple",
        "input",
        {"weight": Parameter(float, COEFFICIENT, scope="input"), "normalize": _ON},
        switch=("normalize", "weighted_sum"),
    ),
    "slerp": MergekitMethod("slerp", "first", {"t": Parameter(float, "t")}, {"linear_above": 0.9995}, inputs=_PAIR),
    "nuslerp": MergekitMethod(
        "nuslerp",
        "origin if given",
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": Parameter(bool, "flatten", True),
            "nuslerp_row_wise": Parameter(bool, "row_wise", False),
        },
        with_base=_TASK_VECTORS,
        inputs=_PAIR,
    ),
    "multislerp": MergekitMethod(
        "multislerp",
        "origin if given",
        {"weight": _WEIGHT, "normalize_weights": _ON, "eps": Parameter(float, None, 1e-8)},
        {"steps": 0},
        with_base=_TASK_VECTORS,
        switch=("normalize_weights", None),
    ),
    "karcher": MergekitMethod(
        "karcher",
        "input",
        {"max_iter": Parameter(int, "steps", 10), "tol": Parameter(float, "tolerance", 1e-5)},
    ),
    "model_stock": MergekitMethod(
        "model_stock",
        "origin",
        {"filter_wise": Parameter(bool, "row_wise", False)},
        {"clamp": False},
        inputs=(2, None),
    ),
    "nearswap": MergekitMethod("nearswap", "first", {"t": Parameter(float, "t")}, inputs=_PAIR),
    "arcee_fusion": MergekitMethod("arcee_fusion", "origin", inputs=_ONE),
    "passthrough": MergekitMethod(
        "passthrough", "input", {"scale": Parameter(float, "scale", None, "input")}, inputs=_ONE
    ),
    "sce": MergekitMethod(
        "sce",
        "origin",
        {"select_topk": Parameter(float, "density", 1.0), "int8_mask": _INT8},
        {"masked": True, "equal_below": 1e-6},
    ),
    "ram": MergekitMethod("ram", "origin", _CHANGED),
    "ramplus_tl": MergekitMethod(
        "ram_plus", "origin", {"r": Parameter(float, "r", 0.1), "alpha": Parameter(float, "alpha", 0.2), **_CHANGED}
    ),
    "task_arithmetic": _task_vectors("task_arithmetic", normalize=False),
    "ties": _task_vectors("ties", normalize=True, rescale=False, elects=True),
    "dare_ties": _task_vectors("dare_ties", normalize=False, rescale=True, draws=True, elects=True),
    "dare_linear": _task_vectors("dare_linear", normalize=False, rescale=True, draws=True),
    "breadcrumbs": _task_vectors("breadcrumbs", normalize=False, rescale=False, more=_GAMMA, options=_WHOLE),
    "breadcrumbs_ties": _task_vectors(
        "breadcrumbs_ties", normalize=False, rescale=False, more=_GAMMA, options=_WHOLE, elects=True
    ),
    "della": _task_vectors("della", normalize=True, rescale=True, more=_WINDOW, draws=True, elects=True),
    "della_linear": _task_vectors("della_linear", normalize=False, rescale=True, more=_WINDOW, draws=True),
}  # fmt: skip

#: Parameters of any method: one that the method at hand does not take is skipped, as mergekit does, and told of.
KNOWN_PARAMETERS = sorted({name for method in METHODS.values() for name in method.parameters})
