"""Lesson 4, mixing LoRAs: two styles on the same prompts, at all strengths, in turns, and merged into one file.

    python examples/mixing.py
    python examples/mixing.py --line_art my_style.safetensors    # one that was trained before

It prints each command that it runs. The results are in output/examples/mixing: the two LoRAs, both.ckpt (the two merged
into one file), mixing.png (each alone, and both), mixing_strengths.png (a grid of strengths), mixing_ranges.png (LoRAs
at some of the sampling steps) and all images one by one. The same command resumes an interrupted lesson.
examples/mixing.md explains what one sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

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
from tools.lessons import PROMPTS, check_prompts, replaced, save_images, train_lora, write_prompts  # noqa: E402

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline

# What a pipeline merges: (name, strength), or (name, strength, start, end) with shares of the sampling steps.
MIXES = {
    "base model": [],
    "line art": [("line art", 1)],
    "Twemoji": [("Twemoji", 1)],
    "both at 0.5": [("line art", 0.5), ("Twemoji", 0.5)],
    "both at 1": [("line art", 1), ("Twemoji", 1)],
}
RANGES = {
    "line art": [("line art", 1)],
    "from 30 % on": [("line art", 1, 0.3, 1)],
    "from 60 % on": [("line art", 1, 0.6, 1)],
    "up to 60 %": [("line art", 1, 0, 0.6)],
    "then Twemoji": [("line art", 1, 0, 0.6), ("Twemoji", 1, 0.6, 1)],
    "the reverse": [("Twemoji", 1, 0, 0.6), ("line art", 1, 0.6, 1)],
}


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/mixing", "folder of the results", path=True)
    line_art: Optional[Path] = setting(None, "a LoRA instead of the one that is trained on line art", path=True)
    twemoji: Optional[Path] = setting(None, "a LoRA instead of the one that is trained on Twemoji", path=True)
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_nano.yaml", "the recipe, a YAML of configs/train", path=True
    )
    steps: Optional[int] = setting(None, "steps of each training; None: the recipe's", low=1, high=MAX_COUNT)
    prompts: list[str] = setting(PROMPTS, "what to draw; the first one in the grid of strengths", length=(1, 100))
    strengths: list[float] = setting(
        [0, 0.25, 0.5, 0.75, 1], "strengths of either LoRA in the grid of strengths", low=0, high=2, length=(1, 10)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    check_prompts(settings.prompts)
    base, recipe = (from_root(path) for path in (settings.base_model, settings.train_config))
    given = {"line_art": settings.line_art, "twemoji": settings.twemoji}
    loras = {name: None if path is None else Path(from_root(path)) for name, path in given.items()}
    output = Path(from_root(settings.output_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    with claim_folder(output, "--output_path"):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        steps = () if settings.steps is None else ("--max_steps", str(settings.steps))
        for name, style in (("line_art", "emoji_line_art/train"), ("twemoji", "emoji_twemoji")):
            loras[name] = loras[name] or train_lora(recipe, f"datasets/{style}", base, output / name, *steps)
        merge_into_one_file(base, loras["line_art"], loras["twemoji"], settings.prompts, output)
        draw(base, loras["line_art"], loras["twemoji"], settings, output)


def merge_into_one_file(base: str, line_art: Path, twemoji: Path, prompts: list[str], output: Path) -> None:
    """Merge both LoRAs at strength 0.5 into one file, and compare its images with those of the two files."""
    import numpy as np
    from PIL import Image

    mix, both = (f"{line_art}:0.5", f"{twemoji}:0.5"), output / "both.ckpt"
    with replaced(both) as new:
        call("tools/lora/lora_add.py", "--paths", *mix, "--output_path", str(new))

    write_prompts(prompts, output / "prompts.txt")
    generate = ("text_to_image.py", "--ckpt_path", base, "--data_path", str(output / "prompts.txt"), "--seed", "1")
    call(*generate, "--output_path", str(output / "two_files"), "--lora_ckpt_path", *mix)
    call(*generate, "--output_path", str(output / "one_file"), "--lora_ckpt_path", str(both))
    two, one = (
        np.stack([np.asarray(Image.open(file), int) for file in sorted((output / name / "samples").glob("*.png"))])
        for name in ("two_files", "one_file")
    )
    print(f"\nlargest difference between the images of two files and of one: {abs(two - one).max()} of 255")


def draw(base: str, line_art: Path, twemoji: Path, settings: Settings, output: Path) -> None:
    """Draw the mixes, the grid of strengths and the ranges, from Python. Changing the mix compiles no network again."""
    from ldm.generation.pipeline import Pipeline

    print("\nFrom Python, one pipeline draws all mixes:", flush=True)
    pipe = Pipeline.from_checkpoint(base)
    pipe.load_lora(line_art, 0, name="line art")
    pipe.load_lora(twemoji, 0, name="Twemoji")

    for name, mixes in (("mixing", MIXES), ("mixing_ranges", RANGES)):
        columns = {title: draw_mix(pipe, mix, settings.prompts, output / name / title) for title, mix in mixes.items()}
        draw_grid(settings.prompts, columns, output / f"{name}.png", text_width=140, colours=256)
        print(f"{output / name}.png")

    columns = {}
    for y in settings.strengths:
        title = f"Twemoji {y:g}"
        columns[title] = [
            draw_mix(
                pipe, [("line art", x), ("Twemoji", y)], settings.prompts[:1], output / "strengths" / f"{x:g}-{y:g}"
            )[0]
            for x in settings.strengths
        ]
    rows = [f"line art {x:g}" for x in settings.strengths]
    draw_grid(rows, columns, output / "mixing_strengths.png", settings.prompts[0], text_width=140, colours=256)
    print(output / "mixing_strengths.png")


def draw_mix(pipe: Pipeline, mix: Sequence[tuple], prompts: Sequence[str], folder: Path) -> list[Path]:
    """Draw the prompts with these LoRAs merged, and return the files."""
    pipe.set_loras(mix)
    files = [folder / f"{i}.png" for i in range(len(prompts))]
    save_images(pipe(prompts, seed=1).images, files)
    return files


if __name__ == "__main__":
    run_script(main)
