"""Write samplers.npz: final latents of diffusers' schedulers around a toy model, for tests/diffusion/samplers.

Run in the environment that has torch and diffusers: python tests/golden/make_samplers.py
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

STEPS = (1, 2, 5, 10, 14, 15, 20, 50)
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# What Stable Diffusion's published DDIM configuration adds. The two DPM-Solvers differ in their last sigma because
# diffusers refuses "zero" for dpmsolver.
SCHEDULERS = {
    "dpm_solver_pp": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
        None,
    ),
    "dpm_solver": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        None,
    ),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, 0.0),
    "ddim_eta": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, 0.7),
}


def toy_denoise(x: np.ndarray, timestep: int) -> np.ndarray:
    """A smooth, nonlinear stand-in for the network; the tests hold the same formula."""
    return np.tanh(1.3 * x + np.roll(x, 1, axis=-1)) + 0.5 * np.cos(timestep / 150.0) * np.roll(x, 1, axis=1)


def toy_noise(shape: tuple[int, ...], step: int) -> np.ndarray:
    """The noise that DDIM adds at a step: any fixed numbers of deviation 1 do; the tests hold the same formula."""
    return (np.sqrt(2.0) * np.sin(1.7 * np.arange(np.prod(shape)) + step)).reshape(shape).astype(np.float32)


# A schedule whose last time step is noise alone (Lin et al. 2023), which only velocity goes with.
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def run(name: str, prediction_type: str, steps: int, latents: np.ndarray, **more: object) -> np.ndarray:
    cls, settings, eta = SCHEDULERS[name]
    scheduler = cls(**STABLE_DIFFUSION, **settings, **more, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(latents)
    for i, timestep in enumerate(scheduler.timesteps):
        output = torch.from_numpy(toy_denoise(x.numpy(), int(timestep)).astype(np.float32))
        extra = {}
        if eta:
            extra = {"eta": eta, "variance_noise": torch.from_numpy(toy_noise(latents.shape, i))}
        x = scheduler.step(output, timestep, x, **extra).prev_sample
    return x.numpy()


def main() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 5, 6)).astype(np.float32)
    arrays = {"latents": latents, "diffusers": np.array(diffusers.__version__)}
    for name in SCHEDULERS:
        for prediction_type in ("epsilon", "v_prediction"):
            for steps in STEPS:
                arrays[f"{name}.{prediction_type}.{steps}"] = run(name, prediction_type, steps, latents)
    for name in ("dpm_solver_pp", "dpm_solver", "ddim"):
        for steps in STEPS:
            final = run(name, "v_prediction", steps, latents, **ZERO_TERMINAL)
            arrays[f"{name}.zero_terminal_snr.{steps}"] = final
    target = Path(__file__).with_name("samplers.npz")
    np.savez_compressed(target, **arrays)
    print(f"{target.name}: {len(arrays)} arrays, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
