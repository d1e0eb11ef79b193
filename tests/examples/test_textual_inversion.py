"""Lesson 5 learns the same images as a token and as a LoRA, and measures and draws both."""

from __future__ import annotations

import pytest
import yaml

from tests.examples.lessons import images, run_lesson

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def lesson(small, tmp_path_factory):
    """The output folder of one run, and what it printed."""
    output = tmp_path_factory.mktemp("lesson") / "out"
    recipe = yaml.safe_load(small.train_config.read_text(encoding="utf-8"))
    recipe.update(use_lora=False, placeholder_token="<green-face>", initializer_token="face", lora_targets=[])
    token_config = output.parent / "token.yaml"
    token_config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = (
        "--steps", "2", "--samples", "2", "--prompts", "a face", "a fox", "--data_path", str(small.data),
        "--unseen", str(small.data / "3.png"), "--token_config", str(token_config),
    )  # fmt: skip
    return output, run_lesson("textual_inversion", small, output, *flags)


def test_the_table_says_what_each_kind_weighs_and_changes(lesson):
    output, printed = lesson
    text = (output / "textual_inversion_table.md").read_text(encoding="utf-8")
    assert text in printed
    _, token, lora = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:])
    assert (token[0], lora[0]) == ("token", "LoRA")
    for line, file in ((token, "token-42/ckpt/ti.safetensors"), (lora, "lora-42/ckpt/lora.ckpt")):
        assert line[1] == f"{(output / file).stat().st_size / 1e3:.1f} KB"
    others = {name: images(*sorted((output / name / "others").glob("*.png"))) for name in ("base", "LoRA-42")}
    change = abs(others["LoRA-42"].astype(float) - others["base"]).mean()
    assert change > 0 and lora[3] == f"{change:.1f}"


def test_the_token_leaves_all_other_prompts_as_they_are_and_draws_another_face(lesson):
    output, printed = lesson
    base, token = (images(*sorted((output / name / "others").glob("*.png"))) for name in ("base", "token-42"))
    assert len(base) == 2 and (base == token).all()
    assert printed.count("| 0.0 |") == 2  # the base model and the token
    base, token = (images(*sorted((output / name / "face").glob("*.png"))) for name in ("base", "token-42"))
    assert (base != token).any()
    # Two images of the face and two other prompts; base model, token, LoRA.
    assert images(output / "textual_inversion.png").shape[1:3] == (40 + 4 * 136, 160 + 3 * 136 + 8)
