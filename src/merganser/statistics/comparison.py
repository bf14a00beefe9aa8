"""How much two statistics files differ: what their headers say, and each tensor's relative Frobenius distance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, linalg

from merganser.statistics.reading import Statistics


@dataclass(frozen=True)
class Distance:
    """How far one statistic of a layer's input, of an embedding or of a parameter lies from another file's.

    Attributes:
        kind: ``gram``, ``mean``, ``count`` or ``fisher``.
        name: key of the input, module of the embedding, or parameter.
        relative: ‖A − B‖/‖A‖ (Frobenius), 0 where both are zero; None where only one file has the statistic, or in
            another shape.
        only: the file that has it, ``A`` or ``B``; ``both`` otherwise.
    """

    kind: str
    name: str
    relative: float | None
    only: str = "both"


def header_differences(a: Statistics, b: Statistics) -> dict[str, tuple[str, str]]:
    """Fields of the headers that differ, storage included, as text; hashes of tensors by their number."""
    left, right = a.header.model_dump(mode="json"), b.header.model_dump(mode="json")
    found = {} if a.storage == b.storage else {"storage": (a.storage, b.storage)}
    for key in left:
        if left[key] == right.get(key):
            continue
        if key not in right:  # hashes of another kind
            found[key] = ("as said", "hashes of another kind")
            continue
        if key.startswith("tensor_"):
            names = sorted(left[key].keys() | right[key].keys())
            differing = [name for name in names if left[key].get(name) != right[key].get(name)]
            found[key] = (f"{len(differing)} of {len(names)} weight tensors differ", ", ".join(differing[:3]))
        elif key == "layers":
            found[key] = (f"{len(left[key])} layers", f"{len(right[key])} layers, or other rows")
        elif key == "notes":
            found[key] = ("; ".join(set(left[key]) - set(right[key])), "; ".join(set(right[key]) - set(left[key])))
        else:
            found[key] = (str(left[key]), str(right[key]))
    return found


def distances(a: Statistics, b: Statistics) -> Iterator[Distance]:
    """Distances of everything that either file has, tensor by tensor; Gram matrices as a merge would use them.

    Token counts are compared as shares of all tokens, since that is what a merge uses.
    """
    ours, theirs = _statistics(a), _statistics(b)
    for kind, name in dict.fromkeys([*ours, *theirs]):
        if (kind, name) not in theirs or (kind, name) not in ours:
            yield Distance(kind, name, None, "A" if (kind, name) in ours else "B")
            continue
        left, right = _value(a, kind, name), _value(b, kind, name)
        yield Distance(kind, name, _relative(left, right) if left.shape == right.shape else None)


def _statistics(statistics: Statistics) -> list[tuple[str, str]]:
    found = [(kind, input) for input in statistics.inputs for kind in ("gram", "mean")]
    others = (name.partition(".") for name in statistics.others)
    return [*found, *((kind, key) for kind, _, key in others)]


def _value(statistics: Statistics, kind: str, name: str) -> Tensor:
    value: Tensor = getattr(statistics, kind)(name)  # its method of that name
    return value.double() / value.sum().clamp_min(1) if kind == "count" else value


def _relative(left: Tensor, right: Tensor) -> float:
    size = float(linalg.vector_norm(left.double()))
    distance = float(linalg.vector_norm(left.double() - right.double()))
    if not distance:
        return 0.0
    return distance / size if size else math.inf
