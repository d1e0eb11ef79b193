"""The validation loss: that of images which are not trained, at fixed time steps and with fixed noise.

The loss of an image is the mean squared error of the network's prediction, without anything that a training may do with
it: no weights of time steps, no other error than the square, no offset of the noise, no masks, no class images, neither
dropout nor augmentation, and the caption with all its tags. As many training images are measured in the same way. The
difference between the two is then due to the images alone, and grows when a training begins to learn them by heart.

Noise, latents' posterior and captions are functions of the seed, the time step and the row of an image, so the loss of
an image depends on the weights alone, whatever other images and time steps are measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from ldm.data.draws import draws
from ldm.data.training_data import TrainingData
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.stable_diffusion import StableDiffusion
from ldm.ops import RepeatedCell
from ldm.runtime.batches import fill_batch
from ldm.settings.train import TrainSettings
from ldm.training.inputs import ValidationInputs, sample_latents
from ldm.training.step_graphs import LossFromTokens


def choose_rows(data: TrainingData, count: int, seed: int, stream: str) -> list[int]:
    """Return at most `count` rows of a data set that are no class images, drawn by the seed, in their order."""
    rows = np.arange(len(data))
    is_reg = np.array([subset.is_reg for subset in data.subsets])
    if is_reg.any():
        rows = rows[~is_reg[np.fromiter((row.subset for row in data.rows), np.int64, len(data))]]
    return sorted(rows[draws(seed, stream, 0).permutation(len(rows))[:count]].tolist())


class RowLosses(RepeatedCell):
    """Loss (N,) float32 of each row of a batch, as a graph of its own that shares the networks' weights.

    LoRA's dropout drops nothing here, because its key is zero between steps (ldm.lora.dropout).

    Args:
        model: The networks, in the precision that TrainStep runs them in.
        settings: Those of the run.
    """

    def __init__(self, model: StableDiffusion, settings: TrainSettings):
        super().__init__(auto_prefix=False)
        schedule = NoiseSchedule.from_config(model.config, settings.zero_terminal_snr)
        unet = model.model.diffusion_model
        self.loss: nn.Cell = DiffusionLoss(unet, schedule, model.config.prediction_type, of_rows=True)
        if settings.trains_text_encoder:
            self.loss = LossFromTokens(self.loss, model.cond_stage_model)

    def construct(self, latents: Tensor, noise: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        """Latents and noise (N, C, h, w), timesteps (N,) int32, text embeddings or tokens -> (N,) float32."""
        return self.loss(latents, noise, timesteps, texts)


class MeasuredImages:
    """Images whose loss is computed: rows of a data set in batches of one shape, which are always the same.

    Args:
        inputs: Encodes the images and captions of a data set. See `Inputs.of_data`.
        rows: Their rows.
        seed: Of the noise.
    """

    def __init__(self, inputs: ValidationInputs, rows: Sequence[int], seed: int):
        self.inputs, self.rows, self.seed = inputs, list(rows), seed
        self.batch_size = inputs.settings.train_batch_size
        buckets = inputs.data.buckets.of_row[self.rows]
        self.batches = [
            places[start : start + self.batch_size]
            for places in (np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets))
            for start in range(0, len(places), self.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, part: slice) -> None:
        """Put the images and captions of a part of the batches into the cache."""
        rows = [self.rows[place] for batch in self.batches[part] for place in batch.tolist()]
        self.inputs.encode(rows, [self._caption(row) for row in rows])

    def losses(self, network: nn.Cell, timesteps: Sequence[int], part: slice, bar: tqdm) -> np.ndarray:
        """Return the loss (images, time steps) float64 of each image, 0 of those of other batches than `part`.

        Args:
            network: RowLosses.
            timesteps: The time steps.
            part: Which batches.
            bar: Counts them.
        """
        result = np.zeros((len(self), len(timesteps)))
        for places in self.batches[part]:
            latents, texts = self._inputs_of(places)
            noises = (self._normal(f"validation_noise_{timestep}", places, latents.shape) for timestep in timesteps)
            # All are launched before the first is read, so that an Ascend device need not wait for the host.
            unread = [
                network(latents, Tensor(noise), Tensor(np.full(self.batch_size, timestep, np.int32)), texts)
                for timestep, noise in zip(timesteps, noises)
            ]
            for column, losses in enumerate(unread):
                result[places, column] = losses.asnumpy()[: len(places)]
            bar.update()
        return result

    def _inputs_of(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the latents and the text embeddings of a batch, whose last row is repeated to fill it."""
        config = self.inputs.config
        rows, moments = self.inputs.moments_of([self.rows[place] for place in places.tolist()])
        texts = self.inputs.texts.of([self._caption(row) for row in rows])
        shape = (len(places), config.latent_channels, *moments.shape[2:])
        eps = self._normal("validation_posterior", places, shape)[: len(places)]
        latents = sample_latents(moments, eps, config.scale_factor)
        return Tensor(fill_batch(latents, self.batch_size)), Tensor(fill_batch(texts, self.batch_size))

    def _caption(self, row: int) -> str:
        return self.inputs.captions.whole(row, draws(self.seed, "validation_caption", row))

    def _normal(self, stream: str, places: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return normal numbers for a whole batch, those of each image being a function of its row."""
        rows = [self.rows[place] for place in places.tolist()]
        drawn = [draws(self.seed, stream, row).standard_normal(shape[1:], np.float32) for row in rows]
        return fill_batch(np.stack(drawn), self.batch_size)
