"""Lesson 1 trains a LoRA, draws before and after, and the strip of strengths."""

from __future__ import annotations

import pytest

from tests.examples.lessons import images, run_lesson

pytestmark = pytest.mark.processes

PROMPTS = ["a fox", "a red apple"]


@pytest.fixture(scope="module")
def lesson(small, tmp_path_factory):
    """The output folder of one run, and what it printed."""
    output = tmp_path_factory.mktemp("lesson") / "out"
    return output, run_lesson("first_lora", small, output, "--data_path", str(small.data), "--prompts", *PROMPTS)


def test_it_prints_its_commands_and_leaves_the_lora_and_both_images(lesson):
    output, printed = lesson
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("$ ")] == [
        "train_text_to_image.py", "text_to_image.py", "text_to_image.py"
    ]  # fmt: skip
    assert (output / "lora/ckpt/lora.ckpt").is_file()
    assert images(output / "first_lora.png").shape[1:3] == (40 + 2 * 136, 140 + 2 * 136 + 8)
    assert images(output / "first_lora_strengths.png").shape[1:3] == (40 + 2 * 136, 140 + 5 * 136 + 8)
    assert (output / "prompts.txt").read_text().splitlines() == PROMPTS


def test_strength_0_is_the_base_model_and_strength_1_the_lora_bit_for_bit(lesson):
    output, printed = lesson
    drawn = {s: images(*sorted((output / "strengths").glob(f"{s}-*.png"))) for s in ("0", "0.5", "1")}
    before, after = (images(*sorted((output / name / "samples").glob("*.png"))) for name in ("before", "after"))
    assert (drawn["0"] == before).all() and (drawn["1"] == after).all()
    assert (drawn["0.5"] != before).any() and (drawn["0.5"] != after).any()
    assert printed.count("bit for bit: True") == 2
