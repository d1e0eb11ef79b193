"""What a micro-batch trains on: latents, noise, timesteps and text embeddings, as a function of seed and number."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.data.batches import BatchOrder
from ldm.data.draws import micro_batch_draws
from ldm.data.masks import loss_weights
from ldm.data.shards import ShardedCache
from ldm.data.training_data import TrainingData
from ldm.diffusion.noise import training_noise
from ldm.models.autoencoder import VAEEncode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.settings.train import TrainSettings
from ldm.training.checks import trained_timesteps
from ldm.training.inputs.caches import RecentArrays
from ldm.training.inputs.captions import Captions, CaptionTokens
from ldm.training.inputs.encode_ahead import EncodeAhead, window_limits
from ldm.training.inputs.images import Images
from ldm.training.inputs.latents import CachedMoments, EncodedImages, MomentsAtEachStep, moments_key, sample_latents
from ldm.training.inputs.masks import Masks
from ldm.training.inputs.text_embeddings import TextEmbeddings, text_key
from ldm.training.inputs.validation import ValidationInputs
from ldm.training.status import Status

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One micro-batch."""

    latents: np.ndarray  # (N, C, h, w) float32, scaled
    noise: np.ndarray  # (N, C, h, w) float32, or (N, 2 C, h, w) with ip_noise_gamma: see training_noise
    timesteps: np.ndarray  # (N,) int32
    text_embeddings: np.ndarray  # (N, 77, D) float32, or tokens (N, 77) int32 if the text encoder is trained
    weights: np.ndarray | None = None  # (N, 1, h, w) float32 of the loss, only where there are masks or class images

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return what the training step takes."""
        return tuple(array for array in self if array is not None)


class Inputs:
    """The micro-batches of a run: `order` says which rows each has.

    Args:
        settings: Those of the run.
        model: The networks that encode images and captions.
        data: The rows.
        order: Which of them each micro-batch has.
        steps: Of the whole run. None: there is no end.
        status: It is told how far the encoding has come.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: StableDiffusion,
        data: TrainingData,
        order: BatchOrder,
        steps: int | None = None,
        status: Status | None = None,
    ):
        self.settings, self.config, self.data, self.order, self.status = settings, model.config, data, order, status
        end = None if steps is None else steps * settings.gradient_accumulation_steps
        most_ahead, self._memory_bytes = window_limits(settings, model.config, data.buckets)
        self._recent = RecentArrays()
        self.vae_encoder = VAEEncode(model.first_stage_model)
        self.images = Images(data, settings.data_path, ThreadPoolExecutor(settings.num_workers))
        self.captions = Captions(settings, data, order, steps, CaptionTokens(model))
        self.captions.log_report()
        self.moments: CachedMoments | None = None
        if settings.cache_latents and data.augments:
            logger.info("random_crop or random_flip: latents are computed at every step, not cached")
        elif settings.cache_latents:
            self.moments = self._cached_moments(self.images, self._recent)
        self.texts = self._text_embeddings(model)
        self.masks = self._masks()
        self.at_each_step = MomentsAtEachStep(
            self.images, self.vae_encoder, model.config.vae_factor, order, settings.seed, end
        )
        self.ahead = EncodeAhead(
            self.images, self.masks, self.moments, self.captions, self.texts, order,
            limit=most_ahead, end=end, folder=self._folder, status=status,
        )  # fmt: skip

    # ---- the parts ------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        """Where the caches are."""
        return Path(self.settings.output_path) / "cache"

    def _cached_moments(self, images: Images, recent: RecentArrays) -> CachedMoments:
        cache = ShardedCache(self._folder, "latents", self.order.process_index, self._memory_bytes)
        key = moments_key(self.vae_encoder, self.config, images.data)
        return CachedMoments(images, self.vae_encoder, self.config, key, cache, recent, self.status)

    def _text_embeddings(self, model: StableDiffusion) -> TextEmbeddings:
        encoder = None if self.settings.trains_text_encoder else model.cond_stage_model
        texts = TextEmbeddings(encoder, self.captions.tokens, self.config.context_dim, self._recent)
        if encoder is None or not self.settings.cache_text:
            return texts
        # Captions that change from step to step are hardly ever used again: on disk they would take 236 KB each.
        folder = self._folder if self.data.has_one_caption else None
        return replace(texts, cache=self._text_cache(folder), common_key=text_key(encoder, self.config))

    def _text_cache(self, folder: Path | None) -> ShardedCache:
        return ShardedCache(folder, "texts", self.order.process_index, self._memory_bytes)

    def _masks(self) -> Masks:
        has_masks = self.data.masks is not None
        # Where there is augmentation, masks are read with their images.
        cache = None
        if has_masks and not self.data.augments:
            cache = ShardedCache(self._folder, "masks", self.order.process_index)
        masks = Masks(self.images, self.config.vae_factor, cache)
        if has_masks:
            masks.log_report()
        return masks

    # ---- micro-batches ----------------------------------------------------------------------------------------------

    @property
    def keeps_all(self) -> bool:
        """Whether all that is encoded is kept: the caches are on disk, and it can be written."""
        return self.ahead.keeps_all

    @property
    def needs_no_network(self) -> bool:
        """Whether a prepared micro-batch is made of cached arrays alone, so that another thread can make it."""
        return self.moments is not None and (self.texts.cache is not None or self.texts.encoder is None)

    def rows(self, number: int) -> np.ndarray:
        """Return the rows of a micro-batch, with another row in place of one whose image is broken."""
        return self.images.usable_rows(self.order.indices(number))

    def batch(self, number: int) -> Batch:
        """Return a micro-batch by its number, from 0 over the whole run, and encode ahead what it needs."""
        self.prepare(number)
        return self.prepared_batch(number)

    def prepare(self, number: int) -> None:
        """Encode ahead what a micro-batch needs."""
        self.ahead.prepare(number)

    def encode_all(self) -> list[str]:
        """Encode all that does not change from step to step (see `EncodeAhead.encode_all`)."""
        return self.ahead.encode_all()

    def prepared_batch(self, number: int) -> Batch:
        """Return a micro-batch for which `prepare` or `encode_all` has been called. Another thread may make it."""
        settings, config, process_index = self.settings, self.config, self.order.process_index
        rows, moments, masks = self._images(number)
        shape = (len(rows), config.latent_channels, *moments.shape[2:])
        drawn = micro_batch_draws(
            settings.seed, number, shape, trained_timesteps(settings, config), self.captions.dropout(rows),
            process_index,
        )  # fmt: skip
        latents = sample_latents(moments, drawn.posterior, config.scale_factor)
        noise = training_noise(settings, settings.seed, number, drawn.noise, latents, process_index)
        captions = self.captions.of_batch(rows, number)
        captions = ["" if is_dropped else caption for caption, is_dropped in zip(captions, drawn.dropped)]
        batch = Batch(latents, noise, drawn.timesteps, self.texts.of(captions))
        return batch._replace(weights=self._weights(rows, masks, shape[2:])) if self.data.is_weighted else batch

    def _images(self, number: int) -> EncodedImages:
        """Return the moments and masks of a micro-batch."""
        if self.moments is None:
            return self.at_each_step.of_batch(number)
        while True:
            rows = self.rows(number)
            masks = self.masks.of_rows(rows.tolist())
            if masks is None:
                continue
            moments = self.moments.find(rows.tolist())
            if moments is not None:
                return EncodedImages(rows, moments, masks)
            self.moments.encode(rows.tolist())  # its file has been damaged or removed since

    def _weights(self, rows: np.ndarray, masks: list[np.ndarray | None], size: tuple[int, ...]) -> np.ndarray:
        """Return the weights (N, 1, h, w) of the loss of a micro-batch: those of masks and of class images."""
        factors = self.data.weights
        return loss_weights(
            masks or [None] * len(rows), (size[0], size[1]), unmasked_weight=self.settings.unmasked_weight,
            normalize_masked_area_loss=self.settings.normalize_masked_area_loss,
            row_factors=None if factors is None else factors[rows].tolist(),
        )  # fmt: skip

    # ---- validation -----------------------------------------------------------------------------------------------

    def of_data(self, data: TrainingData, data_path: str | None) -> ValidationInputs:
        """Return the inputs of another data set's rows, by the same networks and threads.

        They augment no image, so that latents can be cached, and are given captions that do not change. What the
        training caches on disk is shared.

        Args:
            data: The rows.
            data_path: Where they were read, for errors.
        """
        images = Images(data, data_path, self.images.pool)
        texts, recent = self.texts, self._recent
        if texts.cache is not None and texts.cache.folder is None:
            # The memory of the training holds the captions of its window. If others took their place, the thread that
            # makes its micro-batches would run the text encoder. If they were among its recent arrays, they would not
            # be put into its cache.
            recent = RecentArrays()
            texts = replace(texts, cache=self._text_cache(self._folder), recent=recent)
        moments = None
        if self.moments is not None:
            moments = replace(self.moments, images=images, recent=recent)
        elif self.settings.cache_latents:
            moments = self._cached_moments(images, recent)
        captions = replace(self.captions, data=data)
        return ValidationInputs(self.settings, self.config, self.vae_encoder, images, captions, moments, texts)
