"""mergekit's meaning of a configuration in float64 numpy, written from its documentation and formulas.

It works on whole models in memory and shares nothing with the package: the YAML's own values, tensors by name, and for
each output tensor the parameters that mergekit would resolve for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Model = Mapping[str, Array]
LAYER = re.compile(r"\.layers?\.(\d+)\.")
BEHIND = re.compile(r"(^|\.)(lm_head|norm|classifier|pooler)\.")  # of tensors outside of layers


def value_at(setting: Any, name: str, t: float) -> Any:
    """A parameter's value for a tensor: conditions first, then a gradient's value at t."""
    conditions = setting if isinstance(setting, list) and any(isinstance(one, dict) for one in setting) else [setting]
    for one in conditions:
        value = one
        if isinstance(one, dict):
            value, text = one["value"], one.get("filter")
            if text not in (None, "*") and text not in name:
                continue
        if not isinstance(value, list):
            return float(value) if isinstance(value, str) else value
        if isinstance(value[0], bool):
            return value[int(t * (len(value) - 1))]
        return float(np.interp(t * (len(value) - 1), range(len(value)), value))
    return None


def parameter(places: Sequence[Mapping[str, Any] | None], key: str, name: str, t: float, default: Any = None) -> Any:
    """The value at the innermost place that has one for this tensor."""
    for place in places:
        if place and key in place and (found := value_at(place[key], name, t)) is not None:
            return found
    return default


def merged(conf: Mapping[str, Any], models: Mapping[str, Model]) -> dict[str, Array]:
    """Every tensor of the result."""
    base = conf.get("base_model")
    if "models" in conf:
        sources = [dict(one) for one in conf["models"]]
        if base is not None and all(one["model"] != base for one in sources):
            sources.append({"model": base})
        depth = 1 + max(int(match[1]) for name in models[sources[0]["model"]] if (match := LAYER.search(name)))
        for one in sources:
            one["layer_range"] = [0, depth]
        slices = [{"sources": sources}]
    else:
        slices = conf["slices"]
    found: dict[str, Array] = {}
    at = 0
    for number, part in enumerate(slices):
        sources = part["sources"]
        first, last = sources[0]["layer_range"]
        size = last - first
        names = list(models[sources[0]["model"]])
        for layer in range(size):
            t = layer / (size - 1) if size > 1 else 1.0
            for name in names:
                if (match := LAYER.search(name)) and int(match[1]) == 0:
                    inputs = [_layer(name, one["layer_range"][0] + layer) for one in sources]
                    found[_layer(name, at + layer)] = _tensor(conf, part, inputs, _layer(name, at + layer), t, models)
        at += size
        for name in names:
            if LAYER.search(name):
                continue
            behind = bool(BEHIND.search(name))
            if (behind and number == len(slices) - 1) or (not behind and number == 0):
                found[name] = _tensor(conf, part, [name] * len(sources), name, 0.0, models)
    return found


def _layer(name: str, number: int) -> str:
    return LAYER.sub(lambda match: match[0].replace(match[1], str(number)), name, count=1)


def _tensor(
    conf: Mapping[str, Any],
    part: Mapping[str, Any],
    inputs: Sequence[str],
    name: str,
    t: float,
    models: Mapping[str, Model],
) -> Array:
    base, outer = conf.get("base_model"), [part.get("parameters"), conf.get("parameters")]
    tensors, own = [], []
    origin = None
    for source, stored in zip(part["sources"], inputs, strict=True):
        tensor = models[source["model"]][stored].astype(np.float64)
        if source["model"] == base:
            origin = tensor
        tensors.append(tensor)
        own.append((source["model"] == base, [source.get("parameters"), *outer], stored))

    def each(key: str, default: Any = None, *, all_of_them: bool = False) -> list[Any]:
        return [parameter(p, key, s, t, default) for is_base, p, s in own if all_of_them or not is_base]

    def shared(key: str, default: Any = None) -> Any:
        return parameter(outer, key, name, t, default)

    others = [tensor for tensor, (is_base, _, _) in zip(tensors, own, strict=True) if not is_base]
    method = conf["merge_method"]
    if method == "linear":
        weights = each("weight", all_of_them=True)
        total = sum(w * x for w, x in zip(weights, tensors, strict=True))
        return total / sum(weights) if shared("normalize", True) else total
    if method == "passthrough":
        return tensors[0] * each("scale", 1.0, all_of_them=True)[0]
    if method == "slerp":
        return _slerp(origin, others[0], shared("t"), 0.9995)
    if method == "nearswap":
        difference = np.abs(origin - others[0])
        weight = np.clip(shared("t") / np.maximum(difference, 1e-6), 0, 1)
        return weight * others[0] + (1 - weight) * origin
    if method == "karcher":
        return _karcher(tensors, shared("max_iter", 10), shared("tol", 1e-5))
    if method == "nuslerp":
        weights = each("weight")
        zero = 0.0 if origin is None else origin
        x, y = (one - zero for one in others)
        along = shared("nuslerp_flatten", True)
        return zero + _slerp(x, y, weights[1] / sum(weights), 1.0, rows=not along)
    if method == "multislerp":
        weights = np.array(each("weight")) / sum(each("weight"))
        zero = 0.0 if origin is None else origin
        points = [one - zero for one in others]
        norms = [np.linalg.norm(one) for one in points]
        mean = sum(w * x / n for w, x, n in zip(weights, points, norms, strict=True))
        return zero + mean / np.linalg.norm(mean) * float(weights @ norms)
    if method == "model_stock":
        return _stock(origin, others, shared("filter_wise", False))
    deltas = [one - origin for one in others]
    if method == "sce":
        return origin + _sce(deltas, shared("select_topk", 1.0))
    if method in ("ram", "ramplus_tl"):
        plus = (shared("r", 0.1), shared("alpha", 0.2)) if method == "ramplus_tl" else None
        return origin + _ram(deltas, shared("epsilon", 1e-5), plus)
    weights, densities = each("weight"), each("density", 1.0)
    if "breadcrumbs" in method:
        gammas = each("gamma", 0.01)
        deltas = [_crumbs(x, d, g) for x, d, g in zip(deltas, densities, gammas, strict=True)]
    elif method == "ties":
        deltas = [_trim(x, d) for x, d in zip(deltas, densities, strict=True)]
    elif any(density < 1 for density in densities) and method != "task_arithmetic":
        raise ValueError("what is dropped at random has no formula")
    deltas = [w * x for w, x in zip(weights, deltas, strict=True)]
    normalize = shared("normalize", method in ("ties", "della"))
    if "ties" in method or method == "della":
        sign = np.where(sum(deltas) >= 0, 1, -1)
        masks = [np.sign(x) == sign for x in deltas]
        total = sum(np.where(m, x, 0) for m, x in zip(masks, deltas, strict=True))
        divisor = sum(w * m for w, m in zip(weights, masks, strict=True))
        divisor = np.where(divisor == 0, 1, divisor)
    else:
        total, divisor = sum(deltas), sum(weights)
    return origin + shared("lambda", 1.0) * (total / divisor if normalize else total)


def _slerp(x: Array, y: Array, t: float, linear_above: float, *, rows: bool = False) -> Array:
    axis = -1 if rows and x.ndim > 1 else None
    norms = [np.linalg.norm(one, axis=axis, keepdims=axis is not None) for one in (x, y)]
    cosine = np.sum(x * y, axis=axis, keepdims=axis is not None) / (norms[0] * norms[1])
    angle = np.arccos(np.clip(cosine, -1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        round_ = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    return np.where((np.abs(cosine) > linear_above) | (np.sin(angle) < 1e-8), (1 - t) * x + t * y, round_)


def _karcher(tensors: Sequence[Array], steps: int, tolerance: float) -> Array:
    norms = [np.linalg.norm(one) for one in tensors]
    units = [one / norm for one, norm in zip(tensors, norms, strict=True)]
    mean = sum(units) / len(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = float(np.clip(np.sum(mean * unit), -1, 1))
            angle = np.arccos(cosine)
            if angle >= tolerance:
                tangent += angle / np.sin(angle) * (unit - cosine * mean) / len(units)
        length = np.linalg.norm(tangent)
        if length < tolerance:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
        mean = mean / np.linalg.norm(mean)
    return float(np.mean(norms)) * mean


def _stock(base: Array, others: Sequence[Array], rows: bool) -> Array:
    def flat(one: Array) -> Array:
        return one.reshape(1, -1) if not rows or one.ndim < 2 else one

    deltas = [flat(one - base) for one in others]
    cosines = [
        (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
        for n, x in enumerate(deltas)
        for y in deltas[n + 1 :]
    ]
    cosine, count = np.mean(cosines, 0)[:, None], len(others)
    t = count * cosine / (1 + (count - 1) * cosine)
    return (t * flat(sum(others) / count) + (1 - t) * flat(base)).reshape(base.shape)


def _largest(x: Array, keep: int) -> Array:
    """A mask of so many numbers."""
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-x.ravel(), kind="stable")[:keep]] = True
    return mask.reshape(x.shape)


def _trim(delta: Array, density: float) -> Array:
    if density >= 1:
        return delta
    return np.where(_largest(np.abs(delta), max(1, int(density * delta.size)) if density > 0 else 0), delta, 0)


def _crumbs(delta: Array, density: float, gamma: float) -> Array:
    if density >= 1:
        return delta
    keep, top = int(density * delta.size), int(gamma * delta.size)
    bottom = max(0, delta.size - keep - top)
    order = np.argsort(np.abs(delta).ravel(), kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[order[bottom : bottom + keep]] = True
    return np.where(mask.reshape(delta.shape), delta, 0)


def _sce(deltas: Sequence[Array], share: float) -> Array:
    stack = np.stack(deltas)
    if share < 1:
        variance = stack.var(0)
        stack = stack * _largest(variance, int(np.count_nonzero(variance) * share))
    weights = np.array([np.mean(one**2) for one in stack])
    weights = weights / weights.sum() if weights.sum() >= 1e-6 else np.full(len(weights), 1 / len(weights))
    sign = np.where(stack.sum(0) >= 0, 1, -1)
    agree = (np.sign(stack) == sign) * weights.reshape(-1, *[1] * deltas[0].ndim)
    return (stack * agree).sum(0) / np.maximum(agree.sum(0), 1e-6)


def _ram(deltas: Sequence[Array], epsilon: float, plus: tuple[float, float] | None) -> Array:
    changed = [np.abs(one) > epsilon for one in deltas]
    count = sum(one.astype(int) for one in changed)
    total = np.zeros_like(deltas[0])
    for delta, mask in zip(deltas, changed, strict=True):
        factor = 1.0
        if plus is not None:
            shared, alone = (mask & (count > 1)).sum(), (mask & (count == 1)).sum()
            factor = 1 + plus[0] * min(shared / max(alone, epsilon), plus[1])
        total += np.where(mask, np.where(count == 1, factor * delta, delta / np.maximum(count, 1)), 0)
    return total
