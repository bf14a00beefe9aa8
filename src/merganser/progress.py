"""Progress bars with rate and remaining time, on standard error, for anything that takes over two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def _options(description: str, unit: str) -> dict[str, Any]:
    return {
        "desc": description,
        "unit": unit,
        "file": sys.stderr,
        "delay": 2.0,  # anything shorter needs no bar
        "mininterval": 0.2 if sys.stderr.isatty() else 10.0,  # logs get a line now and then
        "dynamic_ncols": True,
        "smoothing": 0.1,
        "leave": False,
    }


def bar(total: int, description: str, unit: str = "it", *, scale: bool = False) -> tqdm[Any]:
    """A bar to be advanced with ``.update(n)`` and used as a context manager.

    Args:
        total: how many units the work has.
        description: what is being done.
        unit: name of a unit; ``scale`` writes large counts as k, M, G.
    """
    return tqdm(total=total, unit_scale=scale, **_options(description, unit))


def track(items: Iterable[T], description: str, unit: str = "it", total: int | None = None) -> Iterable[T]:
    """Iterate over ``items`` behind a bar."""
    return tqdm(items, total=total, **_options(description, unit))
