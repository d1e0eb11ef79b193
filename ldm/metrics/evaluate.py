"""Scores of sets of image files, for the evaluation tools, the demo and the comparison with diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.metrics.clip_score import clip_scores
from ldm.metrics.feature_batches import FeatureBatches
from ldm.metrics.frechet import FeatureStatistics, frechet_distance, read_statistics, write_statistics
from ldm.metrics.kernel import FeatureSample, kernel_distance
from ldm.metrics.networks import ClipNetwork, ImageNetwork


@dataclass(frozen=True)
class ImageSet:
    """The features of a set of images, as the distances need them.

    Attributes:
        mean: (D,).
        covariance: (D, D).
        count: Number of images. None for statistics that another program saved.
        sample: Features for the KID. None for saved statistics.
        broken: The images that were left out, as (path, fault).
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    sample: FeatureSample | None
    broken: Sequence[tuple[Path, str]] = ()


@dataclass(frozen=True)
class Distances:
    """FID, and KID with its standard deviation. With another network than Inception they only compare with themselves.

    The KID is None if a set has fewer than four images or is given by its statistics.
    """

    fid: float
    kid: float | None
    kid_std: float | None


@dataclass(frozen=True)
class EncodedImages:
    """The features of a list of images.

    Attributes:
        indices: Which images of the list, (N,).
        features: Their features, unit vectors (N, D).
        broken: The images that were left out, as (path, fault).
    """

    indices: np.ndarray
    features: np.ndarray
    broken: Sequence[tuple[Path, str]]


def measure_images(
    paths: Sequence[Path],
    network: ImageNetwork,
    batch_size: int,
    label: str = "images",
    save_to: Path | None = None,
    process_count: int = 1,
) -> ImageSet:
    """Compute the statistics of images, and save them to an .npz if `save_to` is given.

    Of several processes the first one calls this, and each other one calls `send_features`.

    Raises UserError if fewer than two images can be read.
    """
    batches = FeatureBatches(paths, network, batch_size, label, process_count=process_count)
    statistics, sample = FeatureStatistics(), FeatureSample()
    for _, features in batches:
        statistics.add(features)
        sample.add(features)
    if statistics.count < 2:
        raise UserError(f"{paths[0].parent}: only one of the {label} can be read: a Fréchet distance needs two or more")
    if save_to is not None:
        write_statistics(save_to, statistics, network.identity)
    return ImageSet(statistics.mean, statistics.covariance, statistics.count, sample, batches.broken)


def read_image_set(path: str | Path, network: ImageNetwork) -> ImageSet:
    """Read the statistics in an .npz. Raises UserError if they are known to come from another network."""
    saved = read_statistics(path)
    if len(saved.mean) != network.dimensions:
        raise UserError(
            f"{path} holds {len(saved.mean)} features, {network.name} has {network.dimensions}: it was made with "
            "another network"
        )
    # The hash and the preprocessing decide: earlier versions gave the nano CLIP another name.
    if (
        saved.network is not None
        and saved.network.partition(", sha256 ")[2] != network.identity.partition(", sha256 ")[2]
    ):
        raise UserError(
            f"{path} was made with {saved.network}, not {network.identity}: make it again with --save_stats"
        )
    return ImageSet(saved.mean, saved.covariance, saved.count, None)


def distances(real: ImageSet, generated: ImageSet) -> Distances:
    """Return the FID, and the KID if both sets are images, four or more."""
    fid = frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)
    if real.sample is None or generated.sample is None or min(real.sample.count, generated.sample.count) < 4:
        return Distances(fid, None, None)
    return Distances(fid, *kernel_distance(real.sample.features, generated.sample.features))


def encode_images(
    paths: Sequence[Path], network: ImageNetwork, batch_size: int, label: str = "images", process_count: int = 1
) -> EncodedImages:
    """Return the features of images, 2 to 8 kB each. Raises UserError if none can be read.

    Of several processes the first one calls this, and each other one calls `send_features`.
    """
    batches = FeatureBatches(paths, network, batch_size, label, process_count=process_count)
    indices, features = zip(*batches)
    return EncodedImages(np.concatenate(indices), np.concatenate(features), batches.broken)


def send_features(
    paths: Sequence[Path], network: ImageNetwork, batch_size: int, process_index: int, process_count: int
) -> None:
    """Compute this process's share of the features that the first process measures or encodes, and send it there."""
    for _ in FeatureBatches(paths, network, batch_size, process_index=process_index, process_count=process_count):
        pass


def prompt_scores(images: EncodedImages, prompts: Sequence[str], network: ClipNetwork, batch_size: int) -> np.ndarray:
    """Return the CLIP scores (N,) of images. `prompts` holds one for each image of the list, broken ones included."""
    return clip_scores(images.features, network.encode_texts([prompts[i] for i in images.indices], batch_size))
