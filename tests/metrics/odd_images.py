"""Images of every kind, the same in every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.decoding import decoded
from ldm.metrics.preprocessing import plain_rgb


def open_plain(path: Path) -> Image.Image:
    """Open an image as the evaluation does."""
    with decoded(path, plain_rgb) as image:
        return image


def write_odd_images(folder: Path) -> dict[str, Path]:
    """Write the images to a folder and return the file of each kind."""
    rng = np.random.RandomState(3)

    def smooth(height: int, width: int, channels: int) -> np.ndarray:
        """Waves and noise, uint8 (height, width, channels)."""
        y, x = np.mgrid[:height, :width].astype(np.float64)
        waves = [np.sin(x / (3 + 5 * c) + y / (7 + 2 * c)) for c in range(channels)]
        return np.clip(127 + 90 * np.stack(waves, -1) + rng.normal(0, 20, (height, width, channels)), 0, 255).astype(
            np.uint8
        )

    colours = Image.fromarray(smooth(61, 83, 3))
    sixteen = (smooth(40, 50, 1)[..., 0].astype(np.uint16) * 257) ^ 0x55
    images = {
        "odd.png": colours,
        "tall.png": Image.fromarray(smooth(500, 37, 3)),
        "large.png": Image.fromarray(smooth(333, 421, 3)),
        "same.png": Image.fromarray(smooth(299, 299, 3)),
        "one_pixel.png": Image.fromarray(smooth(1, 1, 3)),
        "row.png": Image.fromarray(smooth(1, 9, 3)),
        "grey.png": Image.fromarray(smooth(30, 41, 1)[..., 0]),
        "grey_alpha.png": Image.fromarray(smooth(31, 29, 2), "LA"),
        "alpha.png": Image.fromarray(smooth(64, 64, 4), "RGBA"),
        "palette.png": colours.quantize(17),
        "palette_transparent.png": colours.quantize(9),
        "one_bit.png": Image.fromarray(smooth(33, 34, 1)[..., 0]).convert("1"),
        "sixteen.png": Image.fromarray(sixteen),
        "photo.jpg": colours,
        "grey.jpg": Image.fromarray(smooth(52, 51, 1)[..., 0]),
        "cmyk.jpg": Image.fromarray(smooth(45, 46, 4), "CMYK"),
        "turned.jpg": colours,
        "picture.webp": colours,
        "picture.bmp": colours,
    }
    turned = Image.Exif()
    turned[0x0112] = 6  # viewers turn it by 90 degrees, pytorch-fid ignores it
    options = {
        "palette_transparent.png": {"transparency": 3},
        "turned.jpg": {"exif": turned},
        "picture.webp": {"lossless": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / name, **options.get(name, {}))
    return {name: folder / name for name in images}
