"""The samplers, one file each, or one for two that share their loop. `steps.py` describes their interface."""

from __future__ import annotations

from ldm.diffusion.samplers import ddim, dpm_solver, dpm_solver_pp
from ldm.diffusion.samplers.steps import Sampler

_SAMPLERS = (
    dpm_solver_pp.sample,
    dpm_solver.sample,
    ddim.sample,
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _SAMPLERS}
