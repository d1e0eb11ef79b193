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

from ldm.data.dataset import IMAGE_SUFFIXES, read_image_text_csv  # noqa: E402
from ldm.data.sources.image_text_csv import CSV_NAME  # noqa: E402
from ldm.data.sources.rows import MAX_ROWS  # noqa: E402
from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.inputs import read_text  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.settings.declare import MAX_COUNT, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import call, from_root  # noqa: E402
from tools.grid import draw_grid, evenly  # noqa: E402
from tools.lessons import PROMPTS, check_prompts, replaced, save_images, train_lora  # noqa: E402

STYLE = ROOT / "datasets/emoji_line_art/train"
KOHYA_FOLDER = "10_emoji line art"
IMAGES = 120  # of the style, in the folder that the lesson makes
CAPTION_SUFFIXES = (".txt", ".caption")  # the first one that exists
MAX_CAPTION_BYTES = 1 << 20
MAX_REPEATS = 10_000


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/kohya_to_a1111", "folder of the results", path=True)
    kohya_path: Optional[Path] = setting(
        None, "a folder in kohya's layout, in which img_txt.csv is written; None: make one", path=True
    )
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_text_nano.yaml", "the recipe, a YAML of configs/train", path=True
    )
    name: str = setting("emoji_line_art", "the name of the file for A1111, which a prompt there mentions")
    steps: Optional[int] = setting(None, "steps of training; None: the recipe's", low=1, high=MAX_COUNT)
    prompts: list[str] = setting(PROMPTS, "what to draw with both files", length=(1, 100))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    check_prompts(settings.prompts)
    check_name(settings.name)
    base, recipe = (from_root(path) for path in (settings.base_model, settings.train_config))
    output = Path(from_root(settings.output_path))
    kohya = output / "kohya" if settings.kohya_path is None else Path(from_root(settings.kohya_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    full, half = (output / f"{settings.name}{end}.safetensors" for end in ("_fp32", ""))
    with (
        claim_folder(output, "--output_path"),
        claim_file(kohya / CSV_NAME, "--kohya_path"),
        claim_file(full, "--name"),
        claim_file(half, "--name"),
    ):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        if settings.kohya_path is None:
            make_kohya_folder(kohya)
        write_csv(kohya)

        steps = () if settings.steps is None else ("--max_steps", str(settings.steps))
        own = train_lora(recipe, str(kohya), base, output / "lora", *steps)
        for target, dtype in ((full, "fp32"), (half, "fp16")):
            with replaced(target) as new:
                call(
                    "tools/lora/convert_lora.py", "--source", str(own), "--target", str(new), "--to", "kohya",
                    "--dtype", dtype,
                )  # fmt: skip
        show_file(half)
        compare_files(base, own, {"kohya, fp32": full, "kohya, fp16": half}, settings.prompts, output)


def check_name(name: str) -> None:
    """Raise UserError for a name that would lead out of the output folder."""
    if not name or Path(name).name != name:
        raise UserError(f"--name {plain(name)!r} is not the name of a file: give one without folders")


def make_kohya_folder(kohya: Path) -> None:
    """Copy bundled images into kohya's layout, each with its caption in a .txt file of the same name."""
    rows = read_image_text_csv(STYLE).rows
    folder = kohya / KOHYA_FOLDER
    for i in evenly(len(rows), IMAGES):
        image = folder / rows[i].path.name
        # Not synced to the disk, because each run writes them again.
        with atomic_path(image, sync=False) as path:
            path.write_bytes(rows[i].path.read_bytes())
        with atomic_path(image.with_suffix(".txt"), sync=False) as path:
            path.write_text(rows[i].caption + "\n", encoding="utf-8")


def write_csv(kohya: Path) -> None:
    """Write kohya/img_txt.csv: a row for each image and repeat.

    Raises:
        UserError: There is no image, a folder has more than MAX_REPEATS repeats, or all have more than MAX_ROWS rows.
    """
    lines: list[tuple[str, str]] = []
    for folder in sorted(path for path in kohya.iterdir() if path.is_dir()):
        number, _, class_tokens = folder.name.partition("_")
        repeats = int(number) if number.isdecimal() else 0
        if not repeats:
            print(f"{plain(folder)}: left out, because its name does not begin with a number of repeats from 1 on")
            continue
        if repeats > MAX_REPEATS:
            raise UserError(
                f"{plain(folder)}: {repeats:,} repeats, at most {MAX_REPEATS:,} are read: rename the folder"
            )
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        rows = len(images) * repeats
        if len(lines) + rows > MAX_ROWS:
            raise UserError(
                f"{plain(kohya)}: more than {MAX_ROWS:,} rows, with {len(images):,} images x {repeats:,} repeats in "
                f"{plain(folder.name)}: lower the repeats in the names of the folders"
            )
        for image in images:
            caption = read_caption(image, class_tokens)
            lines += [(f"{folder.name}/{image.name}", caption)] * repeats
        print(f"{plain(folder)}: {len(images)} images x {repeats} repeats = {rows} rows an epoch")
    if not lines:
        raise UserError(
            f"{plain(kohya)} holds no image in a folder such as {KOHYA_FOLDER!r}: see examples/kohya_to_a1111.md"
        )
    with atomic_path(kohya / CSV_NAME) as path, open(path, "w", newline="", encoding="utf-8") as file:
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
    from ldm.runtime.device import setup_runtime

    print("\nFrom Python, one pipeline draws with all files:", flush=True)
    setup_runtime()  # fp32 on the CPU, so that only the rounding of the files is seen
    pipe = Pipeline.from_checkpoint(base)
    drawn, columns = {}, {}
    for name, loras in {"base model": [], "own file": [own], **{name: [path] for name, path in others.items()}}.items():
        pipe.set_loras(loras)
        drawn[name] = pipe(prompts, seed=1).images
        columns[name] = [output / "images" / f"{name}-{i}.png" for i in range(len(prompts))]
        save_images(drawn[name], columns[name])
    draw_grid(prompts, columns, output / "kohya_to_a1111.png", text_width=140, colours=256)
    print(output / "kohya_to_a1111.png")
    for name, path in others.items():
        difference = abs(np.stack(drawn[name]).astype(int) - np.stack(drawn["own file"])).max()
        print(f"{path}: largest difference to the images of {own}: {difference} of 255")


if __name__ == "__main__":
    run_script(main)
