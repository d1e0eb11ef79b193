"""The settings of what images begin from besides noise, and of their way through the VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from ldm.errors import UserError
from ldm.settings.declare import MAX_SEED, setting
from ldm.settings.model_yaml import MAX_SIDE, MAX_TIMESTEPS

RESIZE_MODES = ("crop", "resize", "pad")
UPSCALERS = ("latent", "lanczos")


@dataclass
class SourceImageSettings:
    """Image-to-image, inpainting, variations, hires fix and the tiles of the VAE."""

    init_image: Optional[list[str]] = setting(
        None,
        "image to begin from instead of noise alone: a file, several, or a folder, whose images are taken in the order "
        "of their names; one for all prompts, or as many as prompts",
        group="image to image",
        path=True,
    )
    strength: float = setting(
        0.75,
        "how much of init_image is repainted (A1111's denoising strength): the last share of the sampling steps is "
        "taken, int(sampling_steps x strength) of them",
        above=0,
        high=1,
        needs="init_image",
    )
    resize_mode: str = setting(
        "crop",
        "how init_image and mask_image are fitted to H and W; crop: the largest part of that shape in the middle, "
        "resize: the whole image, stretched, pad: the whole image, its outermost pixels repeated at the sides",
        choices=RESIZE_MODES,
        needs="init_image",
    )
    mask_image: Optional[list[str]] = setting(
        None,
        "mask of init_image, of the same size: white is repainted, black is kept; one for all, or as many as images",
        path=True,
        needs="init_image",
    )
    mask_blur: float = setting(
        0.0,
        "standard deviation in pixels of a Gaussian blur of the mask, which hides the edge (A1111: 4)",
        low=0,
        high=256,
        needs="mask_image",
    )
    paste_original: bool = setting(
        True,
        "put the pixels that the mask keeps back into the image, as A1111 does; False leaves what the VAE makes of "
        "them, as diffusers does",
        needs="mask_image",
    )
    variation_seed: Optional[int] = setting(
        None, "seed of a second noise, which that of seed is turned towards (A1111's subseed)", low=0, high=MAX_SEED
    )
    variation_strength: float = setting(
        0.0,
        "how far the noise is turned: 0 gives the image of seed, 1 that of variation_seed",
        low=0,
        high=1,
        needs="variation_seed",
    )
    hires_scale: Optional[float] = setting(
        None,
        "hires fix: generate at H x W, enlarge by this factor, and repaint the larger image",
        above=1,
        high=16,
    )
    hires_strength: float = setting(
        0.7, "strength of the second pass, as strength", above=0, high=1, needs="hires_scale"
    )
    hires_steps: Optional[int] = setting(
        None,
        "steps of the second schedule, of which the share hires_strength is taken; None: sampling_steps",
        low=1,
        high=MAX_TIMESTEPS,
        needs="hires_scale",
    )
    hires_upscaler: str = setting(
        "latent",
        "what is enlarged; latent: the latents, linearly, lanczos: the decoded image",
        choices=UPSCALERS,
        needs="hires_scale",
    )
    vae_tiling: Optional[bool] = setting(
        None,
        "encode and decode images in overlapping tiles, which takes less memory and changes colours a little; None: "
        "above 1536 x 1536 pixels",
    )
    vae_tile_size: int = setting(1024, "side of a tile in pixels", low=32, high=MAX_SIDE)

    def check_source_image(self) -> None:
        """Raise UserError unless the settings of the source image go together."""
        for name, other in (
            ("mask_image", "init_image"),
            ("variation_strength", "variation_seed"),
        ):
            if getattr(self, name) and getattr(self, other) is None:
                raise UserError(f"--{name} is given without --{other}: add it")
        if self.variation_seed is not None and not self.variation_strength:
            raise UserError("--variation_seed has no effect without --variation_strength: add it")
        if self.hires_scale is not None and self.init_image:
            raise UserError(
                "--hires_scale and --init_image are both given: a hires fix enlarges the image of its own first pass; "
                "to enlarge an image, give --H and --W"
            )

    def used_source_settings(self) -> dict[str, Any]:
        """Return the settings that change these images and are no files, for their text fields."""
        used = {
            "init_image": ("strength", "resize_mode"),
            "mask_image": ("mask_blur", "paste_original"),
            "variation_strength": ("variation_seed", "variation_strength"),
            "hires_scale": ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler"),
        }
        names = [name for switch, group in used.items() if getattr(self, switch) for name in group]
        if self.vae_tiling is not None:
            names += ["vae_tiling", "vae_tile_size"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
