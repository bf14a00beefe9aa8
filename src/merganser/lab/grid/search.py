"""Coefficients to try: a grid for two contributors, Dirichlet samples for more."""

from __future__ import annotations

import numpy as np

from merganser.lab.grid.config import Search


def candidates(search: Search, contributors: int, seed: int) -> list[tuple[float, ...]]:
    """Coefficients that sum to 1, the uniform ones first; none is 0.

    The ends of the grid are at 0.001: a contributor may be the only one that votes on a label.

    Args:
        search: how many.
        contributors: how many models are merged.
        seed: of the samples.
    """
    uniform = (1 / contributors,) * contributors
    if contributors == 2:
        steps = np.linspace(0, 1, search.grid).clip(0.001, 0.999)
        found: list[tuple[float, ...]] = [(float(1 - step), float(step)) for step in steps]
    else:
        drawn = np.random.default_rng(seed).dirichlet(np.ones(contributors), search.samples)
        found = [tuple(float(value) for value in row) for row in drawn]
    return [uniform, *(one for one in found if not np.allclose(one, uniform))]
