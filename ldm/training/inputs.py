"""What a micro-batch trains on: latents, noise, timesteps and text embeddings, as a function of seed and number."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn

from ldm.data.batches import BatchOrder
from ldm.data.cache import ArrayCache, content_key
from ldm.data.dataset import Row
from ldm.data.draws import augmentation_draws, micro_batch_draws
from ldm.data.transforms import load_image
from ldm.models.autoencoder import VAEEncode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.runtime.batches import run_in_batches
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer
from ldm.training.checks import image_size, trained_timesteps
from ldm.training.status import Status

logger = logging.getLogger(__name__)

LOGVAR_RANGE = (-30.0, 20.0)  # of LDM's DiagonalGaussianDistribution
# Pixels that are encoded at once for the cache: one image of 512 x 512, or 4 of 256 x 256 (2.3 GB; 16 took 7.1 GB).
CACHE_PIXELS = 512 * 512
TEXTS_IN_CALL = 16  # captions that the text encoder encodes at once for the cache


class Batch(NamedTuple):
    """One micro-batch."""

    latents: np.ndarray  # (N, C, h, w) float32, scaled
    noise: np.ndarray  # (N, C, h, w) float32
    timesteps: np.ndarray  # (N,) int32
    text_embeddings: np.ndarray  # (N, 77, D) float32, or tokens (N, 77) int32 if the text encoder is trained


def network_hash(net: nn.Cell, description: object) -> str:
    """Return the sha256 of a network's parameters and of `description`, all that its output depends on."""
    digest = hashlib.sha256(repr(description).encode())
    for parameter in net.get_parameters():
        digest.update(parameter.name.encode() + repr(parameter.shape).encode())
        digest.update(np.ascontiguousarray(parameter.asnumpy()).data)
    return digest.hexdigest()


def sample_latents(moments: np.ndarray, eps: np.ndarray, scale_factor: float) -> np.ndarray:
    """Return (mean + exp(logvar / 2) eps) scale_factor in float32, from moments (N, 2C, h, w) and eps (N, C, h, w).

    Moments of the shape of eps are the pixels of a model without an autoencoder. They are the latents themselves.
    """
    if moments.shape == eps.shape:
        return (moments * np.float32(scale_factor)).astype(np.float32)
    mean, logvar = np.split(moments, 2, axis=1)
    latents = mean + np.exp(0.5 * np.clip(logvar, *LOGVAR_RANGE)) * eps
    return (latents * np.float32(scale_factor)).astype(np.float32)


class Inputs:
    """The micro-batches of a run: `order` says which rows each has.

    What can be cached is encoded, or read from the cache, when this is built. `status` is told how far that has come.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: StableDiffusion,
        rows: Sequence[Row],
        order: BatchOrder,
        status: Status | None = None,
    ):
        self.settings, self.config, self.rows, self.order = settings, model.config, rows, order
        self.image_size, self.status = image_size(settings, model.config), status
        self.vae_encoder = VAEEncode(model.first_stage_model)
        self.text_encoder = model.cond_stage_model
        self.pool = ThreadPoolExecutor(settings.num_workers)
        tokenizer = Tokenizer(self.config.pad_token, self.config.added_tokens)
        self.tokens = tokenizer.encode([row.caption for row in rows])
        cut = tokenizer.cut_off(row.caption for row in rows)
        if cut:
            logger.warning(
                '%d of %d captions are longer than 75 tokens and are cut there; the first loses "%s"',
                len(cut), len(rows), cut[0],
            )  # fmt: skip
        self.empty_tokens = tokenizer.encode([""])
        cache = ArrayCache(Path(settings.output_path) / "cache", order.process_index, order.process_count)
        self.moments = self.text_embeddings = None
        if settings.cache_latents:
            if settings.random_crop or settings.random_flip:
                logger.info("random_crop or random_flip: latents are computed at every step, not cached")
            else:
                self.moments = self._cached_moments(cache)
        if settings.cache_text and not settings.lora_ft_text_encoder:
            self.text_embeddings = self._cached_text_embeddings(cache)
        self._loading: dict[int, list[Future]] = {}

    def batch(self, number: int) -> Batch:
        """Return a micro-batch by its number, from 0 over the whole run."""
        rows = self.order.indices(number)
        if self.moments is not None:
            moments = np.stack([self.moments[row] for row in rows])
        else:
            moments = self._encode_now(rows, number)
        settings, config, process = self.settings, self.config, self.order.process_index
        shape = (len(rows), config.latent_channels, *moments.shape[2:])
        timesteps = trained_timesteps(settings, config)
        drawn = micro_batch_draws(settings.seed, number, shape, timesteps, settings.caption_dropout, process)
        latents = sample_latents(moments, drawn.posterior, config.scale_factor)
        return Batch(latents, drawn.noise, drawn.timesteps, self._text_embeddings(rows, drawn.dropped))

    def _text_embeddings(self, rows: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        if self.text_embeddings is not None:
            return np.stack([self.text_embeddings[row] for row in np.where(dropped, len(self.rows), rows)])
        tokens = np.where(dropped[:, None], self.empty_tokens, self.tokens[rows])
        return tokens if self.settings.lora_ft_text_encoder else self.text_encoder(Tensor(tokens)).asnumpy()

    def _encode_now(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Return the moments of a micro-batch's images, and load those of the next one in the background."""
        loading = self._loading.pop(number, None) or self._load(rows, number)
        self._loading = {number + 1: self._load(self.order.indices(number + 1), number + 1)}
        images = np.stack([image.result() for image in loading])
        return self.vae_encoder(Tensor(images)).asnumpy()

    def _load(self, rows: np.ndarray, number: int) -> list[Future]:
        settings = self.settings
        generators = augmentation_draws(settings.seed, number, len(rows), self.order.process_index)
        return [
            self.pool.submit(
                load_image, self.rows[row].path, self.image_size, channels=self.config.image_channels,
                random_crop=settings.random_crop, random_flip=settings.random_flip, rng=rng,
            )
            for row, rng in zip(rows, generators)
        ]  # fmt: skip

    def _cached_moments(self, cache: ArrayCache) -> list[np.ndarray]:
        channels = self.config.image_channels
        weights = network_hash(self.vae_encoder.vae, self.config.vae or channels)
        keys = [content_key("moments", weights, self.image_size, row.content) for row in self.rows]
        batch_size = max(1, min(32, CACHE_PIXELS // self.image_size**2))
        side = self.image_size // self.config.vae_factor

        def encode(places: list[int]) -> np.ndarray:
            paths = [self.rows[place].path for place in places]
            images = list(self.pool.map(lambda path: load_image(path, self.image_size, channels=channels), paths))
            moments = run_in_batches(self.vae_encoder, np.stack(images), batch_size)
            if self.status is not None:
                self.status.phase = f"after encoding {places[-1] + 1} of {len(self.rows)} images"
            return moments

        return cache.get_or_compute(keys, encode, batch_size, "latents", (self.config.moment_channels, side, side))

    def _cached_text_embeddings(self, cache: ArrayCache) -> list[np.ndarray]:
        """Return the text embeddings of each row's caption and, as the last, of the empty caption."""
        weights = network_hash(self.text_encoder, self.config.text)
        tokens = np.concatenate([self.tokens, self.empty_tokens])
        keys = [content_key("text", weights, row.tobytes()) for row in tokens]

        def encode(places: list[int]) -> np.ndarray:
            return run_in_batches(self.text_encoder, tokens[places], TEXTS_IN_CALL)

        return cache.get_or_compute(keys, encode, TEXTS_IN_CALL, "texts", (tokens.shape[1], self.config.context_dim))
