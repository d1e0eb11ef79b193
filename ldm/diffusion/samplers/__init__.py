"""The samplers, one file each, or one for two that share their loop. `steps.py` describes their interface."""

from __future__ import annotations

from ldm.diffusion.samplers import (
    ddim,
    ddpm,
    dpm2,
    dpm_solver,
    dpm_solver_pp,
    dpmpp_2m_sde,
    dpmpp_2s_a,
    dpmpp_sde,
    euler,
    heun,
    lcm,
    lms,
    plms,
    uni_pc,
)
from ldm.diffusion.samplers.steps import Sampler

_SAMPLERS = (
    dpm_solver_pp.sample,
    dpm_solver.sample,
    ddim.sample,
    plms.sample,
    uni_pc.sample,
    euler.sample,
    euler.sample_ancestral,
    heun.sample,
    lms.sample,
    dpm2.sample,
    dpm2.sample_ancestral,
    dpmpp_2s_a.sample,
    dpmpp_sde.sample,
    dpmpp_2m_sde.sample,
    ddpm.sample,
    lcm.sample,
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _SAMPLERS}
