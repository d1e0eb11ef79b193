"""How far a score moves when the images are drawn again (Efron 1979)."""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.data.draws import draws


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """(resamples,) values of `statistic(indices)` for `count` indices drawn from 0 to count - 1 with putting back.

    Several scores of the same prompts stay paired when they are computed from the same indices: give a statistic that
    is their difference, or the same seed. The standard deviation of the values is the score's.
    """
    rng = draws(seed, "bootstrap", 0)
    return np.array([statistic(rng.integers(0, count, count)) for _ in range(resamples)])


def bootstrap_deviation(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int = 200, seed: int = 0
) -> float:
    """The standard deviation of `bootstrap`."""
    return float(bootstrap(statistic, count, resamples, seed).std(ddof=1))
