"""What a micro-batch trains on: latents, noise, timesteps and text embeddings, as a function of seed and number."""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from ldm.data.batches import BatchOrder
from ldm.data.content import content_key
from ldm.data.draws import augmentation_draws, caption_draws, micro_batch_draws
from ldm.data.masks import MaskReport, loss_weights
from ldm.data.shards import MEMORY_BYTES, ShardedCache
from ldm.data.training_data import MAX_BAD_FRACTION, MAX_CHECKED, TrainingData
from ldm.data.transforms import IMAGE_CODE
from ldm.diffusion.noise import training_noise
from ldm.errors import UserError, plain
from ldm.models.autoencoder import VAEEncode
from ldm.models.stable_diffusion import StableDiffusion
from ldm.runtime import peers
from ldm.runtime.batches import run_in_batches
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.inject import learned_tokens_of, make_tokenizer
from ldm.textual_inversion.templates import draw_template
from ldm.tokenizer import CONTEXT_LENGTH
from ldm.training.checks import trained_timesteps
from ldm.training.status import Status

logger = logging.getLogger(__name__)

LOGVAR_RANGE = (-30.0, 20.0)  # of LDM's DiagonalGaussianDistribution
# Pixels that are encoded at once for the cache: one image of 512 x 512, or 4 of 256 x 256 (2.3 GB; 16 took 7.1 GB).
CACHE_PIXELS = 512 * 512
_NO_DRAWS = np.random.default_rng(0)  # where nothing is drawn
WINDOW_BYTES = 128 << 20  # of the arrays that are encoded ahead
ROWS_AT_ONCE = 1024  # rows whose missing arrays are collected before they are encoded
CAPTIONS_HELD = 4096  # captions whose tokens are kept, 0.3 KB each: tokens take 70 us
RECENT_BYTES = 128 << 20  # of arrays that were read last
TEXTS_IN_CALL = 16  # captions that the text encoder encodes at once for the cache


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


def network_hash(net: nn.Cell, description: object) -> str:
    """Return the sha256 of a network's parameters and of `description`, all that its output depends on."""
    digest = hashlib.sha256(repr(description).encode())
    for parameter in net.get_parameters():
        digest.update(parameter.name.encode() + repr(parameter.shape).encode())
        digest.update(np.ascontiguousarray(parameter.asnumpy()).view(np.uint8).data)  # bf16 has no buffer
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


class _Recent:
    """The newest arrays by key, of at most RECENT_BYTES, so that of a small data set each is read once.

    For a nano batch of 16 rows this saves 2 of 4 ms. Several threads may use it.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}  # the oldest first
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, cache: ShardedCache, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return an array of a cache, None if it is absent. It must not be changed."""
        with self._lock:
            array = self._arrays.get(key)
        if array is None:
            array = cache.get(key, shape)
            if array is not None:
                self._add(key, array)
        return array

    def _add(self, key: str, array: np.ndarray) -> None:
        with self._lock:
            if key in self._arrays or array.nbytes > RECENT_BYTES:
                return
            self._arrays[key] = array
            self._bytes += array.nbytes
            while self._bytes > RECENT_BYTES:
                self._bytes -= self._arrays.pop(next(iter(self._arrays))).nbytes


class Inputs:
    """The micro-batches of a run: `order` says which rows each has.

    What can be cached is encoded ahead of the training, in windows of coming micro-batches: of one at first, so that
    the training starts soon, and of `encode_ahead` in the end.

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
        self.settings, self.config, self.data, self.order = settings, model.config, data, order
        self.data_path = settings.data_path  # where `data` was read, for errors
        self.steps, self.status = steps, status
        self.end = None if steps is None else steps * settings.gradient_accumulation_steps
        self.vae_encoder = VAEEncode(model.first_stage_model)
        self.text_encoder = model.cond_stage_model
        self.pool = ThreadPoolExecutor(settings.num_workers)
        self.tokenizer = make_tokenizer(model)
        self._tokens_of = lru_cache(CAPTIONS_HELD)(lambda caption: self.tokenizer.encode([caption])[0])
        self._learned_ids = [learned.token for learned in learned_tokens_of(model)]
        self._replaces_captions = None not in (settings.placeholder_token, settings.learnable_property)
        if cut := data.cut_report(self.tokenizer):
            logger.warning("%s", cut)
        if self._replaces_captions:
            self._report_templates()
        folder = Path(settings.output_path) / "cache"
        self._most_ahead, self._in_memory = self._window_limits()
        self.moments: ShardedCache | None = None
        self.texts: ShardedCache | None = None
        if settings.cache_latents and data.augments:
            logger.info("random_crop or random_flip: latents are computed at every step, not cached")
        elif settings.cache_latents:
            self._open_moments()
        if settings.cache_text and not settings.trains_text_encoder:
            # Captions that change from step to step are hardly ever used again: on disk they would take 236 KB each.
            on_disk = folder if data.has_one_caption else None
            self.texts = ShardedCache(on_disk, "texts", order.process_index, self._in_memory)
            self._texts_key = content_key("text", network_hash(self.text_encoder, self.config.text))
        self._without_mask: set[str] = set()
        self.masks: ShardedCache | None = None
        if data.masks is not None:
            if not data.augments:
                self.masks = ShardedCache(folder, "masks", order.process_index)
            self._report_masks()
        self._recent = _Recent()
        self._prepared, self._window = range(0), 0
        self._broken: dict[int, int] = {}  # a row whose image is broken -> the row that replaces it
        self._loading: dict[int, tuple[np.ndarray, list[Future]]] = {}

    def _open_moments(self) -> None:
        folder = Path(self.settings.output_path) / "cache"
        self.moments = ShardedCache(folder, "latents", self.order.process_index, self._in_memory)
        network = network_hash(self.vae_encoder.vae, self.config.vae or self.config.image_channels)
        self._moments_key = content_key("moments", network, repr(self.data.alpha_color), IMAGE_CODE)

    def _window_limits(self) -> tuple[int, int]:
        """Return how many micro-batches are encoded ahead at most, and the bytes of the arrays of those in use.

        Arrays that cannot be kept on disk stay in memory until they are used: those of the window, of the one before it
        and of the micro-batches that a thread makes ahead.
        """
        settings, config = self.settings, self.config
        pixels = max(width * height for width, height in self.data.buckets.sizes)
        latents = config.moment_channels * pixels // config.vae_factor**2
        of_batch = 4 * settings.train_batch_size * (latents + CONTEXT_LENGTH * config.context_dim)
        ahead = max(1, min(settings.encode_ahead, WINDOW_BYTES // of_batch))
        return ahead, max(MEMORY_BYTES, (2 * ahead + settings.gradient_accumulation_steps + 1) * of_batch)

    @property
    def keeps_all(self) -> bool:
        """Whether all that is encoded is kept: the caches are on disk, and it can be written."""
        return all(cache is None or cache.keeps_all for cache in (self.moments, self.texts))

    @property
    def needs_no_network(self) -> bool:
        """Whether a prepared micro-batch is made of cached arrays alone, so that another thread can make it."""
        return self.moments is not None and (self.texts is not None or self.settings.trains_text_encoder)

    def batch(self, number: int) -> Batch:
        """Return a micro-batch by its number, from 0 over the whole run, and encode ahead what it needs."""
        self.prepare(number)
        return self.prepared_batch(number)

    def prepared_batch(self, number: int) -> Batch:
        """Return a micro-batch for which `prepare` or `encode_all` has been called. Another thread may make it."""
        if self.moments is None:
            rows, moments, masks = self._encode_now(number)
        else:
            rows, moments, masks = self._cached_moments(number)
        settings, config = self.settings, self.config
        shape = (len(rows), config.latent_channels, *moments.shape[2:])
        drawn = micro_batch_draws(
            settings.seed, number, shape, trained_timesteps(settings, config), self._dropout(rows),
            self.order.process_index,
        )  # fmt: skip
        latents = sample_latents(moments, drawn.posterior, config.scale_factor)
        noise = training_noise(settings, settings.seed, number, drawn.noise, latents, self.order.process_index)
        captions = self._captions(rows, number)
        captions = ["" if is_dropped else caption for caption, is_dropped in zip(captions, drawn.dropped)]
        batch = Batch(latents, noise, drawn.timesteps, self._text_embeddings(captions))
        return batch._replace(weights=self._weights(rows, masks, shape[2:])) if self.data.is_weighted else batch

    def prepare(self, number: int) -> None:
        """Encode what the caches do not have yet of a micro-batch and of those that follow it in its window."""
        if number in self._prepared or (self.moments is None and self.texts is None):
            return
        self._window = min(self._most_ahead, max(1, 2 * self._window))
        # Within an epoch without repeats, no two processes have the same row, so that none encodes what another does.
        epoch_end = (self.order.epoch(number) + 1) * self.order.steps_per_epoch
        ends = number + self._window, epoch_end, epoch_end if self.end is None else max(number + 1, self.end)
        window = range(number, min(ends))
        self._refresh()
        phase = "" if self.status is None else self.status.phase
        if self.moments is not None:
            self._encode_images(np.concatenate([self.rows(i) for i in window]).tolist())
        if self.texts is not None:
            captions = {caption: None for i in window for caption in self._captions(self.rows(i), i)}
            self._encode_texts([*captions, ""])
        if self.order.process_count > 1:
            self._flush()
        self._log_notes()
        if self.status is not None:
            self.status.phase = phase
        self._prepared = window

    def encode_all(self) -> list[str]:
        """Encode all that does not change from step to step. The processes of a run divide the work.

        Returns:
            What that is: "images", "captions", or both.

        Raises:
            UserError: It is nothing.
        """
        process, count = self.order.process_index, self.order.process_count
        what = ["images"] * (self.moments is not None)
        what += ["captions"] * (self.texts is not None and self.data.has_one_caption)
        if not what:
            raise UserError(
                "there is nothing to encode ahead: random_crop, random_flip and captions that change are encoded at "
                "every step, and so is what cache_latents and cache_text leave out"
            )
        if count > 1:
            self._encode_rows(range(process, len(self.data), count))
            self._flush()
            peers.gather()  # waits until the others have encoded theirs
            self._refresh()
        encoded = self._encode_rows(range(len(self.data)))
        if count > 1 and encoded:
            logger.warning(
                "%d arrays of other processes were not under %s and were computed again: let all hosts share "
                "output_path",
                encoded, Path(self.settings.output_path) / "cache",
            )  # fmt: skip
        return what

    def _encode_rows(self, rows: range) -> int:
        """Encode the images and captions of rows and return how many arrays were not in the caches."""
        encoded = 0
        with tqdm(total=len(rows), desc="encoding the data set", unit="row", delay=1) as bar:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[start : start + ROWS_AT_ONCE]
                if self.moments is not None:
                    encoded += self._encode_images(part, reads=False)
                self._masks(list(part))
                if self.texts is not None and self.data.has_one_caption:
                    encoded += self._encode_texts([*self._captions(np.array(part), 0), ""])
                bar.update(len(part))
        self._log_notes()
        return encoded

    def _log_notes(self) -> None:
        """Log what is new of images that are read all the same."""
        for line in self.data.notes.lines(new=True):
            logger.info("%s", line)

    def _flush(self) -> None:
        """Have what was encoded written to the disk, so that processes of other hosts find it."""
        for cache in (self.moments, self.texts):
            if cache is not None:
                cache.flush()

    def _refresh(self) -> None:
        """Find what other processes have encoded."""
        for cache in (self.moments, self.texts):
            if cache is not None:
                cache.refresh()

    # ---- rows without augmentation, for validation ------------------------------------------------------------------

    def of_data(self, data: TrainingData, data_path: str | None) -> Inputs:
        """Return the inputs of another data set's rows, by the same networks and threads.

        They are for `cache_rows`, `images` and `texts_of`, which augment no image, so that latents can be cached, and
        are given captions that do not change. What the training caches on disk is shared.

        Args:
            data: The rows.
            data_path: Where they were read, for errors.
        """
        other = copy.copy(self)
        other.data, other.data_path, other._broken = data, data_path, {}
        if other.moments is None and self.settings.cache_latents:
            other._open_moments()
        if other.texts is not None and other.texts.folder is None:
            # The memory of the training holds the captions of its window. If others took their place, the thread that
            # makes its micro-batches would run the text encoder. If they were in its `_recent`, they would not be put
            # into its cache.
            other.texts = ShardedCache(
                Path(self.settings.output_path) / "cache", "texts", self.order.process_index, self._in_memory
            )
            other._recent = _Recent()
        return other

    def cache_rows(self, rows: Sequence[int], captions: Sequence[str]) -> None:
        """Put the images of rows, and captions, into the caches, as far as they are not there."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            if self.moments is not None:
                self._encode_images(rows[start : start + ROWS_AT_ONCE], reads=False)
            if self.texts is not None:
                self._encode_texts(list(captions[start : start + ROWS_AT_ONCE]))
        self._log_notes()

    def images(self, rows: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Return rows, with another one in place of one whose image is broken, and the moments of their images.

        All images have one size.
        """
        while True:
            found = [self._usable(row) for row in rows]
            if self.moments is not None:
                keys = [(self._row_key(row), self._moments_shape(row)) for row in found]
                cached = [self._recent.get(self.moments, key, shape) for key, shape in keys]
                arrays = [array for array in cached if array is not None]
                if len(arrays) == len(found):
                    return found, np.stack(arrays)
                self._encode_images(found)
            else:
                loaded = self._load_all(found)
                arrays = [array for array in loaded if not isinstance(array, UserError)]
                if len(arrays) == len(found):
                    return found, self.vae_encoder(Tensor(np.stack(arrays))).asnumpy()
                for row, fault in zip(found, loaded):
                    if isinstance(fault, UserError):
                        self._replace(row, fault)

    def texts_of(self, captions: Sequence[str]) -> np.ndarray:
        """Return the text embeddings of captions, or their tokens if the text encoder is trained."""
        return self._text_embeddings(list(captions))

    # ---- captions -------------------------------------------------------------------------------------------------

    def _captions(self, rows: np.ndarray, number: int) -> list[str]:
        """Return the captions of the rows of a micro-batch, before any is dropped."""
        settings, order = self.settings, self.order
        if self.data.has_one_caption and not self._replaces_captions:
            generators = [_NO_DRAWS] * len(rows)
        else:
            generators = caption_draws(settings.seed, number, len(rows), order.process_index)
        step = number // settings.gradient_accumulation_steps
        return [
            self._with_token(row, self.data.caption(row, rng, step, order.epoch(number), self.steps), rng)
            for row, rng in zip(rows, generators)
        ]

    def whole_caption(self, row: int, rng: np.random.Generator) -> str:
        """Return the caption of a row of which nothing is dropped (see `TrainingData.whole_caption`)."""
        return self._with_token(row, self.data.whole_caption(row, rng), rng)

    def _with_token(self, row: int, caption: str, rng: np.random.Generator) -> str:
        """Return a caption as it is, or a template if it says nothing of the token that is learned."""
        settings = self.settings
        if not self._replaces_captions or self._uses_token(caption) or self.data.is_class_image(row):
            return caption
        assert settings.learnable_property is not None and settings.placeholder_token is not None
        return draw_template(settings.learnable_property, settings.placeholder_token, rng)

    def _uses_token(self, caption: str) -> bool:
        """Whether a caption has the token and other words. Images without a caption have the token alone."""
        if caption.strip().lower() == (self.settings.placeholder_token or "").lower():  # tokens match in any case
            return False
        return bool(np.isin(self._tokens_of(caption), self._learned_ids).any())

    def _report_templates(self) -> None:
        """Log how many captions lack the token that is learned. A large data set is looked at in part."""
        data, settings = self.data, self.settings
        rows = np.linspace(0, len(data) - 1, min(len(data), MAX_CHECKED)).round().astype(int).tolist()
        rows = [row for row in rows if not data.is_class_image(row)]
        lacking = sum(not self._uses_token(data.whole_caption(row, np.random.default_rng(0))) for row in rows)
        if lacking:
            # Beside a LoRA the captions are likely to matter.
            logger.log(
                logging.WARNING if settings.use_lora else logging.INFO,
                "%s of %s captions do not use %s: templates with it take their place "
                "(learnable_property %s)",
                f"{lacking:,}", f"{len(rows):,}", plain(settings.placeholder_token), settings.learnable_property,
            )  # fmt: skip

    def _dropout(self, rows: np.ndarray) -> np.ndarray:
        return self.data.dropout[[self.data.rows[row].subset for row in rows]]

    def _text_embeddings(self, captions: list[str]) -> np.ndarray:
        tokens = np.stack([self._tokens_of(caption) for caption in captions])
        if self.texts is None:
            return tokens if self.settings.trains_text_encoder else self.text_encoder(Tensor(tokens)).asnumpy()
        while True:
            found = [self._recent.get(self.texts, self._text_key(row), self._text_shape) for row in tokens]
            arrays = [array for array in found if array is not None]
            if len(arrays) == len(found):
                return np.stack(arrays)
            self._encode_texts(captions)  # its file has been damaged or removed since

    def _encode_texts(self, captions: list[str]) -> int:
        """Put the text embeddings of captions into the cache and return how many were not there."""
        assert self.texts is not None
        missing: dict[str, np.ndarray] = {}
        for caption in captions:
            tokens = self._tokens_of(caption)
            key = self._text_key(tokens)
            if key not in missing and self._recent.get(self.texts, key, self._text_shape) is None:
                missing[key] = tokens
        keys = list(missing)
        with tqdm(total=len(keys), desc="texts: encoding", unit="caption", delay=1, leave=False) as bar:
            for start in range(0, len(keys), TEXTS_IN_CALL):
                part = keys[start : start + TEXTS_IN_CALL]
                embeddings = run_in_batches(self.text_encoder, np.stack([missing[key] for key in part]), TEXTS_IN_CALL)
                for key, array in zip(part, embeddings):
                    self.texts.put(key, array)
                bar.update(len(part))
        return len(keys)

    @property
    def _text_shape(self) -> tuple[int, ...]:
        return CONTEXT_LENGTH, self.config.context_dim

    def _text_key(self, tokens: np.ndarray) -> str:
        return content_key(self._texts_key, tokens.tobytes())

    # ---- images ---------------------------------------------------------------------------------------------------

    def rows(self, number: int) -> np.ndarray:
        """Return the rows of a micro-batch, with another row in place of one whose image is broken."""
        rows = self.order.indices(number)
        return np.array([self._usable(row) for row in rows.tolist()]) if self._broken else rows

    def _usable(self, row: int) -> int:
        while row in self._broken:
            row = self._broken[row]
        return row

    def _replace(self, row: int, error: UserError) -> None:
        """Have the next row of a bucket replace one whose image is broken.

        It is found again where the run is resumed, so the same row replaces it then. An image that was checked before
        and has been removed or damaged since is an error.
        """
        if self.data.contents is not None:
            raise error
        logger.warning("%s: %s", self.data.name(row), error)
        others = np.flatnonzero(self.data.buckets.of_row == self.data.buckets.of_row[row])
        self._broken[row] = int(others[(np.searchsorted(others, row) + 1) % len(others)])
        count = len(self._broken)
        if count > max(1.0, MAX_BAD_FRACTION * len(self.data)) or all(int(other) in self._broken for other in others):
            raise UserError(
                f"{plain(self.data_path)}: {count:,} of {len(self.data):,} images are broken, the last one: {error}"
            )

    def _cached_moments(self, number: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
        """Return the rows of a micro-batch, their moments and masks."""
        assert self.moments is not None
        while True:
            rows = self.rows(number)
            masks = self._masks(rows.tolist())
            if masks is None:
                continue
            keys = [(self._row_key(row), self._moments_shape(row)) for row in rows.tolist()]
            found = [self._recent.get(self.moments, key, shape) for key, shape in keys]
            arrays = [array for array in found if array is not None]
            if len(arrays) == len(found):
                return rows, np.stack(arrays), masks
            self._encode_images(rows.tolist())  # its file has been damaged or removed since

    def _masks(self, rows: list[int]) -> list[np.ndarray | None] | None:
        """Return the masks of rows, or None if one of them has been replaced because its mask is broken."""
        masks: list[np.ndarray | None] = []
        for row in rows if self.data.masks is not None else []:
            try:
                masks.append(self._mask(row))
            except UserError as error:
                self._replace(row, error)
                return None
        return masks

    def _row_key(self, row: int) -> str:
        data = self.data
        return content_key(
            self._moments_key, repr((data.buckets.size(row), data.buckets.scale(row))), data.content(row)
        )

    def _moments_shape(self, row: int) -> tuple[int, ...]:
        width, height = self.data.buckets.size(row)
        factor = self.config.vae_factor
        return self.config.moment_channels, height // factor, width // factor

    def _encode_images(self, rows: Iterable[int], reads: bool = True) -> int:
        """Put the moments of the images of rows into the cache and return how many were put.

        Args:
            rows: Their numbers.
            reads: Whether to read the arrays that are there, so that those that are damaged are encoded again.
        """
        assert self.moments is not None
        missing: dict[tuple[int, int], dict[str, int]] = {}
        for row in rows:
            row = self._usable(row)
            key, shape = self._row_key(row), self._moments_shape(row)
            # What is damaged is found when it is read, so that 1,000,000 arrays that are there take no reading.
            if key not in self.moments or (reads and self._recent.get(self.moments, key, shape) is None):
                missing.setdefault(self.data.buckets.size(row), {})[key] = row
        count = sum(map(len, missing.values()))
        broken: list[int] = []
        encoded = 0
        with tqdm(total=count, desc="latents: encoding", unit="image", delay=1, leave=False) as bar:
            for (width, height), of_key in missing.items():
                in_call = max(1, min(32, CACHE_PIXELS // (width * height)))
                keys = list(of_key)
                for start in range(0, len(keys), in_call):
                    loaded = list(zip(keys[start:], self._load_all([of_key[key] for key in keys[start:][:in_call]])))
                    images = [(key, image) for key, image in loaded if not isinstance(image, UserError)]
                    for key, fault in loaded:
                        if isinstance(fault, UserError):
                            self._replace(of_key[key], fault)
                            broken.append(of_key[key])
                    if images:
                        moments = run_in_batches(self.vae_encoder, np.stack([image for _, image in images]), in_call)
                        for (key, _), array in zip(images, moments):
                            self.moments.put(key, array)
                        encoded += len(images)
                    bar.update(len(loaded))
                    if self.status is not None:
                        self.status.phase = f"after encoding {bar.n} of {count} images ahead"
        return encoded + (self._encode_images(broken) if broken else 0)

    def _load_all(self, rows: list[int]) -> list[np.ndarray | UserError]:
        def load(row: int) -> np.ndarray | UserError:
            try:
                return self.data.image(row)
            except UserError as error:
                return error

        return list(self.pool.map(load, rows))

    def _encode_now(self, number: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
        """Return the rows of a micro-batch, their moments and masks, and load the next images in the background."""
        rows, loading = self._loading.pop(number) if number in self._loading else self._load(number)
        if self.end is None or number + 1 < self.end:
            self._loading = {number + 1: self._load(number + 1)}
        loaded: list[tuple[np.ndarray, np.ndarray | None]] = []
        for row, image in zip(rows.tolist(), loading):
            try:
                loaded.append(image.result())
            except UserError as error:
                self._replace(row, error)
                return self._encode_now(number)
        images, masks = zip(*loaded)
        return rows, self.vae_encoder(Tensor(np.stack(images))).asnumpy(), list(masks)

    def _load(self, number: int) -> tuple[np.ndarray, list[Future]]:
        rows = self.rows(number)
        generators = augmentation_draws(self.settings.seed, number, len(rows), self.order.process_index)
        return rows, [
            self.pool.submit(self.data.image_and_mask, row, self.config.vae_factor, rng)
            for row, rng in zip(rows.tolist(), generators)
        ]

    # ---- masks ----------------------------------------------------------------------------------------------------

    def _weights(self, rows: np.ndarray, masks: list[np.ndarray | None], size: tuple[int, ...]) -> np.ndarray:
        """Return the weights (N, 1, h, w) of the loss of a micro-batch."""
        factors = self.data.weights
        return loss_weights(
            masks or [None] * len(rows), (size[0], size[1]), unmasked_weight=self.settings.unmasked_weight,
            normalize_masked_area_loss=self.settings.normalize_masked_area_loss,
            row_factors=None if factors is None else factors[rows].tolist(),
        )  # fmt: skip

    def _mask(self, row: int) -> np.ndarray | None:
        """Return the mask (1, h, w) of a row's image, without random crop and mirroring."""
        content = self.data.mask_content(row)
        if not content:
            return None
        if self.masks is None:  # random crops, or latents that are computed at every step
            return self.data.mask(row, self.config.vae_factor)
        _, height, width = self._moments_shape(row)
        placed = self.data.buckets.size(row), self.data.buckets.scale(row), height, width
        key = content_key("mask", content, self.data.content(row), repr(placed), IMAGE_CODE)
        if key in self._without_mask:
            return None
        mask = self.masks.get(key, (1, height, width))
        if mask is None:
            mask = self.data.mask(row, self.config.vae_factor)
            if mask is not None:
                self.masks.put(key, mask)
            else:  # an image without an alpha channel
                self._without_mask.add(key)
        return mask

    def _mask_if_readable(self, row: int) -> tuple[np.ndarray | None] | None:
        """Return the mask of a row, or None if it cannot be read.

        Of images that were not checked, one that is broken is named and replaced when it is to be encoded.
        """
        try:
            return (self._mask(row),)
        except UserError:
            if self.data.contents is not None:
                raise
            return None

    def _report_masks(self) -> None:
        """Log how many images have a mask, and how much of them the masks show."""
        report = MaskReport(len(self.data))
        count = min(len(self.data), MAX_CHECKED)
        rows = np.linspace(0, len(self.data) - 1, count).round().astype(int).tolist()
        rows = [row for row in rows if not self.data.is_class_image(row)]
        masks = self.pool.map(self._mask_if_readable, rows)
        for row, found in zip(rows, tqdm(masks, "reading masks", len(rows), unit="mask", delay=1, leave=False)):
            if found is not None:
                report.add(row, found[0])
        for line in report.lines(self.data.name):
            logger.info("%s", line)
