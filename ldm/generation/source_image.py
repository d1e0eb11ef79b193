"""What an image begins from besides noise: another image, of which a mask may say which part is repainted.

An image and its mask are files or images in memory. Both are fitted to the size that is generated, in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Callable, Union

import numpy as np
from PIL import Image, ImageFilter

from ldm.data.buckets import Size, crop_box
from ldm.data.decoding import BrokenImage, decoded, read_size
from ldm.data.upright import upright_red, upright_rgb
from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError, plain
from ldm.files.inputs import content_hash
from ldm.settings.model import ModelConfig
from ldm.settings.source_image import RESIZE_MODES, UPSCALERS

Picture = Union[Path, Image.Image]


@dataclass(frozen=True, eq=False)
class SourceImage:
    """An image to begin from. Two are equal if their files and settings are, or their images are the same objects.

    Attributes:
        image: Its file, or the image.
        mask: An image of the same size: white is repainted, black is kept. None repaints everything.
        resize_mode: How both are fitted to the size that is generated: "crop" takes the largest part of that shape in
            the middle, "resize" stretches the whole image, "pad" repeats its outermost pixels at the sides.
        mask_blur: Standard deviation in pixels of a Gaussian blur of the fitted mask.
    """

    image: Picture
    mask: Picture | None = None
    resize_mode: str = "crop"
    mask_blur: float = 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SourceImage) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Path | int | None, Path | int | None, str, float]:
        # Pillow's images compare their pixels, and have no hash.
        image, mask = (id(part) if isinstance(part, Image.Image) else part for part in (self.image, self.mask))
        return image, mask, self.resize_mode, self.mask_blur

    def check(self) -> None:
        """Raise UserError where a file is not an image, or the mask has another size than its image."""
        _sizes(self)


def source_images(
    image: str | Picture | Sequence[str | Picture] | None,
    mask: str | Picture | Sequence[str | Picture] | None,
    count: int,
    resize_mode: str = "crop",
    mask_blur: float = 0.0,
) -> list[SourceImage | None]:
    """Pair images and masks with `count` prompts. One image is for all prompts, and one mask for all images.

    Raises:
        UserError: A file is not an image, or a mask has another size than its image.
        ValueError: Their numbers do not go together, there is a mask without an image, or the mode is unknown.
    """
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode is {resize_mode!r}: one of {', '.join(RESIZE_MODES)}")
    if image is None:
        if mask is not None:
            raise ValueError("a mask needs an image")
        return [None] * count
    images = _pictures(image)
    masks: list[Picture | None] = [] if mask is None else [*_pictures(mask)]
    if len(images) not in (1, count) or len(masks) not in (0, 1, len(images)):
        raise ValueError(f"{len(images)} images and {len(masks)} masks for {count} prompts")
    if len(masks) < 2:
        masks = (masks or [None]) * len(images)
    sources = [SourceImage(picture, its_mask, resize_mode, mask_blur) for picture, its_mask in zip(images, masks)]
    for source in sources:
        source.check()
    return [*sources] * count if len(sources) == 1 else [*sources]


def _pictures(given: str | Picture | Sequence[str | Picture]) -> list[Picture]:
    pictures = [given] if isinstance(given, (str, Path, Image.Image)) else given
    return [picture if isinstance(picture, Image.Image) else Path(picture) for picture in pictures]


@dataclass(frozen=True, eq=False)
class FittedSource:
    """An image at the size that is generated."""

    pixels: np.ndarray  # (C, H, W) float32 in [-1, 1]
    mask: np.ndarray | None  # (1, H, W) float32 from 0, kept, to 1, repainted

    @property
    def repainted(self) -> np.ndarray:
        """Which pixels are repainted: (1, H, W) float32, 0 or 1, as diffusers rounds a mask."""
        if self.mask is None:
            return np.ones((1, *self.pixels.shape[1:]), np.float32)
        return (self.mask >= 0.5).astype(np.float32)

    @cached_property
    def kept_pixels(self) -> np.ndarray:
        """The image, grey where it is repainted: (C, H, W) float32."""
        return self.pixels * (1.0 - self.repainted)

    def repainted_latents(self, factor: int) -> np.ndarray:
        """Return the mask (1, h, w) of latents: that of the first pixel of each, as in diffusers."""
        return self.repainted[:, ::factor, ::factor]


@dataclass(frozen=True)
class HiresFix:
    """A second pass at a larger size, which begins from what the first one made (A1111's "hires. fix").

    Attributes:
        scale: Of the sides. They are rounded to the nearest size that the model takes.
        strength: As Origin.strength.
        steps: Steps of the second schedule, of which the last share `strength` is taken. None for those of the first.
        upscaler: "latent" enlarges the latents linearly, "lanczos" the decoded image.
    """

    scale: float
    strength: float = 0.7
    steps: int | None = None
    upscaler: str = "latent"

    def __post_init__(self) -> None:
        if self.upscaler not in UPSCALERS:
            raise ValueError(f"upscaler must be one of {', '.join(UPSCALERS)}, not {self.upscaler!r}")
        if self.scale < 1.0 or not 0.0 < self.strength <= 1.0 or (self.steps is not None and self.steps < 1):
            raise ValueError("a hires fix has a scale of at least 1, a strength above 0, at most 1, and a step or more")

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """Return height and width of the second pass. Both are multiples of `multiple`."""
        larger = [max(1, math.floor(side * self.scale / multiple + 0.5)) * multiple for side in (height, width)]
        return larger[0], larger[1]

    def second_pass(self, sampling: Sampling, config: ModelConfig) -> Sampling:
        """Return how the second pass is sampled, for the sampling of the first one."""
        height, width = self.size(
            sampling.height or config.image_size, sampling.width or config.image_size, config.size_multiple
        )
        steps = self.steps or sampling.num_inference_steps
        return replace(sampling, height=height, width=width, num_inference_steps=steps)


@dataclass(frozen=True)
class Origin:
    """What an image begins from besides the noise of its seed.

    Attributes:
        source: An image to begin from.
        strength: How much of it is repainted: the share of the steps that are taken, above 0, at most 1.
        keep_unmasked: Put the pixels that the mask keeps back into the image.
        variation_seed: Of a second noise, which the first is turned towards.
        variation_strength: How far, from 0 to 1, where nothing is left of the first.
        hires: A second pass at a larger size.
    """

    source: SourceImage | None = None
    strength: float = 0.75
    keep_unmasked: bool = True
    variation_seed: int = 0
    variation_strength: float = 0.0
    hires: HiresFix | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What images that are generated together have in common."""
        if self.source is None:
            return (self.hires,)
        return self.strength, self.keep_unmasked, self.source.mask is None, self.hires


NOISE_ALONE = Origin()


def first_step(steps: int, strength: float, name: str = "strength") -> int:
    """Return the step, counted from 0, to begin with: the last int(steps * strength) are taken, as in diffusers.

    Raises:
        UserError: No step is left.
    """
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise UserError(
            f"{name} {strength:g} of {steps} sampling steps leaves no step to take: raise it to at least "
            f"{math.ceil(1000 / steps) / 1000:g}, or take more steps"
        )
    return steps - taken


def slerp(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """Turn one noise towards another on the sphere through both (Shoemake 1985), which keeps its length.

    Args:
        start: (C, h, w).
        end: The same shape.
        share: 0 gives `start` and 1 gives `end`, bit for bit.
    """
    flat = [array.astype(np.float64).ravel() for array in (start, end)]
    cosine = float(flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    if np.sin(angle) < 1e-6:  # the same direction, or the opposite one
        factors = 1.0 - share, share
    else:
        factors = np.sin((1.0 - share) * angle) / np.sin(angle), np.sin(share * angle) / np.sin(angle)
    return np.float32(factors[0]) * start + np.float32(factors[1]) * end


@lru_cache(maxsize=4)
def fit(source: SourceImage, width: int, height: int, channels: int = 3) -> FittedSource:
    """Fit an image and its mask to a size.

    Args:
        source: What to fit.
        width: In pixels.
        height: In pixels.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: A file is missing, not an image, damaged or too large; the mask has another size than its image, or
            nothing of it is white.
    """
    _sizes(source)
    place = partial(_fitted, size=(width, height), resize_mode=source.resize_mode)
    image = _read(source.image, "init_image", upright_rgb, place)
    if channels == 1:
        image = image.convert("L")
    pixels = np.atleast_3d(np.asarray(image, np.float32)).transpose(2, 0, 1) / 127.5 - 1.0
    if source.mask is None:
        return FittedSource(np.ascontiguousarray(pixels), None)
    mask = _read(source.mask, "mask_image", upright_red, place)
    if source.mask_blur:
        mask = mask.filter(ImageFilter.GaussianBlur(source.mask_blur))
    values = np.asarray(mask, np.float32)[None] / np.float32(255.0)
    fitted = FittedSource(np.ascontiguousarray(pixels), values)
    if not fitted.repainted.any():
        raise UserError(
            f"mask_image {_name(source.mask)} has nothing to repaint at {width} x {height} pixels: white is "
            "repainted, black is kept"
        )
    return fitted


def forget_sources() -> None:
    """Read files and images anew: they may have changed since an earlier run or call of this process."""
    fit.cache_clear()
    source_fields.cache_clear()


def keep_unmasked(images: np.ndarray, fitted: list[FittedSource]) -> np.ndarray:
    """Put the pixels that the masks keep back into generated images (N, H, W, C) uint8."""
    result = images.copy()
    for image, source in zip(result, fitted):
        if source.mask is not None:
            share = source.mask.transpose(1, 2, 0)
            original = np.round((source.pixels.transpose(1, 2, 0) + 1.0) * 127.5)
            image[:] = np.round(share * image + (1.0 - share) * original).astype(np.uint8)
    return result


@lru_cache(maxsize=64)
def source_fields(origin: Origin) -> dict[str, str]:
    """Return the names and hashes of the files that an image begins from, for its text fields."""
    fields: dict[str, str] = {}
    if origin.source is not None:
        for name, picture in (("init_image", origin.source.image), ("mask_image", origin.source.mask)):
            if isinstance(picture, Path):
                fields[name] = picture.name
                fields[f"{name}_sha256"] = content_hash(picture)
    return fields


def _sizes(source: SourceImage) -> None:
    size = _size(source.image, "init_image")
    if source.mask is not None:
        mask_size = _size(source.mask, "mask_image")
        if mask_size != size:
            raise UserError(
                f"mask_image {_name(source.mask)} has {mask_size[0]:,} x {mask_size[1]:,} pixels and init_image "
                f"{_name(source.image)} has {size[0]:,} x {size[1]:,}: save the mask at the size of its image"
            )


def _size(picture: Picture, name: str) -> Size:
    if isinstance(picture, Image.Image):
        return picture.size
    try:
        return read_size(picture)
    except BrokenImage as error:
        raise UserError(f"{name}: {error}: give another file") from None


def _read(
    picture: Picture,
    name: str,
    upright: Callable[[Image.Image], Image.Image],
    place: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    """Return a picture upright, in the wanted mode, fitted."""
    if isinstance(picture, Image.Image):
        return place(upright(picture))
    try:
        with decoded(picture, upright) as image:
            return place(image)
    except BrokenImage as error:
        raise UserError(f"{name}: {error}: give another file") from None


def _fitted(image: Image.Image, size: Size, resize_mode: str) -> Image.Image:
    if image.size == size:
        return image.copy()
    if resize_mode == "resize":
        return image.resize(size, Image.Resampling.LANCZOS)
    if resize_mode == "crop":
        # Cropped and scaled in one step: a strip of 1 x 10,000 pixels never becomes 512 x 5,120,000.
        return image.resize(size, Image.Resampling.LANCZOS, box=crop_box(image.size, size))
    scale = min(size[0] / image.width, size[1] / image.height)
    inside = (
        min(size[0], max(1, round(image.width * scale))),
        min(size[1], max(1, round(image.height * scale))),
    )
    small = np.asarray(image.resize(inside, Image.Resampling.LANCZOS))
    before = [(size[axis] - inside[axis]) // 2 for axis in (1, 0)]
    after = [size[axis] - inside[axis] - start for axis, start in zip((1, 0), before)]
    padding = [*zip(before, after), *[(0, 0)] * (small.ndim - 2)]
    return Image.fromarray(np.pad(small, padding, mode="edge"))


def _name(picture: Picture) -> str:
    return "in memory" if isinstance(picture, Image.Image) else plain(picture)
