"""The settings that repeat an image, compare images and continue a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.settings.declare import input_path, setting

MAX_INDEX = 2**31 - 1


@dataclass
class RepeatSettings:
    """How images of an earlier run are made again, and what is compared."""

    from_image: Optional[str] = input_path(
        "PNG, JPEG or WebP image that is made again with the settings that its text names, this project's or A1111's; "
        "flags given beside it win",
        group="repeating and comparing",
        resume="followed",
    )
    first_index: int = setting(
        0, "what i of the first image is, in (seed, i): 17 makes the 18th image of a run alone", low=0, high=MAX_INDEX
    )
    full_batches: bool = setting(
        False,
        "fill up batches of fewer than batch_size images with copies, which are left out: rounding depends on the "
        "number of images in a call of the network, so a single image is then that of a larger run bit for bit",
    )
    grid_x: Optional[str] = setting(
        None,
        "compare values of a setting, from left to right on one labelled sheet: lora_scale=0,0.5,1 or seed=1,2 or "
        'prompt="a cat",a dog; prompt_sr=cat,dog replaces the first text in the prompt by the others',
    )
    grid_y: Optional[str] = setting(None, "the same from top to bottom")
    resume: bool = setting(
        False,
        "continue a run that was killed: keep the images in samples/ that are there, and make the others. The settings "
        "must be the same; a run that has not begun begins",
        resume="followed",
    )
