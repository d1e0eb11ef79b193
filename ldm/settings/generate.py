"""The settings of text_to_image.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.errors import UserError, plain
from ldm.settings.declare import MAX_BATCH, setting
from ldm.settings.device import flash_attention_setting, jit_level_setting
from ldm.settings.image_files import ImageFileSettings
from ldm.settings.model_files import ModelFileSettings
from ldm.settings.prompts import PromptSettings
from ldm.settings.read import check_values
from ldm.settings.sampling import SamplingSettings

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass
class GenerateSettings(ImageFileSettings, SamplingSettings, ModelFileSettings, PromptSettings):
    """The settings of text_to_image.py: those of mindone's published script, and this project's own.

    Their order in `-h` is that of the bases, from the last to the first, and then those declared here.
    """

    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR")

    device_target: Optional[str] = setting(
        None, "device; None: Ascend where there is one, else CPU", group="device", choices=("Ascend", "CPU")
    )
    mode: int = setting(0, "0: graph, 1: pynative", choices=(0, 1))
    ms_mode: Optional[int] = setting(None, "another name of mode", choices=(0, 1))
    jit_level: Optional[str] = jit_level_setting()
    precision: str = setting(
        "auto",
        "type of the UNet and the text encoder; auto: fp16 on Ascend, fp32 on CPU. The VAE computes in fp32",
        choices=("auto", "fp16", "fp32"),
    )
    enable_flash_attention: Optional[bool] = flash_attention_setting()
    use_parallel: bool = setting(
        False, "divide the batches between the processes that msrun started; the first one writes the files"
    )
    batch_size: Optional[int] = setting(
        None,
        "images in a call of the network, which does not change them; None: n_samples, at least 16 up to 128 x 128 "
        "pixels, and at most as many as 8 of 512 x 512 pixels",
        low=1,
        high=MAX_BATCH,
    )

    def __post_init__(self) -> None:
        """Check each setting, and the settings against each other. Raises UserError."""
        check_values(self)
        if not self.prompt and self.data_path is None:
            raise UserError('nothing to generate: give --prompt "a text" or --data_path with a file of prompts')
        exclusive = ("prompt", "data_path"), ("negative_prompt", "negative_data_path")
        for name, other in exclusive:
            if getattr(self, name) and getattr(self, other):
                raise UserError(f"--{name} and --{other} are both given: leave one of them out")
        self.check_sampling()
        if self.use_lora and not self.lora_ckpt_path:
            raise UserError("--use_lora is given without a file: add --lora_ckpt_path")
        if self.ms_mode is not None:
            self.mode = self.ms_mode
        self.log_level = self.log_level.rpartition(".")[2].upper()  # "logging.INFO", as published, is INFO
        if self.log_level not in LOG_LEVELS:
            raise UserError(f'log_level "{plain(self.log_level)}" is unknown: one of {", ".join(LOG_LEVELS)}')
