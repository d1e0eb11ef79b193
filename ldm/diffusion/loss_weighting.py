"""The settings of the loss as tables by time step: factors of the loss, and where huber and smooth_l1 change.

Formulas are those of kohya's sd-scripts. The tables are computed in float64 and then rounded.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.schedule import NoiseSchedule
from ldm.settings.loss import LossSettings

MAX_SNR = 1000.0  # of sd-scripts, for all factors but min-SNR: time step 0 of Stable Diffusion has 1175


def min_snr_factors(schedule: NoiseSchedule, gamma: float, predicts_velocity: bool) -> np.ndarray:
    """Return min(snr, gamma) / snr, or min(snr, gamma) / (snr + 1) for velocity: float64 (timesteps,).

    Hang et al. 2023 (arXiv 2303.09556): a loss of the clean latents has the factor min(snr, gamma). The squared error
    of the noise is snr times that of the clean latents, and that of the velocity snr + 1 times.
    """
    snr = schedule.snr
    return np.minimum(snr, gamma) / (snr + 1.0 if predicts_velocity else snr)


def debiased_factors(schedule: NoiseSchedule, predicts_velocity: bool) -> np.ndarray:
    """Return 1 / sqrt(snr), or 1 / (snr + 1) for velocity, with snr up to MAX_SNR: float64 (timesteps,).

    Yu et al. 2023 (arXiv 2310.08442).
    """
    snr = np.minimum(schedule.snr, MAX_SNR)
    return 1.0 / (snr + 1.0) if predicts_velocity else 1.0 / np.sqrt(snr)


def velocity_to_noise_factors(schedule: NoiseSchedule) -> np.ndarray:
    """Return snr / (snr + 1), which turns a loss of the velocity into one of the noise: float64 (timesteps,)."""
    snr = np.minimum(schedule.snr, MAX_SNR)
    return snr / (snr + 1.0)


def loss_factors(settings: LossSettings, schedule: NoiseSchedule, prediction_type: str) -> np.ndarray | None:
    """Return the product of all factors of a sample's loss by time step: float32 (timesteps,), or None for none.

    They are multiplied in the order of sd-scripts: min-SNR, scale_v, v_like, debiased.
    """
    predicts_velocity = prediction_type == "v_prediction"
    factors: list[np.ndarray] = []
    if settings.min_snr_gamma:
        factors.append(min_snr_factors(schedule, settings.min_snr_gamma, predicts_velocity))
    if settings.scale_v_pred_loss_like_noise_pred:
        factors.append(velocity_to_noise_factors(schedule))
    if settings.v_pred_like_loss:
        factors.append(1.0 + settings.v_pred_like_loss / velocity_to_noise_factors(schedule))
    if settings.debiased_estimation_loss:
        factors.append(debiased_factors(schedule, predicts_velocity))
    return np.prod(factors, axis=0).astype(np.float32) if factors else None


def huber_thresholds(settings: LossSettings, schedule: NoiseSchedule) -> np.ndarray | None:
    """Return the error c at which huber and smooth_l1 change, by time step: float32 (timesteps,), None without them.

    The schedules are those of sd-scripts (Khrapov et al. 2024, arXiv 2403.16728): "snr" falls from 1 without noise to
    huber_c in noise alone, "exponential" from huber_scale to huber_c huber_scale.
    """
    if settings.loss_type not in ("huber", "smooth_l1"):
        return None
    if settings.huber_schedule == "snr":
        thresholds = (1.0 - settings.huber_c) / (1.0 + schedule.sigmas) ** 2 + settings.huber_c
    elif settings.huber_schedule == "exponential":
        share = np.arange(schedule.timesteps) / schedule.timesteps
        thresholds = settings.huber_c**share * settings.huber_scale
    else:
        thresholds = np.full(schedule.timesteps, settings.huber_c * settings.huber_scale)
    return thresholds.astype(np.float32)
