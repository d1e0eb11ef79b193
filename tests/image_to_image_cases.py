"""What golden and live comparisons of image-to-image and inpainting share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.settings.model import ModelConfig, load_model_config
from tests.named_weights import named_input

GOLDEN = Path(__file__).parent / "golden"


class Case(NamedTuple):
    """An image that begins from another one."""

    sampler: str
    strength: float
    steps: int
    masked: bool = False
    channels: int = 4  # of the UNet's input


CASES = {
    "image.ddim": Case("ddim", 0.7, 10),
    "image.dpm_solver_pp": Case("dpm_solver_pp", 0.55, 20),
    "image.full": Case("dpm_solver_pp", 1.0, 7),
    "mask.ddim": Case("ddim", 0.6, 10, True),
    "mask.dpm_solver_pp": Case("dpm_solver_pp", 0.75, 20, True),
    "mask.full": Case("dpm_solver_pp", 1.0, 7, True),
    "mask9.ddim": Case("ddim", 0.6, 10, True, 9),
    "mask9.full": Case("dpm_solver_pp", 1.0, 7, True, 9),
}


IMAGES = ("image.ddim", "mask.dpm_solver_pp", "mask9.ddim")  # whose pixels are compared


def with_channels(channels: int) -> ModelConfig:
    """The model of small_sd1.yaml, or the inpainting model of the same size."""
    config = load_model_config(GOLDEN / "small_sd1.yaml")
    return dataclasses.replace(config, unet={**config.unet, "in_channels": channels})


def source_and_mask(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """An RGB image, and a mask of some white: neither symmetric nor at the borders of latents."""
    noise = named_input("source image", (height // 8, width // 8, 3))
    small = Image.fromarray(np.clip(noise * 60 + 128, 0, 255).astype(np.uint8))
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 :, width // 4 : width - 5] = 255
    return small.resize((width, height), Image.Resampling.BICUBIC), Image.fromarray(mask)
