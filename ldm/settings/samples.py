"""The settings of the images that a training draws, and of each of its prompts.

Names are those of kohya's sd-scripts, defaults those of text_to_image.py. TrainSettings holds SampleSettings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Optional, Union

from ldm.errors import UserError
from ldm.settings.declare import MAX_COUNT, MAX_SEED, names_of, setting
from ldm.settings.generate import GenerateSettings
from ldm.settings.model_yaml import MAX_SIDE, MAX_TIMESTEPS
from ldm.settings.sampler_names import SAMPLER_NAMES
from ldm.settings.sampling import MAX_GUIDANCE

_sample_setting = partial(setting, not_in_diffusers="the comparison draws no images while it trains")


@dataclass
class SampleSettings:
    """Which images a training draws, and when."""

    sample_prompts: Optional[Union[str, list[str]]] = _sample_setting(
        None,
        "draw images while training: a .txt, .json or .toml file with prompts, or the prompts themselves, each with "
        "kohya's flags if wanted: --n negative prompt, --w width, --h height, --d seed, --l guidance scale, --s steps, "
        "--ss sampler (docs/watching.md)",
        group="images while training",
    )
    sample_every_n_steps: Optional[int] = _sample_setting(
        None,
        "draw after every so many steps. The last step is drawn in any case",
        low=1,
        high=MAX_COUNT,
        needs="sample_prompts",
    )
    sample_every_n_epochs: Optional[int] = _sample_setting(
        None, "draw after every so many epochs", low=1, high=MAX_COUNT, needs="sample_prompts"
    )
    sample_at_first: bool = _sample_setting(True, "draw before the first step too, what the base model draws")
    sample_sampler: str = _sample_setting(
        "dpm_solver_pp", "sampler of the prompts that name none", choices=tuple(SAMPLER_NAMES)
    )

    def check_samples(self) -> None:
        """Check the settings against each other. Raises UserError."""
        if self.sample_prompts is None:
            for name in names_of(SampleSettings, needs="sample_prompts"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} has no effect without sample_prompts: give that too, or leave it out")


@dataclass
class PromptLineSettings:
    """One prompt of sample_prompts or data_path with its own settings, by kohya's names in JSON and TOML files."""

    prompt: str = setting("")
    negative_prompt: str = setting("")
    width: Optional[int] = setting(None, low=1, high=MAX_SIDE)
    height: Optional[int] = setting(None, low=1, high=MAX_SIDE)
    seed: int = setting(GenerateSettings.seed, low=0, high=MAX_SEED)
    scale: Optional[float] = setting(None, low=0, high=MAX_GUIDANCE)
    sample_steps: int = setting(GenerateSettings.sampling_steps, low=1, high=MAX_TIMESTEPS)
    sample_sampler: Optional[str] = setting(None, choices=tuple(SAMPLER_NAMES))
