"""The settings of the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.errors import UserError
from ldm.settings.declare import setting
from ldm.settings.model_yaml import MAX_TIMESTEPS

MAX_GUIDANCE = 1000


@dataclass
class SamplingSettings:
    """How the latents of an image are sampled."""

    sampling_steps: int = setting(20, "steps of the sampler", group="sampling", low=1, high=MAX_TIMESTEPS)
    scale: Optional[float] = setting(
        None, "guidance scale, 1 for none; None: 9.0 (SD2.x), 7.5 (SD1.5), 4.0 (nano)", low=0, high=MAX_GUIDANCE
    )
    guidance_rescale: Optional[float] = setting(
        None,
        "share of the guided output that gets the contrast of the prompt's own, so that images are not overexposed; "
        "None: 0.7 with a LoRA trained with zero_terminal_snr, else 0",
        low=0,
        high=1,
    )
    dpm_solver: bool = setting(False, "sample with DPM-Solver instead of DPM-Solver++")
    ddim: bool = setting(False, "sample with DDIM instead of DPM-Solver++")
    ddim_eta: float = setting(0.0, "share of fresh noise in DDIM", low=0, high=1)

    @property
    def sampler(self) -> str:
        """The name in ldm.diffusion.samplers.SAMPLERS."""
        return "ddim" if self.ddim else "dpm_solver" if self.dpm_solver else "dpm_solver_pp"

    def check_sampling(self) -> None:
        """Raise UserError unless the settings of the sampler go together."""
        if self.dpm_solver and self.ddim:
            raise UserError("--dpm_solver and --ddim are both given: leave one of them out")
        if self.ddim_eta and not self.ddim:
            raise UserError(f"--ddim_eta {self.ddim_eta} needs DDIM: add --ddim, or leave it out")
