"""How sure a score is: the bootstrap over examples, the same samples for every model on the same data.

Efron 1979; paired as in Berg-Kirkpatrick et al. 2012, "An Empirical Investigation of Statistical Significance
in NLP".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SEED = 20230501  # the month of ICLR 2023


def resample(
    judgements: np.ndarray, metric: Callable[[np.ndarray], float], samples: int, seed: int = SEED
) -> np.ndarray:
    """The metric on bootstrap samples: float64 (samples,).

    Args:
        judgements: (examples, …).
        metric: of judgements.
        samples: how many samples are drawn, each of as many examples as there are, with replacement.
        seed: of the draws; with as many examples, the same seed draws the same examples.
    """
    generator = np.random.default_rng(seed)
    count = len(judgements)
    draws = (generator.integers(0, count, count) for _ in range(samples))
    return np.array([metric(judgements[draw]) for draw in draws], np.float64)


def standard_error(values: np.ndarray) -> float | None:
    """The standard deviation of bootstrap values; None where there are fewer than two finite ones."""
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else None


def difference(value: float, first: float, values: np.ndarray, firsts: np.ndarray) -> dict[str, float] | None:
    """The difference of two scores with the middle 95 % of its paired bootstrap values."""
    paired = values - firsts
    if not len(paired) or not np.isfinite(paired).all():
        return None
    low, high = np.quantile(paired, [0.025, 0.975])
    return {"difference": value - first, "low": float(low), "high": float(high)}
