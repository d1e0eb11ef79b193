"""The training loss as a cell that MindSpore compiles into the graph of the step."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from ldm.diffusion.loss_weighting import huber_thresholds, loss_factors
from ldm.diffusion.schedule import NoiseSchedule, check_prediction_type
from ldm.ops import fork, mean, row_means, take_rows
from ldm.settings.loss import LossSettings


class DiffusionLoss(nn.Cell):
    """Mean error between the network's prediction for noisy latents and its target, squared by default.

    The target is the noise for the prediction type "epsilon", and the velocity sqrt(abar) noise - sqrt(1 - abar) x_0
    for "v_prediction" (Salimans and Ho 2022, section 2.4). The network's parameters keep their names: this cell adds
    no prefix.

    The error of a difference d is d^2, or by `loss_type`, with the threshold c of the time step,

        l1         |d|
        huber      2 c (sqrt(d^2 + c^2) - c)
        smooth_l1  2 (sqrt(d^2 + c^2) - c)

    The settings that weigh time steps multiply the errors of a sample by a factor (ldm.diffusion.loss_weighting).

    With weights w, the loss is the mean of w times the error over all elements, as in kohya's sd-scripts. It is not
    divided by the mean of the weights. Masks and the weight of class images (prior preservation) are such weights: all
    rows have as many elements, so the mean over rows of (factor of the row) * (mean of its elements) is the mean over
    all elements of factor * element.

    Args:
        unet: The network, called as unet(noisy_latents, timesteps, text_embeddings).
        schedule: The model's noise schedule.
        prediction_type: "epsilon" or "v_prediction".
        settings: What the loss is. None is as the defaults: the mean squared error, without another operator.
        of_rows: Whether to return the mean (N,) of each row instead of that of all.

    Raises:
        ValueError: The prediction type is another.
    """

    def __init__(
        self,
        unet: nn.Cell,
        schedule: NoiseSchedule,
        prediction_type: str,
        settings: LossSettings | None = None,
        of_rows: bool = False,
    ) -> None:
        super().__init__(auto_prefix=False)
        check_prediction_type(prediction_type)
        self.unet = unet
        self.predicts_velocity = prediction_type == "v_prediction"
        self.sqrt_alphas = ms.Tensor(schedule.sqrt_alphas)
        self.sqrt_one_minus_alphas = ms.Tensor(schedule.sqrt_one_minus_alphas)
        settings = LossSettings() if settings is None else settings
        self.is_absolute = settings.loss_type == "l1"
        thresholds, factors = huber_thresholds(settings, schedule), loss_factors(settings, schedule, prediction_type)
        if thresholds is not None:
            # The factor in front of huber and smooth_l1 is of a time step too, so it costs the graph nothing.
            of_type = 2.0 * thresholds if settings.loss_type == "huber" else np.full_like(thresholds, 2.0)
            factors = of_type if factors is None else of_type * factors
        self.thresholds = None if thresholds is None else ms.Tensor(thresholds)
        self.factors = None if factors is None else ms.Tensor(factors)
        self.take_rows, self.mean, self.fork = take_rows(), row_means() if of_rows else mean(), fork()
        self.absolute, self.sqrt, self.halves = ops.Abs(), ops.Sqrt(), ops.Split(1, 2)
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
            noise: (N, C, h, w) float32, or (N, 2 C, h, w) with ip_noise_gamma: first the noise of the target, then that
                of the input.
            timesteps: (N,) int32.
            text_embeddings: (N, 77, D).
            weights: (N, 1, h, w) float32, factors of the errors. None is as weights of 1, bit for bit, and is
                another graph.

        Returns:
            The mean over all elements, a float32 scalar, or with `of_rows` that over each row's, (N,) float32.
        """
        noisy_latents, target = self.input_and_target(latents, noise, timesteps)
        return self.of_prediction(self.unet(noisy_latents, timesteps, text_embeddings), target, timesteps, weights)

    def input_and_target(
        self, latents: ms.Tensor, noise: ms.Tensor, timesteps: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor]:
        """Return what the network gets and what it is to predict, each (N, C, h, w) float32."""
        shape = self.shape(latents)
        alpha = self._at_timesteps(self.sqrt_alphas, timesteps, shape)
        sigma = self._at_timesteps(self.sqrt_one_minus_alphas, timesteps, shape)
        input_noise = noise
        if self.shape(noise)[1] != shape[1]:
            noise, input_noise = self.halves(noise)
        noisy_latents = alpha * latents + sigma * input_noise
        target = noise
        if self.predicts_velocity:
            target = alpha * noise - sigma * latents
        return noisy_latents, target

    def of_prediction(
        self, prediction: ms.Tensor, target: ms.Tensor, timesteps: ms.Tensor, weights: ms.Tensor | None = None
    ) -> ms.Tensor:
        """Return the loss of a prediction (N, C, h, w), any float type: a float32 scalar, or (N,) with `of_rows`."""
        shape = self.shape(target)
        difference = self.cast(prediction, ms.float32) - target
        if self.is_absolute:
            errors = self.absolute(difference)
        else:
            difference, again = self.fork(difference)
            errors = difference * again
        if self.thresholds is not None:
            # sqrt(d^2 + c^2) - c as d^2 / (sqrt(d^2 + c^2) + c), which keeps its digits for a small d.
            threshold = self._at_timesteps(self.thresholds, timesteps, shape)
            errors = errors / (self.sqrt(errors + threshold * threshold) + threshold)
        if self.factors is not None:
            errors = errors * self._at_timesteps(self.factors, timesteps, shape)
        if weights is not None:
            errors = errors * ops.broadcast_to(weights, shape)
        return self.mean(errors)
