"""What a micro-step trains on: latents, noise, time steps and texts, each a pure function of (seed, micro-step)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn

from ldm.data.batches import BatchOrder
from ldm.data.cache import StateCache, content_key
from ldm.data.dataset import Row
from ldm.data.draws import augmentation_draws, step_draws
from ldm.data.transforms import load_image
from ldm.models.autoencoder import VAEEncode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LOGVAR_RANGE = (-30.0, 20.0)  # as LDM's DiagonalGaussianDistribution
CACHE_PIXELS = 512 * 512  # encoded at once: one image of 512 pixels or more, 4 of 256, 32 of 64; 16 of 256 took 7 GB


class Batch(NamedTuple):
    latents: np.ndarray  # (N, C, h, w) float32, scaled
    noise: np.ndarray  # like latents
    timesteps: np.ndarray  # (N,) int32
    condition: np.ndarray  # text states (N, 77, D) float32, or tokens (N, 77) int32


def network_hash(net: nn.Cell, description: object) -> str:
    """sha256 of a network's parameters and of what else decides its output."""
    digest = hashlib.sha256(repr(description).encode())
    for parameter in net.get_parameters():
        digest.update(parameter.name.encode() + repr(parameter.shape).encode())
        digest.update(np.ascontiguousarray(parameter.asnumpy()).data)
    return digest.hexdigest()


def sample_latents(moments: np.ndarray, eps: np.ndarray, scale_factor: float) -> np.ndarray:
    """(mean + exp(logvar / 2) eps) scale_factor from moments (N, 2C, h, w) and eps (N, C, h, w); fp32."""
    mean, logvar = np.split(moments, 2, axis=1)
    latents = mean + np.exp(0.5 * np.clip(logvar, *LOGVAR_RANGE)) * eps
    return (latents * np.float32(scale_factor)).astype(np.float32)


class Inputs:
    """The batches of a run. Building it computes or reads the cached states, with progress bars.

    tokens_only: give tokens for the condition, as the text encoder is trained in the step.
    note: told what is done so far.
    """

    def __init__(
        self,
        config: TrainSettings,
        model_config: ModelConfig,
        model: StableDiffusion,
        rows: Sequence[Row],
        order: BatchOrder,
        *,
        image_size: int,
        tokens_only: bool,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.config, self.model_config, self.rows, self.order = config, model_config, rows, order
        self.image_size, self.tokens_only, self.note = image_size, tokens_only, note
        self.rank = order.rank
        self.encode_graph = VAEEncode(model.first_stage_model)
        self.text_graph = model.cond_stage_model
        self.augments = config.random_crop or config.random_flip
        self.pool = ThreadPoolExecutor(config.num_workers)
        tokenizer = Tokenizer(model_config.pad_token, model_config.added_tokens)
        self.tokens = tokenizer.encode([row.text for row in rows])
        cut = tokenizer.cut_off(row.text for row in rows)
        if cut:
            logger.warning(
                '%d of %d captions are longer than 75 tokens and cut there; the first loses "%s"',
                len(cut), len(rows), cut[0],
            )  # fmt: skip
        self.empty_tokens = tokenizer.encode([""])
        cache = StateCache(Path(config.output_path) / "cache")
        self.moments = self._cached_moments(cache, model) if config.cache_latents and not self.augments else None
        if config.cache_latents and self.augments:
            logger.info("random_crop or random_flip: latents are computed at every step, not cached")
        self.states = None
        if config.cache_text and not tokens_only:
            self.states = self._cached_states(cache, model)
        self._loading: dict[int, list[Future]] = {}

    def batch(self, micro_step: int) -> Batch:
        """The batch of a micro-step, counted from 0 over the whole run."""
        rows = self.order.indices(micro_step)
        if self.moments is not None:
            moments = np.stack([self.moments[row] for row in rows])
        else:
            moments = self._moments_now(rows, micro_step)
        shape = (len(rows), moments.shape[1] // 2, *moments.shape[2:])
        config, model = self.config, self.model_config
        drawn = step_draws(config.seed, micro_step, shape, model.timesteps, config.caption_dropout, self.rank)
        return Batch(
            sample_latents(moments, drawn.posterior, model.scale_factor),
            drawn.noise,
            drawn.timesteps,
            self._condition(rows, drawn.dropped),
        )

    def _condition(self, rows: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        if self.states is not None:
            return np.stack([self.states[row] for row in np.where(dropped, len(self.rows), rows)])
        tokens = np.where(dropped[:, None], self.empty_tokens, self.tokens[rows])
        return tokens if self.tokens_only else self.text_graph(Tensor(tokens)).asnumpy()

    def _moments_now(self, rows: np.ndarray, micro_step: int) -> np.ndarray:
        images = self._loading.pop(micro_step, None) or self._load(rows, micro_step)
        # the next ones load while this step computes
        self._loading = {micro_step + 1: self._load(self.order.indices(micro_step + 1), micro_step + 1)}
        images = np.stack([image.result() for image in images])
        return self.encode_graph(Tensor(images)).asnumpy()

    def _load(self, rows: np.ndarray, micro_step: int) -> list[Future]:
        generators = augmentation_draws(self.config.seed, micro_step, len(rows), self.rank)
        return [self.pool.submit(self._augmented, row, rng) for row, rng in zip(rows, generators)]

    def _augmented(self, row: int, rng: np.random.Generator) -> np.ndarray:
        return load_image(
            self.rows[row].path,
            self.image_size,
            random_crop=self.config.random_crop,
            random_flip=self.config.random_flip,
            rng=rng,
        )

    def _cached_moments(self, cache: StateCache, model: StableDiffusion) -> list[np.ndarray]:
        weights = network_hash(model.first_stage_model, self.model_config.vae)
        keys = [content_key("moments", weights, self.image_size, row.path) for row in self.rows]

        batch_size = max(1, min(32, CACHE_PIXELS // self.image_size**2))
        side = self.image_size // self.model_config.vae_factor
        shape = (2 * self.model_config.latent_channels, side, side)
        return cache.get_or_compute(keys, self._encode_images, batch_size, "latents", shape)

    def _encode_images(self, places: list[int]) -> np.ndarray:
        images = list(self.pool.map(lambda place: load_image(self.rows[place].path, self.image_size), places))
        moments = self.encode_graph(Tensor(np.stack(images))).asnumpy()
        self.note(f"after encoding {places[-1] + 1} of {len(self.rows)} images")
        return moments

    def _cached_states(self, cache: StateCache, model: StableDiffusion) -> list[np.ndarray]:
        """The state of every row's caption and, after them, of the empty one."""
        weights = network_hash(model.cond_stage_model, self.model_config.text)
        tokens = np.concatenate([self.tokens, self.empty_tokens])
        keys = [content_key("text", weights, row.tobytes()) for row in tokens]

        def compute(places: list[int]) -> np.ndarray:
            return self.text_graph(Tensor(tokens[places])).asnumpy()

        shape = (tokens.shape[1], self.model_config.context_dim)
        return cache.get_or_compute(keys, compute, 16, "texts", shape)
