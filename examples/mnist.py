"""Lesson 2, digits: a model in pixel space, trained from random weights, and a LoRA that swaps black and white.

    python examples/mnist.py
    python examples/mnist.py --channels 3    # the same with RGB images

It prints each command that it runs. The results are in output/examples/mnist: mnist.png (digits by both),
grey/base/ckpt/model.ckpt (the base model), grey/lora/ckpt/lora.ckpt (the LoRA) and all images one by one. With three
channels, all of that is in output/examples/mnist/rgb. The lesson ends with a table: how many digits a classifier names
right, and how bright the background is. The same command resumes an interrupted lesson. examples/mnist.md explains what
one sees.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
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
from PIL import Image, ImageOps  # noqa: E402

from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.settings.declare import MAX_COUNT, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import call, from_root  # noqa: E402
from tools.lessons import same_pixels, train  # noqa: E402

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODELS = {1: ("grey", "configs/mnist.yaml"), 3: ("rgb", "configs/mnist_rgb.yaml")}
TEXT_ENCODER = "models/nano/nano.safetensors"  # the model whose text encoder is used
BASE_RECIPE, LORA_RECIPE = (f"configs/train/train_config_{way}_mnist.yaml" for way in ("vanilla", "lora"))
GUIDANCE = "3"
BATCH = 10  # images in a call of the UNet, the same in all runs, so that equal images are equal bit for bit
FRAME = 2  # pixels; the digits of the data set leave at least as many on each side
ROWS = 3  # images of each digit in mnist.png


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/mnist", "folder of the results", path=True)
    channels: int = setting(1, "channels of the images: 1 for grey, 3 for RGB", choices=(1, 3))
    base_steps: Optional[int] = setting(None, "steps of the base model; None: the recipe's", low=1, high=MAX_COUNT)
    lora_steps: Optional[int] = setting(None, "steps of the LoRA; None: the recipe's", low=1, high=MAX_COUNT)
    classifier_steps: int = setting(1000, "steps of the classifier", low=1, high=MAX_COUNT)
    images: int = setting(20, "images of each digit", low=1, high=1000)
    data_path: Path = setting(ROOT / "datasets/mnist", "folder with the digits in train and test", path=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    data, output = Path(from_root(settings.data_path)), Path(from_root(settings.output_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    digits_of(data / "train"), digits_of(data / "test")  # raises UserError before the training
    with claim_folder(output, "--output_path"):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        begin = time.time()
        name, config = MODELS[settings.channels]
        folder = output / name
        flags = ("--model_config", config, *length(settings.base_steps))
        base = train(BASE_RECIPE, str(data / "train"), TEXT_ENCODER, folder / "base", *flags) / "model.ckpt"
        inverted = invert(data / "train", output / "inverted")
        flags = ("--model_config", config, *length(settings.lora_steps))
        lora = train(LORA_RECIPE, str(inverted), str(base), folder / "lora", *flags) / "lora.ckpt"
        before, after, without = draw(base, lora, settings.images, folder)
        equal = same_pixels(without, before[: len(without)])
        print(f"\nstrength 0 gives the images of the base model, bit for bit: {equal}")
        sheet = (output if settings.channels == 1 else folder) / "mnist.png"
        draw_sheet(before, after, sheet)
        shown = min(ROWS, settings.images)
        print(f"{sheet}: {shown} images of each digit by the base model, below them {shown} with the LoRA")
        print(f"\n{judge(before, after, data, output / 'classifier', settings.classifier_steps)}")
        print(f"\n{(time.time() - begin) / 60:.1f} minutes")


def length(steps: int | None) -> tuple[str, ...]:
    """Return the flags for a training of `steps` steps, none for those of its recipe."""
    return () if steps is None else ("--max_steps", str(steps))


def digits_of(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Return the images of a data set and their digits (N,). Raises UserError if a caption does not end in a digit."""
    rows = read_image_text_csv(folder).rows
    words = [(row.caption.split() or [""])[-1] for row in rows]
    for row, word in zip(rows, words):
        if word not in DIGITS:
            raise UserError(f"the caption of {plain(row.path)} does not end in one of {' '.join(DIGITS)}: correct it")
    return [row.path for row in rows], np.array([DIGITS.index(word) for word in words])


def invert(data: Path, folder: Path) -> Path:
    """Write a data set to `folder` with the images of `data` inverted and the same captions, unless it is complete."""
    if not (folder / "img_txt.csv").exists():
        print(f"\nwriting {folder}: the images of {data}, black on white", flush=True)
        for row in read_image_text_csv(data).rows:
            with atomic_path(folder / row.path.relative_to(data), sync=False) as temporary:
                ImageOps.invert(Image.open(row.path).convert("L")).save(temporary, "PNG")
        with atomic_path(folder / "img_txt.csv") as temporary:
            shutil.copyfile(data / "img_txt.csv", temporary)
    return folder


def draw(base: Path, lora: Path, count: int, folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Draw `count` images of each digit with the base model and with the LoRA, and one of each with strength 0.

    Image i shows the digit i % 10. Returns the files of the three runs.
    """
    captions = [f"the digit {digit}\n" for digit in DIGITS]
    for name, lines in (("prompts.txt", captions * count), ("one_of_each.txt", captions)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    apply = ("--lora_ckpt_path", str(lora))
    runs = {
        "before": ("prompts.txt",), "after": ("prompts.txt", *apply),
        "strength_0": ("one_of_each.txt", *apply, "--lora_scale", "0"),
    }  # fmt: skip
    for name, (prompts, *more) in runs.items():
        call(
            "text_to_image.py", "--ckpt_path", str(base), "--data_path", str(folder / prompts), "--scale", GUIDANCE,
            "--batch_size", str(BATCH), "--seed", "1", "--output_path", str(folder / name), *more,
        )  # fmt: skip
    before, after, without = (sorted((folder / name / "samples").glob("*.png")) for name in runs)
    return before, after, without


def draw_sheet(before: Sequence[Path], after: Sequence[Path], path: Path) -> None:
    """Write an image with a column for each digit: in the upper rows the base model, in the lower ones the LoRA."""
    count = len(DIGITS) * ROWS
    images = [Image.open(file).convert("L").resize((64, 64)) for files in (before, after) for file in files[:count]]
    gap, columns = 4, len(DIGITS)
    rows = len(images) // columns
    sheet = Image.new("L", (columns * (64 + gap) + gap, rows * (64 + gap) + gap), 128)
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * (64 + gap), gap + i // columns * (64 + gap)))
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def judge(before: Sequence[Path], after: Sequence[Path], data: Path, folder: Path, steps: int) -> str:
    """Return a table: the share of the digits that a classifier names right, and the brightness of the background.

    The background is the frame of FRAME pixels around each image, from 0 (black) to 1 (white).
    """
    # Imported late: the scripts run in other processes, and this one needs MindSpore for the classifier only.
    from ldm.runtime.device import setup_runtime

    setup_runtime()
    from tools.nano.digit_classifier import load_digits, named_right, train_classifier

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        paths, digits = digits_of(data / name)
        return load_digits(paths), digits

    print("\nthe judge: a classifier, trained on the real digits of the training split, as they are and inverted")
    classifier = train_classifier(*split("train"), folder, steps)
    real, digits = split("test")
    drawn = np.arange(len(before)) % len(DIGITS)
    lines = [f"{'':40}{'images':>8}{'named right':>14}{'background':>13}"]
    for title, images, truth in (
        ("the base model", load_digits(before), drawn),
        ("with the LoRA", load_digits(after), drawn),
        ("real digits, not used in training", real, digits),
        ("the same inverted", -real, digits),
    ):
        right = named_right(classifier, images, truth).mean()
        lines.append(f"{title:40}{len(images):8}{100 * right:12.1f} %{background(images):13.3f}")
    return "\n".join(lines)


def background(images: np.ndarray) -> float:
    """Return the mean brightness, 0 to 1, of the frames of FRAME pixels around images (N, 1, H, W) in [-1, 1]."""
    inner = np.zeros(images.shape[-2:], bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    return float((images[..., ~inner].mean() + 1) / 2)


if __name__ == "__main__":
    run_script(main)
