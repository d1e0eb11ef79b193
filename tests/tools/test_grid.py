"""The grids of images: each image has its place beside its prompt, in one block or in several."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tools.grid import GAP, SIZE, draw_grid, evenly

STEP = SIZE + GAP
TEXT = 60


def image_files(folder, name, count):
    """Write `count` images of one grey each, and return their files and the greys."""
    greys = [20 + 40 * i + len(name) for i in range(count)]
    files = [folder / f"{name}{i}.png" for i in range(count)]
    for file, grey in zip(files, greys):
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(file)
    return files, greys


@pytest.mark.parametrize("blocks, rows", [(1, 5), (2, 3), (3, 2), (4, 2)])
def test_each_image_is_in_the_row_of_its_prompt_and_in_the_column_of_its_title(tmp_path, blocks, rows):
    prompts = ["one", "two", "three", "four", "five"]
    (left, lefts), (right, rights) = (image_files(tmp_path, name, 5) for name in ("a", "bb"))
    draw_grid(prompts, {"a": left, "bb": right}, tmp_path / "grid.png", text_width=TEXT, blocks=blocks)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    width = TEXT + 2 * STEP + GAP
    blocks = min(blocks, 3)  # none of them is empty: five rows in four blocks are two in each of three
    assert sheet.shape == (40 + rows * STEP, blocks * width, 3)
    for i in range(5):
        x, y = i // rows * width + TEXT, 40 + i % rows * STEP
        assert (sheet[y : y + SIZE, x : x + SIZE] == lefts[i]).all()
        assert (sheet[y : y + SIZE, x + STEP : x + STEP + SIZE] == rights[i]).all()
        assert (sheet[y : y + SIZE, x - TEXT : x] < 128).any()  # the prompt
    for block in range(blocks):
        assert (sheet[:36, block * width : block * width + TEXT] < 128).any()  # the title


def test_indices_are_evenly_spaced_and_all_of_them_when_there_are_few():
    assert evenly(10, 4).tolist() == [0, 3, 6, 9] and evenly(3, 8).tolist() == [0, 1, 2]
