"""Any data set's images and captions, encoded without augmentation, for the validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from mindspore import Tensor

from ldm.data.training_data import TrainingData
from ldm.errors import UserError
from ldm.models.autoencoder import VAEEncode
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.training.inputs.captions import Captions
from ldm.training.inputs.encode_ahead import ROWS_AT_ONCE
from ldm.training.inputs.images import Images
from ldm.training.inputs.latents import CachedMoments
from ldm.training.inputs.text_embeddings import TextEmbeddings


@dataclass
class ValidationInputs:
    """Moments and text embeddings of a data set's rows, whose images and captions do not change.

    Args:
        settings: Those of the run.
        config: Of the model.
        encoder: The autoencoder's encoder.
        images: The images.
        captions: Of the rows.
        moments: Their moments in the cache. None: they are computed each time.
        texts: The text embeddings of captions.
    """

    settings: TrainSettings
    config: ModelConfig
    encoder: VAEEncode
    images: Images
    captions: Captions
    moments: CachedMoments | None
    texts: TextEmbeddings

    @property
    def data(self) -> TrainingData:
        """The rows."""
        return self.images.data

    def of_data(self, data: TrainingData, data_path: str | None) -> ValidationInputs:
        """Return the inputs of another data set's rows, by the same networks, threads and caches.

        Args:
            data: The rows.
            data_path: Where they were read, for errors.
        """
        images = Images(data, data_path, self.images.pool)
        moments = None if self.moments is None else replace(self.moments, images=images)
        return replace(self, images=images, captions=replace(self.captions, data=data), moments=moments)

    def encode(self, rows: Sequence[int], captions: Sequence[str]) -> None:
        """Put the images of rows, and captions, into the caches, as far as they are not there."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            if self.moments is not None:
                self.moments.encode(rows[start : start + ROWS_AT_ONCE], reads=False)
            if self.texts.cache is not None:
                self.texts.encode(captions[start : start + ROWS_AT_ONCE])
        self.images.log_notes()

    def moments_of(self, rows: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Return rows, with another one in place of one whose image is broken, and the moments of their images.

        All images have one size.
        """
        while True:
            found = [self.images.usable(row) for row in rows]
            if self.moments is not None:
                moments = self.moments.find(found)
                if moments is not None:
                    return found, moments
                self.moments.encode(found)
            else:
                loaded = self.images.load(found)
                arrays = [array for array in loaded if not isinstance(array, UserError)]
                if len(arrays) == len(found):
                    return found, self.encoder(Tensor(np.stack(arrays))).asnumpy()
                for row, fault in zip(found, loaded):
                    if isinstance(fault, UserError):
                        self.images.replace(row, fault)
