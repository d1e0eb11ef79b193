"""Scores of candidates on the same prompts, and which of them can be told apart.

Every score is computed on the same bootstrap samples of the prompts for all candidates (a paired bootstrap). A prompt
that is hard for one candidate is usually hard for all, so the difference between two candidates varies less than
either score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.metrics.clip_score import clip_scores, mean_of_all_pairs
from ldm.metrics.kernel import weighted_kernel_distances

CONFIDENCE = 0.975  # share of the bootstrap samples in which a score must be better (95 % of a two-sided interval)
FEWEST_FOR_KID = 8  # images a side: of fewer, a bootstrap sample may hold a single image


@dataclass(frozen=True)
class Score:
    """One score of C candidates.

    Attributes:
        key: Its name in files.
        label: Its name in tables.
        higher_is_better: Whether a higher value is better.
        values: From all images, (C,).
        samples: From R bootstrap samples of the prompts, the same ones for all candidates, (C, R). None for a score
            that comes without images.
        factor: Tables show the values times this.
        digits: Decimal places in tables.
        enough: Higher values than this are no better, and have equal ranks.
    """

    key: str
    label: str
    higher_is_better: bool
    values: np.ndarray
    samples: np.ndarray | None
    factor: float = 1.0
    digits: int = 2
    enough: float | None = None

    @property
    def best(self) -> int:
        """The candidate with the best value, the first one of several."""
        return int(_lower_is_better(self, self.values).argmin())

    def std(self, candidate: int) -> float | None:
        """Return the standard deviation of a candidate's score over the bootstrap samples."""
        return None if self.samples is None else float(self.samples[candidate].std(ddof=1))

    def alike(self, candidate: int) -> list[int]:
        """Return the other candidates that cannot be told apart from one.

        These are those that are at least as good in more than 1 - CONFIDENCE of the bootstrap samples, and no better in
        at least as many. Without samples, they are those of equal value.
        """
        others = [i for i in range(len(self.values)) if i != candidate]
        if self.samples is None:
            return [i for i in others if self.values[i] == self.values[candidate]]
        difference = self.samples - self.samples[candidate]
        better, worse = (difference >= 0).mean(axis=1), (difference <= 0).mean(axis=1)
        return [i for i in others if min(better[i], worse[i]) > 1 - CONFIDENCE]


def clip_score(features: np.ndarray, prompts: np.ndarray, indices: np.ndarray, enough: float | None = None) -> Score:
    """Return how well the images fit their prompts.

    Args:
        features: Of the images of each candidate, (C, N, D).
        prompts: Of the prompts, (N, D).
        indices: The bootstrap samples of the prompts, (R, N).
        enough: The score of the real images of these prompts, if there are any.
    """
    of_images = np.stack([clip_scores(images, prompts) for images in features])
    samples = of_images[:, indices].mean(axis=2)
    return Score("clip_score", "CLIP score", True, of_images.mean(axis=1), samples, enough=enough)


def image_score(features: np.ndarray, references: np.ndarray, indices: np.ndarray) -> Score:
    """Return how similar the images are to the real ones: the mean of 100 cos over all pairs.

    Args:
        features: Of the images of each candidate, (C, N, D).
        references: Of real images, (M, D).
        indices: The bootstrap samples of the prompts, (R, N).
    """
    of_images = np.array([[mean_of_all_pairs(image[None], references) for image in images] for images in features])
    return Score("image_score", "image score", True, of_images.mean(axis=1), of_images[:, indices].mean(axis=2))


def kid(features: np.ndarray, references: np.ndarray, indices: np.ndarray, reference_indices: np.ndarray) -> Score:
    """Return the kernel distance to the real images.

    Args:
        features: Of the images of each candidate, (C, N, D).
        references: Of real images, (M, D).
        indices: The bootstrap samples of the prompts, (R, N).
        reference_indices: The bootstrap samples of the real images, (R, M).
    """
    weights, reference_weights = _weights(indices), _weights(reference_indices)
    distances = np.stack(
        [weighted_kernel_distances(references, images, reference_weights, weights) for images in features]
    )
    return Score("kid", "KID x 1000", False, distances[:, 0], distances[:, 1:], factor=1000.0)


def _weights(indices: np.ndarray) -> np.ndarray:
    """Return how often each of N images counts, (N, 1 + R): once, then as often as each bootstrap sample holds it."""
    count = indices.shape[1]
    return np.stack([np.ones(count), *(np.bincount(sample, minlength=count) for sample in indices)], axis=1)


def mean_rank(scores: list[Score], resamples: int) -> Score:
    """Return the mean of the ranks by several scores, 1 for the best candidate. Equal values share their mean rank."""
    values = np.mean([_ranks(score, score.values[:, None])[:, 0] for score in scores], axis=0)
    samples = [
        np.broadcast_to(
            _ranks(score, score.values[:, None] if score.samples is None else score.samples), (len(values), resamples)
        )
        for score in scores
    ]
    return Score("mean_rank", "mean rank", False, values, np.mean(samples, axis=0))


def _lower_is_better(score: Score, values: np.ndarray) -> np.ndarray:
    """Return values of which the lowest is the best. What is no number, such as an overflowed loss, is the worst."""
    return np.nan_to_num(-values if score.higher_is_better else values, nan=np.inf, posinf=np.inf, neginf=-np.inf)


def _ranks(score: Score, values: np.ndarray) -> np.ndarray:
    """Return the ranks (C, R) of C candidates by a score's values (C, R) in each of R samples."""
    values = values if score.enough is None else np.minimum(values, score.enough)
    signed = _lower_is_better(score, values)
    better = (signed[None] < signed[:, None]).sum(axis=1)
    equal = (signed[None] == signed[:, None]).sum(axis=1) - 1
    return 1.0 + better + 0.5 * equal
