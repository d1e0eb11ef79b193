"""The training loss as a cell that MindSpore compiles into the graph of the step."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from ldm.diffusion.schedule import NoiseSchedule, check_prediction_type
from ldm.ops import fork, mean, take_rows


class DiffusionLoss(nn.Cell):
    """Mean squared error between the network's prediction for noisy latents and its target.

    The target is the noise for the prediction type "epsilon", and the velocity sqrt(abar) noise - sqrt(1 - abar) x_0
    for "v_prediction" (Salimans and Ho 2022, section 2.4). The network's parameters keep their names: this cell adds
    no prefix.

    With weights w, the loss is the mean of w d^2 over all elements, as in kohya's sd-scripts. It is not divided by the
    mean of the weights. Masks and the weight of class images (prior preservation) are such weights: all rows have as
    many elements, so the mean over rows of (factor of the row) * (mean of its elements) is the mean over all elements
    of factor * element.

    Args:
        unet: The network, called as unet(noisy_latents, timesteps, text_embeddings).
        schedule: The model's noise schedule.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ValueError: The prediction type is another.
    """

    def __init__(self, unet: nn.Cell, schedule: NoiseSchedule, prediction_type: str) -> None:
        super().__init__(auto_prefix=False)
        check_prediction_type(prediction_type)
        self.unet = unet
        self.predicts_velocity = prediction_type == "v_prediction"
        self.sqrt_alphas = ms.Tensor(schedule.sqrt_alphas)
        self.sqrt_one_minus_alphas = ms.Tensor(schedule.sqrt_one_minus_alphas)
        self.take_rows, self.mean, self.fork = take_rows(), mean(), fork()
        self.reshape = ops.Reshape()
        self.shape = ops.Shape()
        self.cast = ops.Cast()

    def _at_timesteps(self, table: ms.Tensor, timesteps: ms.Tensor, shape: tuple[int, ...]) -> ms.Tensor:
        # Broadcast before multiplying: MindSpore's broadcasting multiply on the CPU keeps four times its output.
        return ops.broadcast_to(self.reshape(self.take_rows(table, timesteps), (-1, 1, 1, 1)), shape)

    def construct(
        self,
        latents: ms.Tensor,
        noise: ms.Tensor,
        timesteps: ms.Tensor,
        text_embeddings: ms.Tensor,
        weights: ms.Tensor | None = None,
    ) -> ms.Tensor:
        """Compute the loss of one micro-batch.

        Args:
            latents: (N, C, h, w) float32, already multiplied by the model's scale factor.
            noise: (N, C, h, w) float32.
            timesteps: (N,) int32.
            text_embeddings: (N, 77, D).
            weights: (N, 1, h, w) float32, factors of the squared errors. None is as weights of 1, bit for bit, and is
                another graph.

        Returns:
            The mean over all elements, a float32 scalar.
        """
        shape = self.shape(latents)
        alpha = self._at_timesteps(self.sqrt_alphas, timesteps, shape)
        sigma = self._at_timesteps(self.sqrt_one_minus_alphas, timesteps, shape)
        noisy_latents = alpha * latents + sigma * noise
        target = noise
        if self.predicts_velocity:
            target = alpha * noise - sigma * latents
        difference = self.cast(self.unet(noisy_latents, timesteps, text_embeddings), ms.float32) - target
        difference, again = self.fork(difference)
        errors = difference * again
        if weights is not None:
            errors = errors * ops.broadcast_to(weights, shape)
        return self.mean(errors)
