"""The samplers, one file each. `steps.py` describes their interface."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ldm.diffusion.samplers import ddim, dpm_solver, dpm_solver_pp

SAMPLERS: dict[str, Callable[..., np.ndarray]] = {
    "dpm_solver_pp": dpm_solver_pp.sample,
    "dpm_solver": dpm_solver.sample,
    "ddim": ddim.sample,
}
