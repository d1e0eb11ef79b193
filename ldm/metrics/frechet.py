"""The Fréchet distance between the features of two sets of images (Heusel et al. 2017): the FID, with Inception.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

The last trace is the sum of the singular values of F1 F2^T for any factors with Fi^T Fi = Si. The factors come from the
eigenvalues of the symmetric matrices, or from the features themselves. So nothing becomes complex, and singular
covariances, which fewer images than features have, need no number added to their diagonal.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.files.archives import Archive
from ldm.files.atomic import atomic_path
from ldm.files.npy import NotNumpy, read_array, read_header
from ldm.files.paths import writing

MAX_BYTES = 129 << 20  # size of an array in saved statistics: the covariance of 4096 features (Inception has 2048)
MERGED_AT_ONCE = 512  # features that are merged together: every merge passes over the whole covariance


class FeatureStatistics:
    """Accumulates mean (D,) and covariance (D, D), divided by n - 1, of batches of features in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._merged = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))
        self._pending: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Add a batch (N, D)."""
        self._pending.append(features.astype(np.float64))
        self.count += len(features)
        if self.count - self._merged >= MERGED_AT_ONCE:
            self._merge()

    @property
    def mean(self) -> np.ndarray:
        """The mean, (D,)."""
        self._merge()
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """The covariance, (D, D). Raises UserError for fewer than two images."""
        _check_count(self.count)
        self._merge()
        return self._scatter / (self.count - 1)

    def _merge(self) -> None:
        """Merge pending features by their own mean (Chan et al. 1983), so that no digits cancel."""
        if not self._pending:
            return
        features = np.concatenate(self._pending)
        self._pending = []
        if not self._merged:
            self._mean, self._scatter = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
        mean = features.mean(axis=0)
        step = mean - self._mean
        share = len(features) / self.count
        # The shift of the mean is one more row of the product.
        rows = np.concatenate([features - mean, step[None] * np.sqrt(self._merged * share)])
        self._scatter += rows.T @ rows
        self._mean = self._mean + step * share
        self._merged = self.count


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """Return the distance between two normal distributions, given by means (D,) and covariances (D, D)."""
    return _distance(mean1, _factor(covariance1), mean2, _factor(covariance2))


def frechet_of_features(features1: np.ndarray, features2: np.ndarray) -> float:
    """Return the distance between features (N, D) and (M, D). It needs no covariances: fast for small N and M."""
    means, roots = [], []
    for features in (features1, features2):
        features = np.asarray(features, np.float64)
        _check_count(len(features))
        means.append(features.mean(axis=0))
        roots.append(np.asarray(np.linalg.qr((features - means[-1]) / np.sqrt(len(features) - 1), mode="r")))
    return _distance(means[0], roots[0], means[1], roots[1])


def _check_count(count: int) -> None:
    if count < 2:
        raise UserError("a Fréchet distance needs two images or more in each set: one has no covariance")


def _factor(covariance: np.ndarray) -> np.ndarray:
    """Return F (rank, D) with F^T F = covariance, without the eigenvalues that are only rounding errors."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def _distance(mean1: np.ndarray, root1: np.ndarray, mean2: np.ndarray, root2: np.ndarray) -> float:
    step = np.asarray(mean1, np.float64) - mean2
    product = root1 @ root2.T
    shared = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    return float(step @ step + (root1**2).sum() + (root2**2).sum() - 2.0 * shared)


@dataclass(frozen=True)
class SavedStatistics:
    """Mean (D,) and covariance (D, D) as pytorch-fid saves them, with `count` and `network` if this project did."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    network: str | None = None


def write_statistics(path: str | Path, statistics: FeatureStatistics, network: str) -> None:
    """Write an .npz that pytorch-fid reads, with the number of images and the identity of the network."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: statistics are written as .npz, not {path.suffix or 'without a suffix'}")
    mean, covariance, count = statistics.mean, statistics.covariance, statistics.count
    with writing(path), atomic_path(path) as temporary:
        np.savez_compressed(temporary, mu=mean, sigma=covariance, count=count, network=np.array(network))


def read_statistics(path: str | os.PathLike) -> SavedStatistics:
    """Read an .npz with `mu` and `sigma`. Raises UserError for another file, and for impossible values."""
    way = "give a folder of images or statistics in an .npz, such as --save_stats writes"
    arrays = {}
    with Archive(path, "an .npz file of numbers", way) as archive:
        for name in ("mu", "sigma", "count", "network"):
            if f"{name}.npy" in archive.members:
                raw = archive.read(f"{name}.npy", MAX_BYTES)
                file = io.BytesIO(raw)
                try:
                    arrays[name] = read_array(file, read_header(file, len(raw)))
                except NotNumpy as error:
                    raise UserError(f"{path} is not an .npz file of numbers ({name}: {error}): {way}") from None
    if "mu" not in arrays or "sigma" not in arrays:
        raise UserError(f"{path} has no {'mu' if 'mu' not in arrays else 'sigma'}: write it with --save_stats")
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"{path}: mu and sigma are {mean.dtype} and {covariance.dtype}, not real numbers")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}, expected (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds values that are not finite: compute the statistics again")
    largest = np.abs(covariance).max(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-6 * largest or (np.diag(covariance) < 0).any():
        raise UserError(f"{path}: sigma is not a covariance (it is not symmetric, or negative on its diagonal)")
    count, network = arrays.get("count"), arrays.get("network")
    return SavedStatistics(
        mean,
        covariance,
        int(count) if count is not None and count.shape == () and count.dtype.kind in "iu" else None,
        str(network) if network is not None and network.shape == () and network.dtype.kind == "U" else None,
    )
