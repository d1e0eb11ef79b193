"""The scores of the images of both sides, and of the differences between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.metrics.bootstrap import bootstrap_std
from ldm.metrics.clip_score import clip_scores
from ldm.metrics.evaluate import encode_images
from ldm.metrics.frechet import frechet_of_features
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.networks import ClipNetwork, ImageNetwork

RESAMPLES = 200


class Scores:
    """Scores of sets of images of the same prompts, by the same networks. Standard deviations are over the prompts.

    Args:
        prompts: The prompts.
        real: The real image of each prompt. Empty if there are none: then there are no distances.
        image_network: The network of the distances.
        clip_network: The network of the CLIP score.
    """

    def __init__(
        self, prompts: Sequence[str], real: Sequence[Path], image_network: ImageNetwork, clip_network: ClipNetwork
    ):
        self.batch_size = min(32, len(prompts))
        self.image_network, self.clip_network = image_network, clip_network
        self.count = len(prompts)
        self.prompt_features = clip_network.encode_texts(prompts, self.batch_size)
        self.real_features = self._features(real, image_network) if real else None
        self.real_clip_score = float(self._clip_scores(real).mean()) if real else None
        self.features: dict[str, np.ndarray] = {}
        self.clip_scores: dict[str, np.ndarray] = {}
        self.pixels: dict[str, np.ndarray] = {}

    def add(self, name: str, files: Sequence[Path]) -> dict[str, float | None]:
        """Score a set: {"fid", "fid_std", "kid", "kid_std", "clip_score", "clip_score_std"}."""
        if len(files) != self.count:
            raise UserError(f"{name} has {len(files)} images for {self.count} prompts: remove it and run again")
        self.clip_scores[name] = clip = self._clip_scores(files)
        self.pixels[name] = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        kid: tuple[float | None, float | None] = None, None
        if self.real_features is not None:
            self.features[name] = self._features(files, self.image_network)
            if self.count >= 4:
                kid = kernel_distance(self.real_features, self.features[name])
        return {**self._scores(clip, lambda i: self._fid(name, i)), "kid": kid[0], "kid_std": kid[1]}

    def difference(self, name: str, other: str) -> dict[str, float | None]:
        """Return the scores of `name` minus those of `other`.

        The standard deviations are of the differences: the same prompts are drawn for both. "pixels" is the mean
        absolute difference of the images over pixels and channels, from 0 to 255.
        """
        clip = self.clip_scores[name] - self.clip_scores[other]
        pixels = np.abs(self.pixels[name].astype(np.float64) - self.pixels[other])
        scores = self._scores(clip, lambda i: self._fid(name, i) - self._fid(other, i))
        return {**scores, "pixels": float(pixels.mean())}

    def _scores(self, clip: np.ndarray, fid: Callable[[np.ndarray], float]) -> dict[str, float | None]:
        """Return the mean of CLIP scores and, with real images, the FID, both with their standard deviations."""
        statistics = {"fid": None if self.real_features is None else fid, "clip_score": lambda i: float(clip[i].mean())}
        scores: dict[str, float | None] = {}
        for key, statistic in statistics.items():
            scores[key] = statistic and statistic(np.arange(self.count))
            scores[f"{key}_std"] = statistic and bootstrap_std(statistic, self.count, RESAMPLES)
        return scores

    def _fid(self, name: str, indices: np.ndarray) -> float:
        assert self.real_features is not None
        return frechet_of_features(self.real_features[indices], self.features[name][indices])

    def _clip_scores(self, files: Sequence[Path]) -> np.ndarray:
        return clip_scores(self._features(files, self.clip_network), self.prompt_features)

    def _features(self, files: Sequence[Path], network: ImageNetwork) -> np.ndarray:
        return encode_images(files, network, self.batch_size).features
