"""The training loss as one graph-safe cell."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from ldm.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule


class DiffusionLoss(nn.Cell):
    """Mean squared error between what the network predicts of a noised latent and what is true of it.

    prediction_type "epsilon": the target is the noise. "v_prediction": it is the velocity, sqrt(abar) noise -
    sqrt(1 - abar) x_0 (Salimans and Ho 2022, section 2.4). `unet` is called as unet(latents, timesteps, context) and
    keeps its parameter names: this cell adds no prefix. Raises ValueError for another prediction type.
    """

    def __init__(self, unet: nn.Cell, schedule: NoiseSchedule, prediction_type: str) -> None:
        super().__init__(auto_prefix=False)
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")
        self.unet = unet
        self.velocity = prediction_type == "v_prediction"
        self.sqrt_alphas = ms.Tensor(schedule.sqrt_alphas)
        self.sqrt_one_minus_alphas = ms.Tensor(schedule.sqrt_one_minus_alphas)
        self.gather = ops.Gather()
        self.reshape = ops.Reshape()
        self.shape = ops.Shape()
        self.cast = ops.Cast()
        self.mean = ops.ReduceMean()

    def _weight(self, table, timesteps, like):
        # Spread to the full shape before multiplying: the CPU's broadcasting multiply keeps four times its output.
        weight = self.reshape(self.gather(table, timesteps, 0), (-1, 1, 1, 1))
        return ops.broadcast_to(weight, self.shape(like))

    def construct(self, latents, noise, timesteps, context):
        """latents, noise: (N, C, h, w) float32, already scaled; timesteps: (N,) int32; context: (N, 77, D).

        Returns the mean over everything, a float32 scalar.
        """
        alpha = self._weight(self.sqrt_alphas, timesteps, latents)
        sigma = self._weight(self.sqrt_one_minus_alphas, timesteps, latents)
        noised = alpha * latents + sigma * noise
        target = noise
        if self.velocity:
            target = alpha * noise - sigma * latents
        difference = self.cast(self.unet(noised, timesteps, context), ms.float32) - target
        return self.mean(difference * difference)
