"""From images to latents: the moments of the autoencoder, from a cache or computed at every step, and a draw from them.

An image that augmentation changes at every step has other moments each time. All others are encoded once and cached.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ldm.data.batches import BatchOrder
from ldm.data.content import content_key
from ldm.data.draws import augmentation_draws
from ldm.data.shards import ShardedCache
from ldm.data.training_data import TrainingData
from ldm.data.transforms import IMAGE_CODE
from ldm.errors import UserError
from ldm.models.autoencoder import VAEEncode
from ldm.runtime.batches import run_in_batches
from ldm.settings.model import ModelConfig
from ldm.training.inputs.caches import RecentArrays, network_hash
from ldm.training.inputs.images import Images
from ldm.training.status import Status

LOGVAR_RANGE = (-30.0, 20.0)  # of LDM's DiagonalGaussianDistribution
# Pixels that are encoded at once for the cache: one image of 512 x 512, or 4 of 256 x 256 (2.3 GB; 16 took 7.1 GB).
CACHE_PIXELS = 512 * 512


def sample_latents(moments: np.ndarray, eps: np.ndarray, scale_factor: float) -> np.ndarray:
    """Return (mean + exp(logvar / 2) eps) scale_factor in float32, from moments (N, 2C, h, w) and eps (N, C, h, w).

    Moments of the shape of eps are the pixels of a model without an autoencoder. They are the latents themselves.
    """
    if moments.shape == eps.shape:
        return (moments * np.float32(scale_factor)).astype(np.float32)
    mean, logvar = np.split(moments, 2, axis=1)
    latents = mean + np.exp(0.5 * np.clip(logvar, *LOGVAR_RANGE)) * eps
    return (latents * np.float32(scale_factor)).astype(np.float32)


def moments_key(encoder: VAEEncode, config: ModelConfig, data: TrainingData) -> str:
    """Return a hash of all that the moments of an image depend on, but for the image itself."""
    network = network_hash(encoder.vae, config.vae or config.image_channels)
    return content_key("moments", network, repr(data.alpha_color), IMAGE_CODE)


@dataclass
class CachedMoments:
    """The moments of rows' images, without random crop and mirroring, in a cache.

    Args:
        images: The images.
        encoder: The autoencoder's encoder.
        config: Of the model.
        common_key: Part of the keys of all moments (see `moments_key`).
        cache: Where they are kept.
        recent: Those that were used last.
        status: It is told how far the encoding has come.
    """

    images: Images
    encoder: VAEEncode
    config: ModelConfig
    common_key: str
    cache: ShardedCache
    recent: RecentArrays
    status: Status | None = None

    def find(self, rows: list[int]) -> np.ndarray | None:
        """Return the moments (N, C, h, w) of rows, None if not all are in the cache. All images have one size."""
        return self.recent.get_all(self.cache, [(self.key(row), self._shape(row)) for row in rows])

    def encode(self, rows: Iterable[int], reads: bool = True) -> int:
        """Put the moments of the images of rows into the cache and return how many were put.

        Args:
            rows: Their numbers.
            reads: Whether to read the arrays that are there, so that those that are damaged are encoded again.
        """
        missing: dict[tuple[int, int], dict[str, int]] = {}
        for row in rows:
            row = self.images.usable(row)
            key, shape = self.key(row), self._shape(row)
            # What is damaged is found when it is read, so that 1,000,000 arrays that are there take no reading.
            if key not in self.cache or (reads and self.recent.get(self.cache, key, shape) is None):
                missing.setdefault(self.images.data.buckets.size(row), {})[key] = row
        count = sum(map(len, missing.values()))
        broken: list[int] = []
        encoded = 0
        with tqdm(total=count, desc="latents: encoding", unit="image", delay=1, leave=False) as bar:
            for (width, height), of_key in missing.items():
                in_call = max(1, min(32, CACHE_PIXELS // (width * height)))
                keys = list(of_key)
                for start in range(0, len(keys), in_call):
                    loaded = list(zip(keys[start:], self.images.load([of_key[key] for key in keys[start:][:in_call]])))
                    images = [(key, image) for key, image in loaded if not isinstance(image, UserError)]
                    for key, fault in loaded:
                        if isinstance(fault, UserError):
                            self.images.replace(of_key[key], fault)
                            broken.append(of_key[key])
                    if images:
                        moments = run_in_batches(self.encoder, np.stack([image for _, image in images]), in_call)
                        for (key, _), array in zip(images, moments):
                            self.cache.put(key, array)
                        encoded += len(images)
                    bar.update(len(loaded))
                    if self.status is not None:
                        self.status.phase = f"after encoding {bar.n} of {count} images ahead"
        return encoded + (self.encode(broken) if broken else 0)

    def key(self, row: int) -> str:
        """Return the key of a row's moments in the cache."""
        data = self.images.data
        return content_key(self.common_key, repr((data.buckets.size(row), data.buckets.scale(row))), data.content(row))

    def _shape(self, row: int) -> tuple[int, ...]:
        width, height = self.images.data.buckets.size(row)
        factor = self.config.vae_factor
        return self.config.moment_channels, height // factor, width // factor


class EncodedImages(NamedTuple):
    """The images of a micro-batch."""

    rows: np.ndarray  # (N,) int
    moments: np.ndarray  # (N, 2 C, h, w) float32, or (N, C, h, w) pixels of a model without an autoencoder
    masks: list[np.ndarray | None]  # (1, h, w) float32 of each row; empty where the data set has no masks


class MomentsAtEachStep:
    """The moments of micro-batches whose images are encoded when they are needed, with random crop and mirroring.

    The images of the next micro-batch are loaded in the background.

    Args:
        images: The images.
        encoder: The autoencoder's encoder.
        vae_factor: Pixels of an image for one of its latents, along a side.
        order: Which rows each micro-batch has.
        seed: Of crops and mirroring.
        end: The number after that of the last micro-batch. None: there is no end.
    """

    def __init__(
        self, images: Images, encoder: VAEEncode, vae_factor: int, order: BatchOrder, seed: int, end: int | None
    ):
        self.images, self.encoder, self.vae_factor = images, encoder, vae_factor
        self.order, self.seed, self.end = order, seed, end
        self._loading: dict[int, tuple[np.ndarray, list[Future]]] = {}

    def of_batch(self, number: int) -> EncodedImages:
        """Return the images of a micro-batch, and load the next ones in the background."""
        rows, loading = self._loading.pop(number) if number in self._loading else self._load(number)
        if self.end is None or number + 1 < self.end:
            self._loading = {number + 1: self._load(number + 1)}
        loaded: list[tuple[np.ndarray, np.ndarray | None]] = []
        for row, image in zip(rows.tolist(), loading):
            try:
                loaded.append(image.result())
            except UserError as error:
                self.images.replace(row, error)
                return self.of_batch(number)
        images, masks = zip(*loaded)
        return EncodedImages(rows, self.encoder(Tensor(np.stack(images))).asnumpy(), list(masks))

    def _load(self, number: int) -> tuple[np.ndarray, list[Future]]:
        rows = self.images.usable_rows(self.order.indices(number))
        generators = augmentation_draws(self.seed, number, len(rows), self.order.process_index)
        return rows, [
            self.images.pool.submit(self.images.data.image_and_mask, row, self.vae_factor, rng)
            for row, rng in zip(rows.tolist(), generators)
        ]
