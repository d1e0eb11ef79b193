"""Lesson 3 trains a LoRA for each rank, and measures and draws them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from examples.rank import choose_rows, percent
from ldm.data.dataset import Row
from tests.examples.lessons import images, run_lesson

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def lesson(small, tmp_path_factory):
    """The output folder of one run, and what it printed. The test images have two sizes."""
    output = tmp_path_factory.mktemp("lesson") / "out"
    test = output.parent / "test"
    shutil.copytree(small.data, test)
    Image.new("RGB", (24, 20), (180, 128, 75)).save(test / "3.png")
    flags = (
        "--ranks", "1", "4", "--steps", "2", "--prompts", "2", "--shown", "an image of colour 3",
        "--data_path", str(small.data), "--test_path", test.name,
    )  # fmt: skip
    return output, run_lesson("rank", small, output, *flags)


def table(output):
    """The cells of the table, without its header."""
    lines = (output / "rank_table.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_has_a_line_for_each_rank_whose_numbers_are_those_of_the_file(lesson):
    output, printed = lesson
    base, low, high = table(output)
    assert (output / "rank_table.md").read_text(encoding="utf-8") in printed
    assert (base[0], low[0], high[0]) == ("none: the base model", "all, rank 1", "all, rank 4")
    numbers, more = (int(line[1].replace(",", "")) for line in (low, high))
    assert more == 4 * numbers > 0
    assert f"training {numbers:,} parameters" in (output / "all-1" / "log.txt").read_text(encoding="utf-8")
    losses = [line.split(",")[1] for line in (output / "all-1" / "metrics.csv").read_text().splitlines()[1:]]
    assert len(losses) == 2 and low[3] == f"{float(losses[-1]):.3f}"  # the last fifth, at least one step


def test_each_rank_draws_other_images_than_the_base_model_whose_chroma_is_the_unit(lesson):
    output, _ = lesson
    base, low, high = (
        images(*sorted((output / name).glob("*.png"))) for name in ("base", "all-1/images", "all-4/images")
    )
    assert len(base) == 2 and (base != low).any() and (low != high).any()

    def chroma(drawn):
        return (drawn.max(axis=3).astype(float) - drawn.min(axis=3)).mean()

    shares = [line[4] for line in table(output)]
    assert shares == [f"{100 * chroma(drawn) / chroma(base):.0f} %" for drawn in (base, low, high)]
    # The caption to show; base model, two ranks, the real image.
    assert images(output / "rank.png").shape[1:3] == (40 + 136, 160 + 4 * 136 + 8)


def test_the_prompts_that_the_grid_shows_come_first_and_the_others_are_spread_over_the_rest():
    rows = [Row(Path(f"{i}.png"), f"number {i}", "") for i in range(11)]

    def chosen(shown, count):
        found, first = choose_rows(rows, shown, count)
        return [int(row.caption.split()[1]) for row in found], first

    assert chosen(["number 4", "number 2", "no caption"], 5) == ([2, 4, 0, 6, 10], 2)
    assert chosen(["number 4", "number 2"], 2) == ([2, 4], 2)
    assert chosen(["number 4", "number 2"], 1) == ([2], 1)
    assert chosen([], 100) == (list(range(11)), 0)


def test_a_share_of_nothing_is_left_out():
    assert percent(0.1, 0.4) == "25 %" and percent(0.1, 0.0) == ""
