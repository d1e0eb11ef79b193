"""The settings of the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.errors import UserError
from ldm.settings.declare import setting
from ldm.settings.model_yaml import MAX_TIMESTEPS
from ldm.settings.sampler_names import AS_TRAINED, ETA_SAMPLERS, SAMPLER_LABELS, SCHEDULES

MAX_GUIDANCE = 1000
DEFAULT_SAMPLER = "dpm_solver_pp"
SAMPLER_FLAGS = ("dpm_solver", "ddim", "plms", "uni_pc")  # of mindone's script, which name a sampler each


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
    sampler: Optional[str] = setting(
        None, "sampler, dpm_solver_pp if none is chosen (docs/sampling.md)", choices=tuple(SAMPLER_LABELS)
    )
    schedule: str = setting(
        AS_TRAINED,
        "noise levels of the steps; as_trained: each sampler's own (docs/sampling.md)",
        choices=SCHEDULES,
    )
    plms: bool = setting(False, "sample with PLMS")
    uni_pc: bool = setting(False, "sample with UniPC")
    dpm_solver: bool = setting(False, "sample with DPM-Solver instead of DPM-Solver++")
    ddim: bool = setting(False, "sample with DDIM instead of DPM-Solver++")
    ddim_eta: float = setting(0.0, "share of fresh noise in DDIM", low=0, high=1)
    eta: Optional[float] = setting(None, "share of fresh noise in ancestral and SDE samplers; None: 1", low=0, high=1)

    @property
    def noise_share(self) -> Optional[float]:
        """The share of fresh noise, None for the sampler's default."""
        return self.ddim_eta if self.sampler == "ddim" else self.eta

    def check_sampling(self) -> None:
        """Put the sampler that a flag names into `sampler`, and check that the settings go together.

        Raises:
            UserError: They do not.
        """
        chosen = {} if self.sampler is None else {self.sampler: f"--sampler {self.sampler}"}
        for name in SAMPLER_FLAGS:
            if getattr(self, name):
                chosen.setdefault(name, f"--{name}")
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen.values())} are both given: leave one of them out")
        self.sampler = next(iter(chosen), DEFAULT_SAMPLER)
        if self.ddim_eta and self.sampler != "ddim":
            raise UserError(f"--ddim_eta {self.ddim_eta} needs DDIM: add --ddim, or leave it out")
        if self.eta is not None and self.sampler not in ETA_SAMPLERS:
            raise UserError(
                f"--eta {self.eta} has no effect on {self.sampler}: leave it out, or choose one of "
                f"{', '.join(ETA_SAMPLERS)} (--sampler); DDIM has --ddim_eta"
            )
