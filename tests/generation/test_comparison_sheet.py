"""The labelled sheet: every image at its place, labels beside them, and a bounded size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.generation.comparison_sheet import MOST_PIXELS, Axis, ComparisonSheet, scale_of


def cell(value, side=64):
    return np.full((side, side, 3), value, np.uint8)


def sheet_of(columns, rows, **more):
    return ComparisonSheet(Axis("lora_scale", columns), Axis("seed", rows), (64, 64), "a cat", **more)


def test_every_image_lies_at_its_place(tmp_path):
    sheet = sheet_of(["0", "0.5", "1"], ["1", "2"])
    for column in range(3):
        for row in range(2):
            sheet.put(column, row, cell(10 * column + 100 * row))
    sheet.write(tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    height, width = pixels.shape[:2]
    for column in range(3):  # counted from the end, where no labels are
        for row in range(2):
            y, x = height - (2 - row) * 134 + 60, width - (3 - column) * 134 + 60
            assert pixels[y, x].tolist() == [10 * column + 100 * row] * 3
            assert (pixels[y - 60 : y + 68, x - 60 : x + 68] == 10 * column + 100 * row).all()


def test_labels_differ_and_are_drawn():
    plain, other = sheet_of(["0", "1"], ["1"]).image, sheet_of(["0", "8"], ["1"]).image
    assert plain.size == other.size
    assert not np.array_equal(np.asarray(plain), np.asarray(other))
    left = np.asarray(plain)[:, :20]
    assert left.min() < 100  # the label of the row


def test_long_labels_are_wrapped_and_cut():
    short, long = sheet_of(["a"], ["1"]).image, sheet_of(["a very long prompt " * 50], ["x" * 5000]).image
    assert long.height < short.height + 100 and long.width < short.width + 100


def test_images_of_other_sizes_and_grey_ones_are_drawn():
    sheet = ComparisonSheet(Axis("H", ["32", "64"]), None, (64, 64), "a cat")
    sheet.put(0, 0, np.full((32, 64, 1), 7, np.uint8))
    sheet.put(1, 0, cell(9))
    pixels = np.asarray(sheet.image)
    top = len(pixels) - 134
    assert (pixels[top : top + 64, 6:134] == 7).all() and (pixels[top + 64 : -6, 6:134] == 235).all()
    assert (pixels[top:-6, 140:268] == 9).all()


def test_a_place_without_an_image_is_grey():
    pixels = np.asarray(sheet_of(["0", "1"], ["1"]).image)
    assert (pixels == 235).all(2).sum() >= 2 * 128 * 128


@pytest.mark.parametrize("columns, rows, side", [(1, 1, 64), (3, 3, 512), (50, 50, 512), (1, 2, 9000), (100, 100, 64)])
def test_a_sheet_is_bounded(columns, rows, side):
    scale = scale_of(columns, rows, (side, side))
    assert columns * rows * (side * scale) ** 2 <= MOST_PIXELS * 1.001
    assert scale <= 1 or scale == int(scale)
