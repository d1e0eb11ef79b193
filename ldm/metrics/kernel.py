"""The kernel distance between the features of two sets of images (Binkowski et al. 2018): the KID, with Inception.

It is the squared maximum mean discrepancy under k(x, y) = (x y / D + 1)^3, estimated without bias. Unlike that of the
Fréchet distance, its mean does not depend on the number of images, so it suits small sets. It can be negative.
"""

from __future__ import annotations

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError

BLOCK = 1024  # rows of the kernel that are computed together
MAX_FEATURES = 10_000  # 82 MB of Inception features
HALVES = 100  # random halves that the standard deviation is computed from


class FeatureSample:
    """Collects features from batches: all of them, or a random sample of `max_count`, which bounds the memory.

    The sample (Vitter's algorithm R) is a function of the seed and of the order of the features.
    """

    def __init__(self, max_count: int = MAX_FEATURES, seed: int = 0) -> None:
        self.max_count = max_count
        self.count = 0  # of all features, in the sample or not
        self._rows: list[np.ndarray] = []
        self._rng = draws(seed, "feature sample", 0)

    def add(self, features: np.ndarray) -> None:
        """Add a batch (N, D)."""
        for row in features:
            self.count += 1
            if len(self._rows) < self.max_count:
                self._rows.append(row.copy())
            elif (index := int(self._rng.integers(self.count))) < self.max_count:
                self._rows[index] = row.copy()

    @property
    def features(self) -> np.ndarray:
        """The features, (N, D)."""
        return np.stack(self._rows)


def kernel_distance(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the kernel distance of features (N, D) and (M, D), and its standard deviation.

    The standard deviation is that over random halves of both sets, drawn without replacement. The spread of an estimate
    over halves is the standard error of the estimate over all images (the delete-half jackknife). The distance uses
    all images. Means over subsets of 1,000, as published, have the same expectation.

    Raises:
        UserError: A set has fewer than four images, so that its halves have no distance.
    """
    if min(len(x), len(y)) < 4:
        raise UserError(f"a kernel distance needs 4 images or more in each set, not {min(len(x), len(y))}")
    rng = draws(seed, "kernel distance", 0)
    values = weighted_kernel_distances(x, y, _choices(rng, len(x)), _choices(rng, len(y)))
    return float(values[0]), float(values[1:].std(ddof=1))


def weighted_kernel_distances(x: np.ndarray, y: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray) -> np.ndarray:
    """Return the kernel distances (K,) of features (N, D) and (M, D) for K choices of them.

    A choice says how often each image counts: zeros and ones for a subset, the number of draws for a bootstrap sample.
    Pairs of an image with itself do not count, however often it was drawn, because they would add a positive bias.

    Args:
        x: Features of one set, (N, D).
        y: Features of the other, (M, D).
        weights_x: The choices of `x`, (N, K). Each must hold at least two images.
        weights_y: The choices of `y`, (M, K).
    """
    within_x, within_y = _sums(x, x, weights_x, weights_x), _sums(y, y, weights_y, weights_y)
    between = _sums(x, y, weights_x, weights_y)
    n, m = weights_x.sum(axis=0), weights_y.sum(axis=0)
    pairs_x, pairs_y = (sums**2 - (weights**2).sum(axis=0) for sums, weights in ((n, weights_x), (m, weights_y)))
    return within_x / pairs_x + within_y / pairs_y - 2.0 * between / (n * m)


def _choices(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (count, 1 + HALVES) of zeros and ones that choose all images, then random halves."""
    chosen = np.ones((count, 1 + HALVES))
    for i in range(HALVES):
        chosen[rng.permutation(count)[count // 2 :], 1 + i] = 0.0
    return chosen


def _sums(x: np.ndarray, y: np.ndarray, chosen_x: np.ndarray, chosen_y: np.ndarray) -> np.ndarray:
    """Sum the kernel over the rows and columns of each choice, without the diagonal if x is y."""
    total = np.zeros(chosen_x.shape[1])
    transposed = np.asarray(y, np.float64).T
    for start in range(0, len(x), BLOCK):
        block = np.asarray(x[start : start + BLOCK], np.float64)
        kernel = (block @ transposed / x.shape[1] + 1.0) ** 3
        if x is y:
            kernel[np.arange(len(block)), start + np.arange(len(block))] = 0.0
        total += (chosen_x[start : start + BLOCK] * (kernel @ chosen_y)).sum(axis=0)
    return total
