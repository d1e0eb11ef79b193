"""The names of samplers and of their schedules of noise levels: this project's, A1111's and kohya's."""

from __future__ import annotations

# This project's names, which are those of ldm.diffusion.samplers.SAMPLERS, with A1111's name of the same sampler.
SAMPLER_LABELS = {
    "dpm_solver_pp": "DPM++ 2M",
    "dpm_solver": "DPM-Solver",  # not in A1111
    "ddim": "DDIM",
    "plms": "PLMS",
    "uni_pc": "UniPC",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "ddpm": "DDPM",  # not in A1111
    "lcm": "LCM",
}

# Names of kohya's sd-scripts (--ss, --sample_sampler) that differ from this project's. Its dpmsingle is not here.
KOHYA_SAMPLERS = {
    "dpmsolver++": "dpm_solver_pp",
    "dpmsolver": "dpm_solver",
    "pndm": "plms",
    "dpm_2": "dpm2",
    "dpm_2_a": "dpm2_a",
    "k_lms": "lms",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2_a",
}

SAMPLER_NAMES = {**{name: name for name in SAMPLER_LABELS}, **KOHYA_SAMPLERS}

# The samplers with a share of fresh noise, `eta`, beside DDIM's own. 1 is what their papers have.
ETA_SAMPLERS = ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde")

AS_TRAINED, KARRAS, EXPONENTIAL = "as_trained", "karras", "exponential"
SGM_UNIFORM, LINSPACE = "sgm_uniform", "linspace"

# The schedules of noise levels, with A1111's "Schedule type". as_trained is that of each sampler's own publication.
SCHEDULE_LABELS = {
    AS_TRAINED: "Uniform",
    KARRAS: "Karras",
    EXPONENTIAL: "Exponential",
    SGM_UNIFORM: "SGM Uniform",
    LINSPACE: "Uniform",
}
SCHEDULES = tuple(SCHEDULE_LABELS)
