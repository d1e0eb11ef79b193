"""The settings of text_to_image.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Optional

from ldm.errors import UserError, plain
from ldm.settings.axes import without_folders
from ldm.settings.declare import MAX_BATCH, setting
from ldm.settings.device import PRECISIONS, flash_attention_setting, jit_level_setting
from ldm.settings.image_files import ImageFileSettings
from ldm.settings.model_files import ModelFileSettings
from ldm.settings.prompts import PromptSettings
from ldm.settings.read import check_values
from ldm.settings.repeating import RepeatSettings
from ldm.settings.sampling import SamplingSettings
from ldm.settings.source_image import SourceImageSettings
from ldm.settings.values import settings_of

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass
class GenerateSettings(
    ImageFileSettings, RepeatSettings, SourceImageSettings, SamplingSettings, ModelFileSettings, PromptSettings
):
    """The settings of text_to_image.py: those of mindone's published script, and this project's own.

    Their order in `-h` is that of the bases, from the last to the first, and then those declared here.
    """

    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", resume="followed")

    device_target: Optional[str] = setting(
        None, "device; None: Ascend where there is one, else CPU", group="device", choices=("Ascend", "CPU")
    )
    mode: int = setting(0, "0: graph, 1: pynative", choices=(0, 1))
    ms_mode: Optional[int] = setting(None, "another name of mode", choices=(0, 1))
    jit_level: Optional[str] = jit_level_setting()
    precision: str = setting(
        "auto",
        "type of the UNet and the text encoder; auto: that of the image or run that is repeated (from_image, resume); "
        "fp16 on Ascend; on the CPU bf16 in graph mode where the compiled kernels multiply it, else fp32. bf16: their "
        "weights take half the memory and are multiplied in bf16 (docs/precision.md). The VAE computes in fp32",
        choices=PRECISIONS,
    )
    enable_flash_attention: Optional[bool] = flash_attention_setting()
    use_parallel: bool = setting(
        False,
        "divide the batches between the processes that msrun started; the first one writes the files",
        resume="followed",
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
        self.check_prompts(may_be_empty=self.from_image is not None)  # as the image's was
        self.check_sampling()
        self.check_source_image()
        if self.resume and self.skip_save:
            raise UserError("--resume needs the PNGs of the earlier run: leave out --skip_save")
        if self.init_latents is not None and self.variation_strength:
            raise UserError("--init_latents are the starting noise, which --variation_strength changes: leave out one")
        if self.init_latents is not None and (self.grid_x or self.grid_y):
            raise UserError("--init_latents does not go with a comparison (--grid_x, --grid_y): leave one of them out")
        if self.save_latents is not None and (self.resume or self.grid_x or self.grid_y):
            other = "resume" if self.resume else "grid_x" if self.grid_x else "grid_y"
            raise UserError(f"--save_latents and --{other} do not go together: leave one of them out")
        if self.use_lora and not (self.lora_ckpt_path or self.lora_dir):
            raise UserError("--use_lora is given without a file: add --lora_ckpt_path")
        # With from_image, the image's LoRAs are looked for in it, whatever the syntax is.
        if self.lora_dir is not None and self.prompt_syntax != "a1111" and self.from_image is None:
            raise UserError("--lora_dir is for prompts with <lora:name:0.8>: add --prompt_syntax a1111")
        if self.ms_mode is not None:
            self.mode = self.ms_mode
        self.log_level = self.log_level.rpartition(".")[2].upper()  # "logging.INFO", as published, is INFO
        if self.log_level not in LOG_LEVELS:
            raise UserError(f'log_level "{plain(self.log_level)}" is unknown: one of {", ".join(LOG_LEVELS)}')

    def of_images(self) -> dict[str, Any]:
        """Return the settings that decide the images, by their names, without paths, which say nothing of a file."""
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.metadata["resume"] is None and not field.metadata["path"]
        }
        for name in ("grid_x", "grid_y"):
            if values[name] is not None:
                values[name] = without_folders(values[name], name, settings_of(GenerateSettings))
        return values
