"""Merges in float64, one tensor at a time, written for clarity from the papers, to hold results in bfloat16 against.

Each function takes a base (None where the method has none) and the contributors, in float64 and all with the same
coefficient, and gives the merged tensor; what is drawn at random is judged number by number (``explained``) instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import ties_reference

_ROUNDING = 8 * 2.0**-24  # of float32 sums, relative to the largest number that goes in

Reference = Callable[[Any, Sequence[Tensor], Mapping[str, Any]], Tensor]


def linear(base: Any, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The mean."""
    return sum(tuned[1:], start=tuned[0]) / len(tuned)


def passthrough(base: Any, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The only one."""
    return tuned[0]


def elected(kept: Sequence[Tensor]) -> Tensor:
    """The mean of what has the sign of the sum, plus where it is 0 (Yadav et al. 2023)."""
    stacked = torch.stack(list(kept))
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).double()
    agree = (stacked.sign() == sign) & (stacked != 0)
    return stacked.where(agree, 0.0).sum(0) / agree.sum(0).clamp_min(1)


def ties(base: Tensor, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The largest magnitudes of a tensor, elected."""
    return base + elected([_between(x - base, 0, int(options["density"] * x.numel())) for x in tuned])


def breadcrumbs(base: Tensor, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """Without the largest, the next largest of a tensor, added (Davari & Belilovsky 2024)."""
    keep, drop = (int(options[name] * base.numel()) for name in ("density", "gamma"))
    return base + options["scale"] * sum((_between(x - base, drop, keep) for x in tuned), start=torch.zeros_like(base))


def _between(delta: Tensor, drop: int, keep: int) -> Tensor:
    """The ``keep`` largest magnitudes after the ``drop`` largest, and all that equal the first or the last of them."""
    ascending = delta.abs().flatten().sort().values
    least, most = ascending[len(ascending) - drop - keep], ascending[len(ascending) - drop - 1]
    return delta.where((delta.abs() >= least) & (delta.abs() <= most), 0.0)


def sce(base: Tensor, tuned: Sequence[Tensor], options: Mapping[str, Any], slack: float = 0.0) -> Tensor:
    """Select, calculate, erase (Wan et al. 2024), with the base where nothing is selected.

    ``slack`` moves the smallest variance that is selected, relative to itself: float32 may see it elsewhere.
    """
    deltas = torch.stack([x - base for x in tuned])
    variance = deltas.var(0, unbiased=False)
    keep = int(options["density"] * int((variance > 0).sum()))
    if not keep:
        return base
    least = variance.flatten().topk(keep).values[-1] * (1 + slack)
    deltas = deltas.where(variance >= least, 0.0)
    squares = deltas.square().flatten(1).mean(1)
    weights = (squares / squares.sum()).reshape(-1, *[1] * base.dim())
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).double()
    agree = ((deltas.sign() == sign) & (deltas != 0)) * weights
    return base + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1e-300)


def slerp(base: Any, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """Shoemake 1985, of whole tensors, half way."""
    cosine = (tuned[0] * tuned[1]).sum() / (tuned[0].norm() * tuned[1].norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if float(angle) < 1e-6:
        return linear(None, tuned, options)
    return (tuned[0] + tuned[1]) * torch.sin(angle / 2) / torch.sin(angle)


def karcher(base: Any, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The mean on the sphere (Karcher 1977), times the mean length."""
    lengths = [x.norm() for x in tuned]
    points = [x / length for x, length in zip(tuned, lengths, strict=True)]
    mean = linear(None, points, options)
    mean = mean / mean.norm()
    for _ in range(60):
        step = torch.zeros_like(mean)
        for point in points:
            cosine = (point * mean).sum().clamp(-1, 1)
            away, angle = point - cosine * mean, torch.acos(cosine)
            step += away * (angle / away.norm()) / len(points) if float(away.norm()) > 1e-12 else 0.0
        size = step.norm()
        if float(size) < 1e-12:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * step / size
    return mean * (sum(lengths, start=torch.zeros(())) / len(lengths))


def model_stock(base: Tensor, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """Jang et al. 2024: between the base and the mean by the mean cosine of the differences."""
    deltas = [(x - base).flatten() for x in tuned]
    pairs = list(itertools.combinations(deltas, 2))
    lengths = [float(a.norm() * b.norm()) for a, b in pairs]
    cosine = sum(float(a @ b) / length if length else 0.0 for (a, b), length in zip(pairs, lengths, strict=True))
    cosine /= len(pairs)
    share = len(tuned) * cosine / (1 + (len(tuned) - 1) * cosine)
    return base + min(max(share, 0.0), 1.0) * (linear(None, tuned, {}) - base)


REFERENCES: dict[str, Reference] = {
    function.__name__: function
    for function in (linear, passthrough, ties, breadcrumbs, sce, slerp, karcher, model_stock)
}


def candidates(name: str, base: Tensor, tuned: Sequence[Tensor], options: Mapping[str, Any]) -> list[Tensor]:
    """Every result that a method with a random choice can have of rows: one for each set of those who keep a number."""
    density = options["density"]
    deltas = [x - base for x in tuned]
    scaled = []
    for delta in deltas:
        kept: Any = density
        if name == "della":
            ranks = delta.abs().reshape(len(delta), -1).argsort(dim=1, stable=True).argsort(dim=1).double()
            share = (ranks / max(ranks.shape[1] - 1, 1)).reshape(delta.shape)
            kept = density - options["epsilon"] + 2 * options["epsilon"] * share
        scaled.append(delta / kept)
    choices = itertools.product((0.0, 1.0), repeat=len(deltas))
    return [
        base + options["scale"] * elected([x * k for x, k in zip(scaled, choice, strict=True)]) for choice in choices
    ]


@dataclass(frozen=True)
class Judgement:
    """What was found of a result.

    Attributes:
        numbers: how many were looked at.
        differ: how many are not the reference rounded to bfloat16.
        unexplained: how many are not, even allowing for the rounding of float32 sums; of a method with a random
            choice, how many no choice explains.
        kept: of a method with a random choice, the share of numbers that are not the base's.
    """

    numbers: int
    differ: int
    unexplained: int
    kept: float | None = None


def judge(
    name: str,
    result: Path,
    models: Sequence[Path],
    base: Path,
    options: Mapping[str, Any],
    tolerance: float = 0.0,
    rows: int | None = None,
) -> Judgement:
    """Hold a result in bfloat16 against the reference.

    Args:
        name: of a method here, or ``dare_ties`` or ``della``.
        result, models, base: folders.
        options: of the method.
        tolerance: of an iteration that ends before its limit, relative to a tensor's largest number.
        rows: look at so many rows of each tensor only; for methods with a random choice.

    Raises:
        SystemExit: the result lacks a tensor.
    """
    places = [ties_reference.tensor_files(folder) for folder in (result, base, *models)]
    if set(places[0]) != set(places[1]):
        raise SystemExit(f"{result.name} has other tensors than the inputs")
    numbers = differ = unexplained = kept = 0
    for tensor in places[1]:
        found, origin, *tuned = (_read(place, tensor, rows) for place in places)
        origin, tuned = origin.double(), [x.double() for x in tuned]
        largest = max(float(x.abs().max()) for x in tuned)
        if name in REFERENCES:
            wanted = [REFERENCES[name](origin, tuned, options)]
            if name == "sce":
                wanted += [sce(origin, tuned, options, slack) for slack in (-1e-6, 1e-6)]
        else:
            matrix = origin.dim() > 1
            shaped = [x if matrix else x[None] for x in (origin, *tuned)]
            wanted = [x if matrix else x[0] for x in candidates(name, shaped[0], shaped[1:], options)]
        same = torch.stack([found == one.to(found.dtype) for one in wanted]).any(0)
        near = torch.stack([_near(found, one, largest * (_ROUNDING + tolerance)) for one in wanted]).any(0)
        numbers += found.numel()
        differ += int((~same).sum())
        unexplained += int((~near & ~same).sum())
        kept += int((found.double() != origin).sum())
    return Judgement(numbers, differ, unexplained, None if name in REFERENCES else kept / numbers)


def _near(found: Tensor, wanted: Tensor, beyond: float) -> Tensor:
    """Whether numbers are ``wanted`` rounded to bfloat16, give or take."""
    _, exponent = torch.frexp(wanted)
    half = torch.ldexp(torch.ones_like(wanted), (exponent - 9).clamp_min(-134))  # half a unit in the last of 8 places
    return (found.double() - wanted).abs() <= half + beyond


def _read(places: dict[str, Path], name: str, rows: int | None) -> Tensor:
    with safe_open(places[name], "pt") as file:
        whole: Tensor = file.get_tensor(name)
    return whole if rows is None or whole.dim() < 2 else whole[:rows]
