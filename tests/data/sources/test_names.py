"""Which files are taken for images by their names."""

from __future__ import annotations

import pytest

from ldm.data.sources.names import IMAGE_SUFFIXES, is_image


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif"]
)  # of every format that ldm.data.transforms opens
def test_every_format_that_is_opened_has_its_suffix(suffix):
    assert f".{suffix}" in IMAGE_SUFFIXES
    assert is_image(f"a.{suffix}") and is_image(f"a b.{suffix.upper()}")


@pytest.mark.parametrize("name", ["a.txt", "a.png.txt", "png", ".png", "a", "a.pn"])
def test_other_names_are_no_images(name):
    assert not is_image(name)
