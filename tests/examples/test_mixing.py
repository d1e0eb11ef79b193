"""Lesson 4 mixes two LoRAs, at strengths and in turns, and merges them into one file."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ldm.lora import LoRA, LoRALayer, read_lora, write_lora
from ldm.settings.model import load_model_config
from tests.examples.lessons import images, run_lesson
from tests.training.micro import MICRO

pytestmark = pytest.mark.processes

LAYER = "model.diffusion_model.middle_block.1.transformer_blocks.0.{}.to_v"


@pytest.fixture(scope="module")
def lesson(small, tmp_path_factory):
    """The output folder of one run, and what it printed. The LoRAs are given, so nothing is trained."""
    folder = tmp_path_factory.mktemp("lesson")
    config = load_model_config(MICRO)
    for seed, (name, attention) in enumerate((("line_art", "attn1"), ("twemoji", "attn2"))):
        random = np.random.default_rng(seed)
        down, up = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 32), (32, 2)))
        write_lora(folder / f"{name}.ckpt", LoRA({LAYER.format(attention): LoRALayer(down, up, 2.0)}), config=config)
    flags = ("--line_art", "line_art.ckpt", "--twemoji", "twemoji.ckpt", "--strengths", "0", "1", "--prompts", "a fox")
    return folder / "out", run_lesson("mixing", small, folder / "out", *flags)


def test_the_merged_file_holds_both_and_draws_the_same_images(lesson):
    output, printed = lesson
    config = load_model_config(MICRO)
    both = read_lora(output / "both.ckpt", config)
    for name in ("line_art", "twemoji"):
        for layer, own in read_lora(output.parent / f"{name}.ckpt", config).layers.items():
            np.testing.assert_allclose(both.layers[layer].update(), 0.5 * own.update(), rtol=1e-5, atol=1e-6)
    one, two = (images(*(output / name / "samples").glob("*.png")).astype(int) for name in ("one_file", "two_files"))
    difference = abs(one - two).max()
    assert difference <= 1
    assert re.search(r"images of two files and of one: (\d+) of 255", printed)[1] == str(difference)


def test_the_grid_of_strengths_has_the_base_model_and_each_lora_alone_at_its_edges(lesson):
    output, _ = lesson
    for strengths, title in (("0-0", "base model"), ("1-0", "line art"), ("0-1", "Twemoji"), ("1-1", "both at 1")):
        expected = images(output / "mixing" / title / "0.png")
        assert (images(output / "strengths" / strengths / "0.png") == expected).all()
    mixed = [
        images(output / "mixing" / title / "0.png") for title in ("base model", "line art", "Twemoji", "both at 1")
    ]
    assert all((a != b).any() for i, a in enumerate(mixed) for b in mixed[:i])
    assert images(output / "mixing_strengths.png").shape[1:3] == (40 + 2 * 136, 140 + 2 * 136 + 8)


def test_a_range_of_steps_draws_other_images_than_all_steps(lesson):
    output, _ = lesson
    ranges = {path.name: images(path / "0.png") for path in (output / "mixing_ranges").iterdir()}
    assert (ranges["line art"] == images(output / "mixing" / "line art" / "0.png")).all()
    assert len(ranges) == 6 and all((ranges["line art"] != ranges[name]).any() for name in ranges.keys() - {"line art"})
    assert (ranges["up to 60 %"] != ranges["from 60 % on"]).any()
