"""Lesson 6, from kohya's folder to a file for A1111 and ComfyUI.

    python examples/kohya_to_a1111.py
    python examples/kohya_to_a1111.py --kohya_path my_folder --name mine --output_path output/mine    # your own folder

A folder in kohya's layout holds folders like `10_emoji line art`: the number of repeats, "_" and the class tokens. In
them, each image has a .txt file with its caption. The lesson makes such a folder from bundled images, writes the
img_txt.csv that the training reads, trains, and converts the LoRA to kohya's format, which A1111 and ComfyUI read. It
then shows what is in the file, and that both files draw the same images.

It prints each command that it runs. The results are in output/examples/kohya_to_a1111: kohya/ (the folder), lora/,
emoji_line_art.safetensors (for A1111 and ComfyUI) and kohya_to_a1111.png. The same command resumes an interrupted
lesson. examples/kohya_to_a1111.md explains what one sees.
"""

from __future__ import annotations

import csv
import os
import shutil
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

import numpy as np  # noqa: E402

from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.inputs import read_text  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.settings.declare import MAX_COUNT, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import call, from_root  # noqa: E402
from tools.grid import draw_grid, evenly  # noqa: E402

STYLE = ROOT / "datasets/emoji_fluent_hc"
KOHYA_FOLDER = "10_emoji line art"
IMAGES = 120  # of the style, in the folder that the lesson makes
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SUFFIXES = (".txt", ".caption")  # the first one that exists
MAX_CAPTION_BYTES = 1 << 20
# The base model knows these concepts, and their line art is not among the images that the LoRA is trained on.
PROMPTS = ["a koala", "a rocket", "a tulip", "a fox", "a teapot", "sunglasses"]


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/kohya_to_a1111", "folder of the results", path=True)
    kohya_path: Optional[Path] = setting(
        None, "a folder in kohya's layout, in which img_txt.csv is written; None: make one", path=True
    )
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_nano.yaml", "the recipe, a YAML of configs/train", path=True
    )
    name: str = setting("emoji_line_art", "the name of the file for A1111, which a prompt there mentions")
    steps: Optional[int] = setting(None, "steps of training; None: the recipe's", low=1, high=MAX_COUNT)
    prompts: list[str] = setting(PROMPTS, "what to draw with both files", length=(1, 100))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    base, recipe = (from_root(path) for path in (settings.base_model, settings.train_config))
    output = Path(from_root(settings.output_path))
    kohya = output / "kohya" if settings.kohya_path is None else Path(from_root(settings.kohya_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    with claim_folder(output, "--output_path"):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        if settings.kohya_path is None:
            make_kohya_folder(kohya)
        write_csv(kohya)

        steps = () if settings.steps is None else ("--max_steps", str(settings.steps))
        call(
            "train_text_to_image.py", "--train_config", recipe, "--data_path", str(kohya),
            "--pretrained_model_path", base, "--output_path", str(output / "lora"), "--resume", "True", *steps,
        )  # fmt: skip
        own = output / "lora" / "ckpt" / "lora.ckpt"
        full, half = (output / f"{settings.name}{end}.safetensors" for end in ("_fp32", ""))
        for target, dtype in ((full, "fp32"), (half, "fp16")):
            target.unlink(missing_ok=True)  # of an earlier run: the tool overwrites no file
            call(
                "tools/lora/convert_lora.py", "--source", str(own), "--target", str(target), "--to", "kohya",
                "--dtype", dtype,
            )  # fmt: skip
        show_file(half)
        compare_files(base, own, {"kohya, fp32": full, "kohya, fp16": half}, settings.prompts, output)


def make_kohya_folder(kohya: Path) -> None:
    """Copy bundled images into kohya's layout, each with its caption in a .txt file of the same name."""
    rows = read_image_text_csv(STYLE).rows
    folder = kohya / KOHYA_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for i in evenly(len(rows), IMAGES):
        shutil.copy(rows[i].path, folder)
        (folder / rows[i].path.name).with_suffix(".txt").write_text(rows[i].caption + "\n", encoding="utf-8")


def write_csv(kohya: Path) -> None:
    """Write kohya/img_txt.csv: a row for each image and repeat. Raises UserError if there is no image."""
    lines = []
    for folder in sorted(path for path in kohya.iterdir() if path.is_dir()):
        repeats, _, class_tokens = folder.name.partition("_")
        if not repeats.isdecimal():
            print(f"{folder}: left out, because its name does not begin with a number of repeats")
            continue
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        for image in images:
            caption = read_caption(image, class_tokens)
            lines += [(f"{folder.name}/{image.name}", caption)] * int(repeats)
        print(f"{folder}: {len(images)} images x {repeats} repeats = {len(images) * int(repeats)} rows an epoch")
    if not lines:
        raise UserError(f"{kohya} holds no image in a folder such as {KOHYA_FOLDER!r}: see examples/kohya_to_a1111.md")
    with atomic_path(kohya / "img_txt.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("dir", "text"), *lines])


def read_caption(image: Path, class_tokens: str) -> str:
    """Return the first line of the caption file beside an image, or the class tokens if there is none."""
    for suffix in CAPTION_SUFFIXES:
        path = image.with_suffix(suffix)
        if path.is_file():
            text = read_text(path, "the caption", "save it as UTF-8", MAX_CAPTION_BYTES)
            return text.strip().partition("\n")[0].strip()
    return class_tokens


def show_file(path: Path) -> None:
    """Print the metadata of a kohya file and the arrays of its first layer."""
    from ldm.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    print(f"\n{path}: {path.stat().st_size / 1e6:.1f} MB, {len(checkpoint)} arrays. Its metadata:")
    for key, value in sorted(checkpoint.metadata.items()):
        print(f"  {key}: {value}")
    print("The arrays of its first layer:")
    layer = min(checkpoint).partition(".")[0]
    for key in sorted(key for key in checkpoint if key.startswith(layer + ".")):
        print(f"  {key}  {checkpoint.shape(key)}")


def compare_files(base: str, own: Path, others: dict[str, Path], prompts: list[str], output: Path) -> None:
    """Draw the prompts with each file, write them side by side, and print how far they are from those of `own`."""
    from ldm.generation.pipeline import Pipeline

    print("\nFrom Python, one pipeline draws with all files:", flush=True)
    pipe = Pipeline.from_checkpoint(base)
    drawn, columns = {}, {}
    for name, loras in {"base model": [], "own file": [own], **{name: [path] for name, path in others.items()}}.items():
        pipe.set_loras(loras)
        drawn[name] = pipe(prompts, seed=1).images
        columns[name] = [output / "images" / f"{name}-{i}.png" for i in range(len(prompts))]
        columns[name][0].parent.mkdir(exist_ok=True)
        for image, file in zip(drawn[name], columns[name]):
            image.save(file)
    draw_grid(prompts, columns, output / "kohya_to_a1111.png", text_width=140, colours=256)
    print(output / "kohya_to_a1111.png")
    for name, path in others.items():
        difference = abs(np.stack(drawn[name]).astype(int) - np.stack(drawn["own file"])).max()
        print(f"{path}: largest difference to the images of {own}: {difference} of 255")


if __name__ == "__main__":
    run_script(main)
