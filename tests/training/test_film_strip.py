"""Film strips: the images of one prompt side by side, the one before training at the left."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.training.film_strip import GAP, LEAST_SIDE, MOST_IMAGES, WIDEST, draw_strip, enlarged, shown


def colours(path, count, side):
    """The colour in the middle of each image of a strip."""
    with Image.open(path) as strip:
        pixels = np.asarray(strip)
    middle = pixels.shape[0] - GAP - side // 2
    return [pixels[middle, GAP + i * (side + GAP) + side // 2].tolist() for i in range(count)]


def test_all_images_are_there_while_there_is_room():
    assert shown(MOST_IMAGES, 64) == list(range(MOST_IMAGES))
    assert shown(0, 64) == []


@pytest.mark.parametrize(("width", "most"), [(64, MOST_IMAGES), (512, 15), (WIDEST, 2)])
def test_old_images_are_thinned_and_do_not_come_back(width, most):
    left_out: set[int] = set()
    for count in range(1, 200):
        indices = shown(count, width)
        assert len(indices) <= most and indices[0] == 0 and indices[-1] == count - 1
        left_out |= set(range(count)) - set(indices)
        assert not left_out & set(indices)


def test_images_are_in_the_order_of_their_steps_below_their_labels(tmp_path):
    reds = [0, 100, 255]
    images = [(step, Image.new("RGB", (80, 80), (red, 0, 0))) for step, red in zip((0, 100, 12_000), reds)]
    draw_strip(images, (80, 80), tmp_path / "strip.png")
    assert colours(tmp_path / "strip.png", 3, 80) == [[red, 0, 0] for red in reds]
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width == 3 * (80 + GAP) + GAP
        label = np.asarray(strip)[: strip.height - 80 - GAP]
    for i in range(3):
        assert label[:, i * (80 + GAP) : (i + 1) * (80 + GAP)].min() < 100


def test_small_images_are_enlarged_and_grey_ones_taken(tmp_path):
    assert enlarged(20, 30) == (80, 120) and enlarged(LEAST_SIDE, 512) == (LEAST_SIDE, 512)
    draw_strip([(0, Image.new("L", (20, 30), 7))], enlarged(20, 30), tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width == 80 + 2 * GAP and strip.getpixel((GAP + 40, strip.height - GAP - 60)) == (7, 7, 7)
