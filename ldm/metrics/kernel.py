"""The kernel distance between two sets of images' features (Binkowski et al. 2018): the KID, with Inception's.

The squared maximum mean discrepancy under k(x, y) = (x y / D + 1)^3, estimated without bias: unlike the Fréchet
distance's its mean does not depend on how many images there are, so it suits small sets. It may come out below zero.
"""

from __future__ import annotations

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError

BLOCK = 1024  # rows of the kernel at a time
KEPT = 10_000  # features held at most, 82 MB of Inception's


class FeatureSample:
    """Features that come in batches: all of them, or a random `most`, so that memory does not grow with the images
    (Vitter's algorithm R; a function of the seed and of the order).
    """

    def __init__(self, most: int = KEPT, seed: int = 0) -> None:
        self.most, self._seen = most, 0
        self._rows: list[np.ndarray] = []
        self._rng = draws(seed, "feature sample", 0)

    def add(self, features: np.ndarray) -> None:
        """Take in a batch (N, D)."""
        for row in features:
            self._seen += 1
            if len(self._rows) < self.most:
                self._rows.append(row.copy())
            elif (place := int(self._rng.integers(self._seen))) < self.most:
                self._rows[place] = row.copy()

    @property
    def features(self) -> np.ndarray:
        """(N, D)."""
        return np.stack(self._rows)


def kernel_distance(x: np.ndarray, y: np.ndarray, halves: int = 100, seed: int = 0) -> tuple[float, float]:
    """(distance, its standard deviation) for features (N, D) and (M, D).

    The distance takes all images. Its deviation is that over `halves` random halves of both sets, drawn without
    putting back: the spread of an estimate over halves is the standard error of the estimate over all (the delete-half
    jackknife). Means over subsets of 1,000, as published, have the same expectation.

    Raises UserError for fewer than four images a set, whose halves have no distance.
    """
    if min(len(x), len(y)) < 4:
        raise UserError(f"a kernel distance wants 4 images or more in each set, not {min(len(x), len(y))}")
    rng = draws(seed, "kernel distance", 0)
    chosen_x, chosen_y = _choices(rng, len(x), halves), _choices(rng, len(y), halves)
    within_x, within_y = _sums(x, x, chosen_x, chosen_x), _sums(y, y, chosen_y, chosen_y)
    between = _sums(x, y, chosen_x, chosen_y)
    n, m = chosen_x.sum(axis=0), chosen_y.sum(axis=0)
    values = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2.0 * between / (n * m)
    return float(values[0]), float(values[1:].std(ddof=1))


def _choices(rng: np.random.Generator, count: int, halves: int) -> np.ndarray:
    """(count, 1 + halves) of zeros and ones: everything, then random halves."""
    chosen = np.ones((count, 1 + halves))
    for i in range(halves):
        chosen[rng.permutation(count)[count // 2 :], 1 + i] = 0.0
    return chosen


def _sums(x: np.ndarray, y: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """For each choice: the kernel's sum over its rows and columns, without the diagonal where x is y."""
    total = np.zeros(rows.shape[1])
    transposed = np.asarray(y, np.float64).T
    for start in range(0, len(x), BLOCK):
        block = np.asarray(x[start : start + BLOCK], np.float64)
        kernel = (block @ transposed / x.shape[1] + 1.0) ** 3
        if x is y:
            kernel[np.arange(len(block)), start + np.arange(len(block))] = 0.0
        total += (rows[start : start + BLOCK] * (kernel @ columns)).sum(axis=0)
    return total
