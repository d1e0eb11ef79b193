"""Lesson 1, the first LoRA: from a folder of images with captions to images before and after.

    python examples/first_lora.py
    python examples/first_lora.py --data_path my_images --output_path output/mine --prompts "a red apple" "a koala"

It prints each command that it runs. The results are in output/examples/first_lora: lora/ckpt/lora.ckpt (the LoRA),
first_lora.png (before and after), first_lora_strengths.png (the strip of strengths) and all images one by one. The same
command resumes an interrupted lesson. examples/first_lora.md explains what one sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.settings.declare import MAX_COUNT, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import call, from_root  # noqa: E402
from tools.grid import draw_grid  # noqa: E402
from tools.lessons import PROMPTS, check_prompts, same_pixels, save_images, train_lora, write_prompts  # noqa: E402

STRENGTHS = (0, 0.25, 0.5, 0.75, 1)


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/first_lora", "folder of the results", path=True)
    data_path: Path = setting(
        ROOT / "datasets/emoji_line_art/train", "folder with images and img_txt.csv (datasets/README.md)", path=True
    )
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_text_nano.yaml", "the recipe, a YAML of configs/train", path=True
    )
    steps: Optional[int] = setting(None, "steps of training; None: the recipe's", low=1, high=MAX_COUNT)
    prompts: list[str] = setting(PROMPTS, "what to draw, before and after", length=(1, 100))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    check_prompts(settings.prompts)
    data, base, recipe = (from_root(path) for path in (settings.data_path, settings.base_model, settings.train_config))
    output = Path(from_root(settings.output_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    with claim_folder(output, "--output_path"):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        steps = () if settings.steps is None else ("--max_steps", str(settings.steps))
        lora = train_lora(recipe, data, base, output / "lora", *steps)
        before, after = draw_before_and_after(base, lora, settings.prompts, output)
        draw_strengths(base, lora, settings.prompts, before, after, output)


def draw_before_and_after(base: str, lora: Path, prompts: list[str], output: Path) -> tuple[list[Path], list[Path]]:
    """Draw the prompts with the base model, and with the LoRA. Returns the files of both."""
    write_prompts(prompts, output / "prompts.txt")
    generate = ("text_to_image.py", "--ckpt_path", base, "--data_path", str(output / "prompts.txt"), "--seed", "1")
    call(*generate, "--output_path", str(output / "before"))
    call(*generate, "--output_path", str(output / "after"), "--lora_ckpt_path", str(lora))

    before, after = (sorted((output / name / "samples").glob("*.png")) for name in ("before", "after"))
    columns = {"base model": before, "with the LoRA": after}
    draw_grid(prompts, columns, output / "first_lora.png", text_width=140, colours=256)
    print(f"\nbefore and after: {output / 'first_lora.png'}")
    return before, after


def draw_strengths(
    base: str, lora: Path, prompts: list[str], before: list[Path], after: list[Path], output: Path
) -> None:
    """Draw the prompts at several strengths of the LoRA, from Python, and compare both ends with `before`, `after`."""
    # Imported late: MindSpore takes seconds to import, and the scripts above run in processes of their own.
    from ldm.generation.pipeline import Pipeline

    print("\nFrom Python, one pipeline draws all strengths, and no network is compiled again:", flush=True)
    pipe = Pipeline.from_checkpoint(base)
    pipe.load_lora(lora, 0, name="style")
    columns = {}
    for strength in STRENGTHS:
        pipe.set_loras([("style", strength)])
        columns[f"{strength:g}"] = files = [output / "strengths" / f"{strength:g}-{i}.png" for i in range(len(prompts))]
        save_images(pipe(prompts, seed=1).images, files)
    draw_grid(prompts, columns, output / "first_lora_strengths.png", text_width=140, colours=256)
    print(f"the strip of strengths: {output / 'first_lora_strengths.png'}")
    print(f"strength 0 is the image of the base model, bit for bit: {same_pixels(columns['0'], before)}")
    print(f"strength 1 is the image of the command with the LoRA, bit for bit: {same_pixels(columns['1'], after)}")


if __name__ == "__main__":
    run_script(main)
