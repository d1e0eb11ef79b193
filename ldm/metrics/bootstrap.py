"""The bootstrap (Efron 1979): how much a score varies with the choice of images."""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.data.draws import draws


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """Compute a statistic on samples that are drawn with replacement.

    Scores of the same prompts stay paired if they are computed from the same indices. Use a statistic that is their
    difference, or the same seed.

    Args:
        statistic: Computes the score from indices (count,) of the images.

    Returns:
        The values, (resamples,). Their standard deviation is that of the score.
    """
    return np.array([statistic(indices) for indices in resampled_indices(count, resamples, seed)])


def resampled_indices(count: int, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """Return the indices (resamples, count) of samples that are drawn with replacement from `count` images."""
    rng = draws(seed, "bootstrap", 0)
    return np.stack([rng.integers(0, count, count) for _ in range(resamples)])


def bootstrap_std(statistic: Callable[[np.ndarray], float], count: int, resamples: int = 200) -> float:
    """Return the standard deviation of `bootstrap`."""
    return float(bootstrap(statistic, count, resamples).std(ddof=1))
