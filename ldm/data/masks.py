"""Masks of the loss: which parts of an image are trained.

A mask is an image of the same name in another folder (`conditioning_data_dir`), whose red channel counts, or the alpha
channel of the image itself (`alpha_mask`), as in kohya's sd-scripts. White and opaque parts are trained, black and
transparent ones are not. A mask takes the crop, the mirroring and the bucket of its image, and is averaged over the
area of each latent pixel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Optional, Union

import numpy as np
from PIL import Image

from ldm.data.buckets import Size
from ldm.data.decoding import BrokenImage, decoded, read_size
from ldm.data.sources.names import LISTED_SUFFIXES, split_suffix
from ldm.data.sources.rows import ImageFile, Row, Subset, image_name, readable_name
from ldm.data.transforms import Placement, load_placed, place
from ldm.data.upright import WHITE, Color, ImageNotes, upright_alpha, upright_red
from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder

NAMED = 3  # images in a line of the report
_SUFFIXES = tuple(sorted({*LISTED_SUFFIXES, *(suffix.upper() for suffix in LISTED_SUFFIXES)}))


class AlphaChannel:
    """Stands for the alpha channel of the image itself, in place of a file with its mask."""


ALPHA: Final = AlphaChannel()
Mask = Union[str, AlphaChannel]  # the path of a file, or the alpha channel


class MaskFinder:
    """Finds the masks of a data set's images. Each folder is listed once.

    The mask of sub/cat.jpg is sub/cat.jpg in the folder of masks, or else the only image sub/cat there with another
    suffix. Names are relative to the folder of the image's subset. In a folder of masks for all subsets, a folder with
    the name of the subset's comes first, as for kohya's "10_cat". Where the folder has no mask for an image, its alpha
    channel is the mask if `alpha_mask` is set.

    Args:
        subsets: Those of the data set. Their own `conditioning_data_dir` and `alpha_mask` come first.
        folder: The setting conditioning_data_dir.
        alpha_mask: The setting.

    Raises:
        UserError: There is no such folder.
    """

    def __init__(self, subsets: Sequence[Subset], folder: str | None, alpha_mask: bool):
        self._names: dict[str, frozenset[str]] = {}
        self._places: list[tuple[str, tuple[str, ...], bool]] = []
        for subset in subsets:
            own = subset.settings.get("conditioning_data_dir")
            masks = str(own) if own is not None else folder
            if masks is not None and not is_folder(masks, "conditioning_data_dir"):
                raise UserError(f"conditioning_data_dir {plain(masks)} is no folder: give the folder with the masks")
            folders: tuple[str, ...] = ()
            if masks is not None:
                below = os.path.join(masks, os.path.basename(subset.folder))
                # The images may lie in the folder of masks themselves, and are not their own masks.
                is_other = os.path.realpath(below) != os.path.realpath(subset.folder)
                folders = (below, masks) if own is None and is_other and self._listed(below) else (masks,)
            self._places.append((subset.folder, folders, bool(subset.settings.get("alpha_mask", alpha_mask))))

    def find(self, row: Row) -> Optional[Mask]:
        """Return the mask of a row's image, None if there is none.

        Raises:
            UserError: There are two masks with the image's name and other suffixes.
        """
        folder, places, alpha_mask = self._places[row.subset]
        name = os.path.normpath(image_name(row.image, folder))
        if os.path.isabs(name) or name.startswith(os.pardir + os.sep):  # an image outside its subset's folder
            name = os.path.basename(name)
        below, base = os.path.split(name)
        for masks in places:
            path = self._find(os.path.join(masks, below) if below else masks, base)
            if path is not None:
                return path
        return ALPHA if alpha_mask else None

    def _find(self, folder: str, name: str) -> str | None:
        names = self._listed(folder)
        if name in names:
            return os.path.join(folder, name)
        stem, suffix = split_suffix(name)
        stem = stem if suffix in LISTED_SUFFIXES else name  # a name in a tar or Arrow file may have no suffix
        found = [f"{stem}{suffix}" for suffix in _SUFFIXES if f"{stem}{suffix}" in names]
        if len(found) > 1:
            raise UserError(
                f"{plain(folder)} has two masks for the image {plain(name)}, {plain(found[0])} and {plain(found[1])}: "
                "remove one"
            )
        return os.path.join(folder, found[0]) if found else None

    def _listed(self, folder: str) -> frozenset[str]:
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except (OSError, ValueError):
                self._names[folder] = frozenset()
        return self._names[folder]


def load_mask(
    mask: Mask, image: ImageFile | Path, size: int | Size, factor: int, *, scale: float | None = None
) -> np.ndarray | None:
    """Return the mask of an image that is cropped in the middle.

    Args:
        mask: Its file, or ALPHA.
        image: The image that it is of.
        size: Width and height of the trained image in pixels, or the side of a square.
        factor: `ModelConfig.vae_factor`, pixels per latent pixel along a side; 1 for a model in pixel space.
        scale: Pixels of the trained image for a pixel of the image: see `ldm.data.buckets.crop_box`.

    Returns:
        (1, h, w) float32 in [0, 1], 1 is trained. None for an image without an alpha channel.

    Raises:
        UserError: A file is missing, is not an image, is damaged or too large, or the mask has another shape than its
            image.
    """
    try:
        placement = place(read_size(image), size, scale=scale)
    except BrokenImage as error:
        raise UserError(f"{error}; replace it or remove its row") from None
    return placed_mask(mask, image, placement, factor)


def load_image_and_mask(
    image: ImageFile | Path,
    mask: Mask | None,
    size: int | Size,
    factor: int,
    *,
    channels: int = 3,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
    alpha_color: Color = WHITE,
    notes: ImageNotes | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return an image and its mask, both with the same crop and mirroring.

    The image is that of `ldm.data.transforms.load_image` with the same arguments, bit for bit. It takes the same draws.

    Args:
        mask: Its file, ALPHA, or None, which gives no mask.
        factor: See `load_mask`, as for what is returned and raised.
    """
    pixels, placement = load_placed(
        image, size, channels=channels, random_crop=random_crop, random_flip=random_flip, rng=rng, scale=scale,
        alpha_color=alpha_color, notes=notes,
    )  # fmt: skip
    return pixels, None if mask is None else placed_mask(mask, image, placement, factor)


def placed_mask(mask: Mask, image: ImageFile | Path, placement: Placement, factor: int) -> np.ndarray | None:
    """Return the mask (1, h, w) of the part of an image that `placement` says. See `load_mask`.

    A file with a mask is turned by its own EXIF orientation and not by that of its image, because editors that show an
    image upright save its mask upright. The alpha channel is turned with its image.
    """
    width, height = placement.size
    if width % factor or height % factor:
        raise ValueError(f"{width} x {height} pixels are no multiple of {factor}")
    try:
        if isinstance(mask, AlphaChannel):
            with decoded(image, upright_alpha) as alpha:
                if alpha is None:
                    return None
                values = _averaged(alpha, mask, image, placement, factor)
        else:
            with decoded(mask, upright_red) as red:
                values = _averaged(red, mask, image, placement, factor)
    except BrokenImage as error:
        way = "it is a mask in conditioning_data_dir: replace it" if isinstance(mask, str) else "replace it"
        raise UserError(f"{error}; {way}") from None
    return np.ascontiguousarray(values[:, ::-1] if placement.mirrored else values)[None]


def _averaged(
    channel: Image.Image, mask: Mask, image: ImageFile | Path, placement: Placement, factor: int
) -> np.ndarray:
    """Return the mean (h, w) float32, 0 to 1, of a channel of 8 bits over the area of each latent pixel.

    The box in the mask is averaged in one step. Scaling it to the pixels of the trained image first would be an
    interpolation between.
    """
    (width, height), (image_width, image_height) = channel.size, placement.image_size
    # Of the same aspect within a pixel of the smaller of the two: their sizes may have been rounded.
    if abs(width * image_height - height * image_width) > max(width, height, image_width, image_height):
        name = f"the mask {plain(mask)}" if isinstance(mask, str) else "the alpha channel"
        way = "save it in the shape of the image"
        if (height, width) == placement.image_size:
            way = "the image is turned by its EXIF orientation: save the mask upright"
        raise UserError(
            f"{name} has {width:,} x {height:,} pixels and its image {readable_name(image)} has "
            f"{image_width:,} x {image_height:,}: {way}"
        )
    across, down = width / image_width, height / image_height
    left, top, right, bottom = placement.box
    box = (left * across, top * down, min(right * across, width), min(bottom * down, height))
    size = (placement.size[0] // factor, placement.size[1] // factor)
    # In floats, because Pillow rounds the mean of 8 bits to 8 bits. The box filter weights pixels by their area.
    averaged = channel.convert("F").resize(size, Image.Resampling.BOX, box=box)
    return np.clip(np.asarray(averaged, dtype=np.float32) / np.float32(255.0), 0.0, 1.0)


def loss_weights(
    masks: Sequence[np.ndarray | None],
    latent_size: tuple[int, int],
    *,
    unmasked_weight: float = 0.0,
    normalize_masked_area_loss: bool = False,
    row_factors: Sequence[float] | None = None,
) -> np.ndarray:
    """Return the weights of the loss of a micro-batch: see `ldm.diffusion.loss.DiffusionLoss`.

    For a mask m, the weights are w = max(m, unmasked_weight), after averaging to the latent's size. With
    `normalize_masked_area_loss` they are w / mean(w), so that the loss is the mean over the trained area and a small
    mask does not shrink the gradient. Both are OneTrainer's (`masked_losses`), whose least weight is 0.1 by default; 0
    gives kohya's loss * mask. A mask that is black everywhere stays 0, and an image without a mask has weights of 1.

    Args:
        masks: Of each row: (1, h, w) float32 in [0, 1], or None.
        latent_size: h and w.
        row_factors: Factors of the rows, such as `prior_loss_weight` for class images. They multiply last.

    Returns:
        (N, 1, h, w) float32.
    """
    weights = np.ones((len(masks), 1, *latent_size), dtype=np.float32)
    for row, mask in enumerate(masks):
        if mask is not None:
            weights[row] = np.maximum(mask, np.float32(unmasked_weight))
            mean = weights[row].mean(dtype=np.float64)
            if normalize_masked_area_loss and mean > 0.0:
                weights[row] /= mean
    if row_factors is not None:
        weights *= np.asarray(row_factors, dtype=np.float32).reshape(-1, 1, 1, 1)
    return weights


class MaskReport:
    """Counts the masks of a data set and how much of their images they cover. Threads may share it.

    Args:
        count: Number of rows.
    """

    def __init__(self, count: int):
        # Not a number: not seen yet. -1: no mask.
        self._covers = np.full(count, np.nan, dtype=np.float32)

    def add(self, row: int, mask: np.ndarray | None) -> None:
        """Note the mask of a row, or that it has none. With random crops the newest counts."""
        self._covers[row] = -1.0 if mask is None else mask.mean(dtype=np.float64)

    def lines(self, name: Callable[[int], str]) -> list[str]:
        """Return what is to be said, a line each.

        Args:
            name: Gives the name of a row's image.
        """
        seen = int((~np.isnan(self._covers)).sum())
        found = self._covers >= 0
        number = int(found.sum())
        cover = f", which show {self._covers[found].mean(dtype=np.float64):.1%} of them on average" if number else ""
        lines = [f"masks: {number:,} of {seen:,} images have one{cover}"]
        for rows, what in (
            (np.flatnonzero(self._covers == -1.0), "images without a mask, which are trained everywhere"),
            (np.flatnonzero(self._covers == 0.0), "images whose mask is black everywhere"),
        ):
            if len(rows):
                names = [plain(name(int(row)), 80) for row in rows[:NAMED]] + ["..."] * (len(rows) > NAMED)
                lines.append(f"{what}: {len(rows):,} ({', '.join(names)})")
        return lines
