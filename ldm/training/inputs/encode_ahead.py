"""Encoding ahead: what the caches do not have yet is encoded before it is needed, in windows or all at once."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.batches import BatchOrder
from ldm.data.buckets import Buckets
from ldm.data.shards import MEMORY_BYTES
from ldm.errors import UserError
from ldm.runtime import peers
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.tokenizer import CONTEXT_LENGTH
from ldm.training.inputs.captions import Captions
from ldm.training.inputs.images import Images
from ldm.training.inputs.latents import CachedMoments
from ldm.training.inputs.masks import Masks
from ldm.training.inputs.text_embeddings import TextEmbeddings
from ldm.training.status import Status

logger = logging.getLogger(__name__)

WINDOW_BYTES = 128 << 20  # of the arrays that are encoded ahead
ROWS_AT_ONCE = 1024  # rows whose missing arrays are collected before they are encoded


def window_limits(settings: TrainSettings, config: ModelConfig, buckets: Buckets) -> tuple[int, int]:
    """Return how many micro-batches are encoded ahead at most, and the bytes of the arrays of those in use.

    Arrays that cannot be kept on disk stay in memory until they are used: those of the window, of the one before it
    and of the micro-batches that a thread makes ahead.
    """
    pixels = max(width * height for width, height in buckets.sizes)
    latents = config.moment_channels * pixels // config.vae_factor**2
    of_batch = 4 * settings.train_batch_size * (latents + CONTEXT_LENGTH * config.context_dim)
    ahead = max(1, min(settings.encode_ahead, WINDOW_BYTES // of_batch))
    return ahead, max(MEMORY_BYTES, (2 * ahead + settings.gradient_accumulation_steps + 1) * of_batch)


class EncodeAhead:
    """Encodes the images and captions of coming micro-batches into the caches.

    A window is of one micro-batch at first, so that the training starts soon, and of `limit` in the end.

    Args:
        images: The images.
        masks: Their masks.
        moments: Their moments. None: they are computed at every step.
        captions: Of the rows.
        texts: Their text embeddings.
        order: Which rows each micro-batch has.
        limit: How many micro-batches a window has at most.
        end: The number after that of the last micro-batch. None: there is no end.
        folder: Of the caches, for messages.
        status: It is told how far the encoding has come.
    """

    def __init__(
        self,
        images: Images,
        masks: Masks,
        moments: CachedMoments | None,
        captions: Captions,
        texts: TextEmbeddings,
        order: BatchOrder,
        *,
        limit: int,
        end: int | None,
        folder: Path,
        status: Status | None,
    ):
        self.images, self.masks, self.moments = images, masks, moments
        self.captions, self.texts, self.order = captions, texts, order
        self.limit, self.end, self.folder, self.status = limit, end, folder, status
        caches = None if moments is None else moments.cache, texts.cache
        self._caches = [cache for cache in caches if cache is not None]
        self._prepared, self._window = range(0), 0

    @property
    def keeps_all(self) -> bool:
        """Whether all that is encoded is kept: the caches are on disk, and it can be written."""
        return all(cache.keeps_all for cache in self._caches)

    def prepare(self, number: int) -> None:
        """Encode what the caches do not have yet of a micro-batch and of those that follow it in its window."""
        if number in self._prepared or not self._caches:
            return
        self._window = min(self.limit, max(1, 2 * self._window))
        # Within an epoch without repeats, no two processes have the same row, so that none encodes what another does.
        epoch_end = (self.order.epoch(number) + 1) * self.order.steps_per_epoch
        ends = number + self._window, epoch_end, epoch_end if self.end is None else max(number + 1, self.end)
        window = range(number, min(ends))
        self._refresh()
        phase = "" if self.status is None else self.status.phase
        if self.moments is not None:
            self.moments.encode(np.concatenate([self._rows(i) for i in window]).tolist())
        if self.texts.cache is not None:
            captions = {caption: None for i in window for caption in self.captions.of_batch(self._rows(i), i)}
            self.texts.encode([*captions, ""])
        if self.order.process_count > 1:
            self._flush()
        self.images.log_notes()
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
        rows = range(len(self.images.data))
        what = ["images"] * (self.moments is not None) + ["captions"] * self._encodes_captions_once
        if not what:
            raise UserError(
                "there is nothing to encode ahead: random_crop, random_flip and captions that change are encoded at "
                "every step, and so is what cache_latents and cache_text leave out"
            )
        if count > 1:
            self._encode_rows(rows[process::count])
            self._flush()
            peers.gather()  # waits until the others have encoded theirs
            self._refresh()
        encoded = self._encode_rows(rows)
        if count > 1 and encoded:
            logger.warning(
                "%d arrays of other processes were not under %s and were computed again: let all hosts share "
                "output_path",
                encoded, self.folder,
            )  # fmt: skip
        return what

    @property
    def _encodes_captions_once(self) -> bool:
        return self.texts.cache is not None and self.captions.data.has_one_caption

    def _encode_rows(self, rows: range) -> int:
        """Encode the images and captions of rows and return how many arrays were not in the caches."""
        encoded = 0
        with tqdm(total=len(rows), desc="encoding the data set", unit="row", delay=1) as bar:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[start : start + ROWS_AT_ONCE]
                if self.moments is not None:
                    encoded += self.moments.encode(part, reads=False)
                self.masks.of_rows(list(part))
                if self._encodes_captions_once:
                    encoded += self.texts.encode([*self.captions.of_batch(np.array(part), 0), ""])
                bar.update(len(part))
        self.images.log_notes()
        return encoded

    def _rows(self, number: int) -> np.ndarray:
        return self.images.usable_rows(self.order.indices(number))

    def _flush(self) -> None:
        """Have what was encoded written to the disk, so that processes of other hosts find it."""
        for cache in self._caches:
            cache.flush()

    def _refresh(self) -> None:
        """Find what other processes have encoded."""
        for cache in self._caches:
            cache.refresh()
