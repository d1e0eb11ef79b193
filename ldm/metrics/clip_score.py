"""The CLIP score (Hessel et al. 2021): 100 max(cos, 0), as torchmetrics and the published tables scale it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.errors import UserError


def clip_scores(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the scores (N,) of N pairs of features (N, D): of an image and its prompt, or of two images.

    Each score is clamped at 0 before the mean is taken. torchmetrics clamps the mean.
    """
    return 100.0 * np.maximum((_unit(features) * _unit(others)).sum(axis=1), 0.0)


def mean_of_all_pairs(features: np.ndarray, others: np.ndarray) -> float:
    """Return the mean of 100 cos over all N x M pairs, without a clamp: mindone's image-to-image score."""
    return float(100.0 * (_unit(features).mean(axis=0) @ _unit(others).mean(axis=0)))


def paired_prompts(prompts: Sequence[str], images: int) -> list[str]:
    """Return the prompt of each image, for an equal number of images per prompt, in the order of the prompts.

    Raises UserError if the number of images is not a multiple of the number of prompts.
    """
    if not prompts:
        raise UserError("no prompts are given")
    if images % len(prompts):
        raise UserError(
            f"{images} images and {len(prompts)} prompts: there must be as many images for each prompt, in order "
            "(a blank line counts as a prompt)"
        )
    return [prompt for prompt in prompts for _ in range(images // len(prompts))]


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
