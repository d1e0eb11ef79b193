"""Scores of sets of pictures, from files to numbers: what the evaluation scripts, the demo and comparisons call."""

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
class PictureSet:
    """One set of pictures for distances: mean (D,), covariance (D, D), count; `sample` holds features for the KID.

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
    """Unit vectors (N, D) of the pictures at `places` of their list; (path, fault) of what was left out."""

    places: np.ndarray
    features: np.ndarray
    broken: Sequence[tuple[Path, str]]


def measure_pictures(
    paths: Sequence[Path], network: ImageNetwork, batch_size: int, label: str = "pictures", save_to: Path | None = None
) -> PictureSet:
    """Stream pictures through the network into their statistics; save those to an .npz where `save_to` is given.

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
    return PictureSet(statistics.mean, statistics.covariance, statistics.count, sample, batches.broken)


def saved_pictures(path: str | Path, network: ImageNetwork) -> PictureSet:
    """Statistics from an .npz. Raises UserError where they are known to come from another network."""
    saved = read_statistics(path)
    if len(saved.mean) != network.dimensions:
        raise UserError(
            f"{path} holds {len(saved.mean)} features, {network.name} has {network.dimensions}: it was made with "
            "another network"
        )
    if saved.network is not None and saved.network != network.identity:
        raise UserError(f"{path} was made with {saved.network}, not {network.identity}: make it anew with --save_stats")
    return PictureSet(saved.mean, saved.covariance, saved.count, None)


def distances(real: PictureSet, generated: PictureSet) -> Distances:
    """FID, and KID where both sets are pictures, four or more."""
    fid = frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)
    if real.sample is None or generated.sample is None or min(real.count, generated.count) < 4:
        return Distances(fid, None, None)
    return Distances(fid, *kernel_distance(real.sample.features, generated.sample.features))


def encode_pictures(paths: Sequence[Path], network: ImageNetwork, batch_size: int, label: str = "pictures") -> Encoded:
    """The features of pictures, in order: 2 to 8 kB a picture. Raises UserError where none can be read."""
    batches = ImageBatches(paths, network.prepare, batch_size, label)
    places, features = zip(*network.features(batches))
    return Encoded(np.concatenate(places), np.concatenate(features), batches.broken)


def prompt_scores(pictures: Encoded, prompts: Sequence[str], network: ClipNetwork, batch_size: int) -> np.ndarray:
    """(N,) CLIP scores of pictures with one prompt each (of the list the pictures come from), in order; the prompt of a
    broken picture is left out with it."""
    return clip_scores(pictures.features, network.of_texts([prompts[place] for place in pictures.places], batch_size))
