"""Write schedulers.npz: where diffusers' schedulers end around a toy network, for tests/diffusion/samplers.

samplers.npz has more steps of the three oldest samplers; here are all of them, with all schedules of noise levels, and
from an image. Run in the environment of `make test-parity`: python -m tests.golden.make_schedulers
"""

from __future__ import annotations

import itertools
import math
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils  # before the next line, because it looks for packages
import numpy as np
import torch

sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # imported for its noise, which is replaced here

from diffusers.schedulers import (  # noqa: E402
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_dpmsolver_sde,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
    scheduling_lcm,
    scheduling_lms_discrete,
    scheduling_pndm,
    scheduling_unipc_multistep,
)

from tests.sampler_cases import (  # noqa: E402
    SHAPE,
    SPACINGS_OF,
    Case,
    cases_of,
    image_latents,
    starting_noise,
    toy_denoise,
    toy_noise,
)

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SDE = {"algorithm_type": "sde-dpmsolver++"}
PUBLISHED = {"steps_offset": 1, "set_alpha_to_one": False}
SCHEDULERS: dict[str, tuple[types.ModuleType, str, dict[str, Any]]] = {
    "dpm_solver_pp": (scheduling_dpmsolver_multistep, "DPMSolverMultistepScheduler", {}),
    "dpm_solver": (
        scheduling_dpmsolver_multistep,
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "ddim": (scheduling_ddim, "DDIMScheduler", {**PUBLISHED, "clip_sample": False}),
    "plms": (scheduling_pndm, "PNDMScheduler", {**PUBLISHED, "skip_prk_steps": True}),
    "uni_pc": (scheduling_unipc_multistep, "UniPCMultistepScheduler", {}),
    "euler": (scheduling_euler_discrete, "EulerDiscreteScheduler", {}),
    "euler_a": (scheduling_euler_ancestral_discrete, "EulerAncestralDiscreteScheduler", {}),
    "heun": (scheduling_heun_discrete, "HeunDiscreteScheduler", {}),
    "lms": (scheduling_lms_discrete, "LMSDiscreteScheduler", {}),
    "dpm2": (scheduling_k_dpm_2_discrete, "KDPM2DiscreteScheduler", {}),
    "dpm2_a": (scheduling_k_dpm_2_ancestral_discrete, "KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_sde": (scheduling_dpmsolver_sde, "DPMSolverSDEScheduler", {}),
    "dpmpp_2m_sde": (scheduling_dpmsolver_multistep, "DPMSolverMultistepScheduler", SDE),
    "ddpm": (scheduling_ddpm, "DDPMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "lcm": (scheduling_lcm, "LCMScheduler", {"set_alpha_to_one": False}),
}
SPACING_OPTIONS: dict[str, dict[str, Any]] = {
    "as_trained": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
}


class BrownianNoise:
    """The noise of a Brownian motion in sigma, up to the middle of a step and up to its end, from two draws."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.middle: tuple[torch.Tensor, float] | None = None

    def __call__(self, sigma: torch.Tensor, next_sigma: torch.Tensor) -> torch.Tensor:
        if self.middle is None:
            self.middle = self.draw(), float(sigma - next_sigma)
            return self.middle[0]
        (noise, width), self.middle = self.middle, None
        share = width / float(sigma - next_sigma)
        return noise * math.sqrt(share) + self.draw() * math.sqrt(1.0 - share)


def build(case: Case) -> Any:
    """diffusers' scheduler with the time steps of a case."""
    module, name, settings = SCHEDULERS[case.sampler]
    options = {**STABLE_DIFFUSION, **settings, **SPACING_OPTIONS[case.spacing]}
    if case.zero_terminal:
        options["rescale_betas_zero_snr"] = True
        if case.sampler != "lcm":
            options["timestep_spacing"] = "trailing"
    if case.sampler == "euler_a" and case.spacing in ("karras", "exponential"):
        # It has no such option: its levels are put to Euler's.
        options = {key: value for key, value in options.items() if not key.startswith("use_")}
    scheduler = getattr(module, name)(**options, prediction_type=case.prediction_type)
    scheduler.set_timesteps(case.steps)
    if case.sampler == "euler_a" and case.spacing in ("karras", "exponential"):
        euler = build(case._replace(sampler="euler"))
        scheduler.timesteps, scheduler.sigmas = euler.timesteps, euler.sigmas
    return scheduler


def final_latents(case: Case) -> np.ndarray:
    """Where diffusers' scheduler ends."""
    if case.sampler == "dpmpp_2s_a":
        return singlestep_ancestral(case, eta=1.0)
    draws = itertools.count()

    def draw(*args: Any, **options: Any) -> torch.Tensor:
        return torch.from_numpy(toy_noise(SHAPE, next(draws)))

    scheduler = build(case)
    SCHEDULERS[case.sampler][0].randn_tensor = draw
    if case.sampler == "dpmpp_sde":
        scheduler.noise_sampler = BrownianNoise(draw)
    noise, image = torch.from_numpy(starting_noise()), torch.from_numpy(image_latents())
    begin = case.first_step * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if case.sampler == "plms" and case.first_step:
        # The list has the second time step twice, which belongs to the first step of a sampling.
        plain = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]])[case.first_step :]
        timesteps = torch.cat([plain[:2], plain[1:]])
    if case.sampler == "lms" and case.first_step:
        # Its order grows with the step's number, as if it had the slopes before: number them from here.
        scheduler.timesteps, scheduler.sigmas, begin = timesteps, scheduler.sigmas[begin:], 0
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if case.first_step:
        latents = scheduler.add_noise(image, noise, timesteps[:1])
    else:
        latents = noise * scheduler.init_noise_sigma
    for timestep in timesteps:
        model_input = scheduler.scale_model_input(latents, timestep)
        output = torch.from_numpy(toy_denoise(model_input.numpy(), float(timestep)).astype(np.float32))
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents.numpy().astype(np.float32)


def singlestep_ancestral(case: Case, eta: float) -> np.ndarray:
    """k-diffusion's DPM++ 2S ancestral in float64, which diffusers does not have, at Euler's levels.

    An eta of 0 is diffusers' DPMSolverSinglestepScheduler: tests/parity/test_samplers.py compares the two.
    """
    euler = build(case._replace(sampler="euler"))
    sigmas, timesteps = euler.sigmas.double().numpy(), euler.timesteps.double().numpy()
    trained = np.log(np.array(((1 - euler.alphas_cumprod) / euler.alphas_cumprod) ** 0.5, np.float64))

    def model(x: np.ndarray, sigma: float, timestep: float) -> np.ndarray:
        output = toy_denoise(x / np.sqrt(sigma**2 + 1), timestep)
        if case.prediction_type == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - output * sigma / np.sqrt(sigma**2 + 1)

    draws = itertools.count()
    noise = starting_noise().astype(np.float64)
    x = image_latents() + noise * sigmas[case.first_step] if case.first_step else noise * sigmas[0]
    for i in range(case.first_step, case.steps):
        up = min(sigmas[i + 1], eta * np.sqrt(sigmas[i + 1] ** 2 * (1 - sigmas[i + 1] ** 2 / sigmas[i] ** 2)))
        down = np.sqrt(sigmas[i + 1] ** 2 - up**2)
        denoised = model(x, sigmas[i], timesteps[i])
        if down == 0:
            x = denoised
            continue
        time, next_time = -np.log(sigmas[i]), -np.log(down)
        h = next_time - time
        middle = np.exp(-(time + 0.5 * h))
        halfway = (middle / sigmas[i]) * x - np.expm1(-0.5 * h) * denoised
        at_middle = model(halfway, middle, float(np.interp(np.log(middle), trained, np.arange(1000))))
        x = (down / sigmas[i]) * x - np.expm1(-h) * at_middle
        if up > 0:
            x = x + toy_noise(SHAPE, next(draws)) * up
    return x.astype(np.float32)


def answers() -> dict[str, np.ndarray]:
    """The final latents of all cases of a sampler, in their order."""
    return {sampler: np.stack([final_latents(case) for case in cases_of(sampler)]) for sampler in SPACINGS_OF}


def main() -> None:
    target = Path(__file__).with_name("schedulers.npz")
    found = answers()
    np.savez_compressed(target, **found)
    count = sum(map(len, found.values()))
    print(f"diffusers {diffusers.__version__}: {count} cases, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
