"""The settings of the training loss and of the noise that is added to the latents.

Names and defaults are those of kohya's sd-scripts. TrainSettings holds them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Optional

from ldm.errors import UserError
from ldm.settings.declare import setting
from ldm.settings.read import check_values

LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("snr", "exponential", "constant")

_noise_setting = partial(
    setting, resume="fixed", not_in_diffusers="the comparison gives both sides the same plain noise"
)
# The tables by time step are constants of the compiled graph.
_loss_setting = partial(
    setting,
    resume="fixed",
    graph_key=True,
    not_in_diffusers="the comparison trains both sides with the mean squared error alone",
)


@dataclass
class LossSettings:
    """How the errors of the prediction become a loss, and what noise is added. snr is abar / (1 - abar)."""

    loss_type: str = _loss_setting(
        "l2",
        "l2: squared error; l1: absolute error; huber and smooth_l1: squared for small errors and absolute for large "
        "ones, so that single bad images count less",
        group="loss",
        choices=LOSS_TYPES,
    )
    huber_schedule: str = _loss_setting(
        "snr",
        "how the error c at which huber and smooth_l1 change falls with the noise: snr, exponential, or constant",
        choices=HUBER_SCHEDULES,
    )
    huber_c: float = _loss_setting(
        0.1, "the error c at which huber and smooth_l1 change: that of the noisiest time step", low=1e-6, high=1000
    )
    huber_scale: float = _loss_setting(
        1.0, "a factor of c in the schedules exponential and constant", low=1e-6, high=1000
    )
    min_snr_gamma: Optional[float] = _loss_setting(
        None,
        "weigh time steps by min(snr, this) / snr, for velocity by min(snr, this) / (snr + 1): those with little noise "
        "count less and training converges sooner; usual is 5. None or 0: off",
        low=0,
        high=1e6,
        aliases=("snr_gamma",),
    )
    scale_v_pred_loss_like_noise_pred: bool = _loss_setting(
        False, "models that predict velocity: weigh time steps as a loss of the noise does, by snr / (snr + 1)"
    )
    v_pred_like_loss: Optional[float] = _loss_setting(
        None,
        "models that predict noise: add the loss of a velocity, (snr + 1) / snr times the loss, with this factor. None "
        "or 0: off",
        low=0,
        high=1e6,
    )
    debiased_estimation_loss: bool = _loss_setting(
        False, "weigh time steps by 1 / sqrt(snr), for velocity by 1 / (snr + 1): those with much noise count more"
    )

    noise_offset: Optional[float] = _noise_setting(
        None,
        "add to the noise of each channel a random number of this standard deviation, so that very bright and very "
        "dark images can be learned; usual is 0.05 to 0.1. None or 0: off",
        group="noise",
        low=0,
        high=100,
    )
    adaptive_noise_scale: Optional[float] = _noise_setting(
        None,
        "add this times the absolute mean of a latent channel to noise_offset. None: off",
        low=-100,
        high=100,
    )
    multires_noise_iterations: Optional[int] = _noise_setting(
        None,
        "add noise of so many lower resolutions to the noise, for the same purpose as noise_offset; usual is 6 to 10. "
        "None or 0: off",
        low=0,
        high=64,
    )
    multires_noise_discount: float = _noise_setting(
        0.3, "factor of each lower resolution, to the power of its number", low=0, high=1
    )
    ip_noise_gamma: Optional[float] = _loss_setting(
        None,
        "standard deviation of further noise in the network's input, which its target does not have, so that it learns "
        "to correct its own errors; usual is 0.1. None or 0: off",
        low=0,
        high=100,
    )
    zero_terminal_snr: bool = _loss_setting(
        False,
        "LoRAs of models that predict velocity: rescale the noise schedule so that the last time step is noise alone. "
        "The LoRA's file says so, and generation follows it",
        needs="use_lora",
    )

    def __post_init__(self) -> None:
        """Check each setting, and the settings against each other. Raises UserError."""
        check_values(self)
        self.check_loss()

    def check_loss(self) -> None:
        """Check the settings against each other. Raises UserError."""
        if self.adaptive_noise_scale and not self.noise_offset:
            raise UserError("adaptive_noise_scale needs noise_offset, which it adds to: give that too, or leave it out")
        if self.noise_offset and self.multires_noise_iterations:
            raise UserError(
                "noise_offset and multires_noise_iterations both change the noise of low frequencies: leave one of "
                "them out"
            )
        if self.scale_v_pred_loss_like_noise_pred and self.v_pred_like_loss:
            raise UserError(
                "scale_v_pred_loss_like_noise_pred is for models that predict velocity and v_pred_like_loss for models "
                "that predict noise: leave one of them out"
            )

    def check_prediction_type(self, prediction_type: str, model: str) -> None:
        """Raise UserError if a setting does not go with what a model predicts. `model` stands for it in the error."""
        predicts_velocity = prediction_type == "v_prediction"
        for name in ("zero_terminal_snr", "scale_v_pred_loss_like_noise_pred"):
            if getattr(self, name) and not predicts_velocity:
                raise UserError(
                    f"{name} is for models that predict velocity, and {model} predicts noise: leave it out, or train "
                    "a model of Stable Diffusion 2.x with 768 pixels"
                )
        if self.v_pred_like_loss and predicts_velocity:
            raise UserError(
                f"v_pred_like_loss is for models that predict noise, and {model} predicts velocity: leave it out"
            )
