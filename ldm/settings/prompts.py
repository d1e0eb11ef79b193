"""The settings of the prompts and of the images that are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.settings.declare import MAX_SEED, input_path, setting
from ldm.settings.model_yaml import MAX_SIDE

MAX_IMAGES = 1_000_000


@dataclass
class PromptSettings:
    """What the images show, how many there are and how large they are."""

    generate_config: Optional[str] = input_path(
        "YAML file with any of these settings; flags win over it", group="images"
    )
    # Not Optional, because "none" may be a prompt.
    prompt: str = setting("", "the prompt")
    data_path: Optional[str] = input_path(
        "text file (UTF-8) with one prompt per line, instead of prompt; an empty line is an empty prompt, but empty "
        "lines at the end do not count (a line with a space does)"
    )
    negative_prompt: str = setting("", "what the images should not show, for all prompts")
    negative_data_path: Optional[str] = input_path(
        "text file with one negative prompt per line, as many as prompts, or one for all"
    )
    n_iter: int = setting(1, "rounds; each prompt gets n_iter x n_samples images", low=1, high=MAX_IMAGES)
    n_samples: int = setting(1, "images of each prompt in a round", low=1, high=MAX_IMAGES)
    H: Optional[int] = setting(None, "height in pixels; None for the model's own", low=1, high=MAX_SIDE)
    W: Optional[int] = setting(None, "width in pixels; None for the model's own", low=1, high=MAX_SIDE)
    seed: int = setting(
        42,
        "image i depends on (seed, i) only, not on the batch size; i counts the images of all prompts",
        low=0,
        high=MAX_SEED,
    )
    init_latents: Optional[str] = setting(
        None, "starting latents instead of the seed's: an .npy of floats, (images, channels, height, width)", path=True
    )
