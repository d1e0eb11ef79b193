"""Scores of sets of images, from files to numbers: what the evaluation scripts, the demo and comparisons call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.metrics.clip_score import clip_scores
from ldm.metrics.frechet import FeatureStatistics, frechet_distance, read_statistics, write_statistics
from ldm.metrics.images import ImageBatches
from ldm.metrics.kernel import FeatureSample, kernel_distance
from ldm.metrics.networks import ClipNetwork, ImageNetwork


@dataclass(frozen=True)
class ImageSet:
    """One set of images for distances: mean (D,), covariance (D, D), count; `sample` holds features for the KID.

    count is None for foreign statistics, sample for all saved ones. broken: (path, fault) of what was left out.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    sample: FeatureSample | None
    broken: Sequence[tuple[Path, str]] = ()


@dataclass(frozen=True)
class Distances:
    """FID and KID (with its standard deviation), or what they are called with another network than Inception."""

    fid: float
    kid: float | None
    kid_deviation: float | None


@dataclass(frozen=True)
class Encoded:
    """Unit vectors (N, D) of the images at `places` of their list; (path, fault) of what was left out."""

    places: np.ndarray
    features: np.ndarray
    broken: Sequence[tuple[Path, str]]


def measure_images(
    paths: Sequence[Path], network: ImageNetwork, batch_size: int, label: str = "images", save_to: Path | None = None
) -> ImageSet:
    """Stream images through the network into their statistics; save those to an .npz where `save_to` is given.

    Raises UserError unless two or more can be read.
    """
    batches = ImageBatches(paths, network.prepare, batch_size, label)
    statistics, sample = FeatureStatistics(), FeatureSample()
    for _, features in network.features(batches):
        statistics.add(features)
        sample.add(features)
    if statistics.count < 2:
        raise UserError(f"{paths[0].parent}: only one of the {label} can be read: a Fréchet distance wants two or more")
    if save_to is not None:
        write_statistics(save_to, statistics, network.identity)
    return ImageSet(statistics.mean, statistics.covariance, statistics.count, sample, batches.broken)


def saved_images(path: str | Path, network: ImageNetwork) -> ImageSet:
    """Statistics from an .npz. Raises UserError where they are known to come from another network."""
    saved = read_statistics(path)
    if len(saved.mean) != network.dimensions:
        raise UserError(
            f"{path} holds {len(saved.mean)} features, {network.name} has {network.dimensions}: it was made with "
            "another network"
        )
    if saved.network is not None and saved.network != network.identity:
        raise UserError(f"{path} was made with {saved.network}, not {network.identity}: make it anew with --save_stats")
    return ImageSet(saved.mean, saved.covariance, saved.count, None)


def distances(real: ImageSet, generated: ImageSet) -> Distances:
    """FID, and KID where both sets are images, four or more."""
    fid = frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)
    if real.sample is None or generated.sample is None or min(real.count, generated.count) < 4:
        return Distances(fid, None, None)
    return Distances(fid, *kernel_distance(real.sample.features, generated.sample.features))


def encode_images(paths: Sequence[Path], network: ImageNetwork, batch_size: int, label: str = "images") -> Encoded:
    """The features of images, in order: 2 to 8 kB an image. Raises UserError where none can be read."""
    batches = ImageBatches(paths, network.prepare, batch_size, label)
    places, features = zip(*network.features(batches))
    return Encoded(np.concatenate(places), np.concatenate(features), batches.broken)


def prompt_scores(images: Encoded, prompts: Sequence[str], network: ClipNetwork, batch_size: int) -> np.ndarray:
    """(N,) CLIP scores of images with one prompt each (of the list the images come from), in order; the prompt of a
    broken image is left out with it.
    """
    return clip_scores(images.features, network.of_texts([prompts[place] for place in images.places], batch_size))
