"""What several lessons in examples/ do: check prompts, train, write images and compare them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path, remove_path, removed_at_end
from tools.commands import call

# The base model knows these concepts, and their images in the styles of datasets/ are not among those that the LoRAs
# are trained on.
PROMPTS = ["a koala", "a rocket", "a tulip", "a fox", "a teapot", "sunglasses"]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise UserError for an empty prompt or one of several lines: a file of prompts has one on each line."""
    for number, prompt in enumerate(prompts, 1):
        if prompt.splitlines() != [prompt]:
            raise UserError(
                f"--prompts, number {number} ('{plain(prompt)}'): a prompt is one line of text that is not empty: "
                "remove its line breaks, or leave it out"
            )


def write_prompts(prompts: Sequence[str], path: Path) -> None:
    """Write a file with one prompt a line, as `--data_path` of text_to_image.py reads it."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def train(recipe: str, data: str, base: str, folder: Path, *more: str) -> Path:
    """Run a training and return the folder of its checkpoints.

    The same command again resumes. After the last step it has nothing to do.

    Args:
        recipe: The YAML of the training.
        data: The folder with images and img_txt.csv.
        base: The checkpoint of the base model.
        folder: The folder of the results.
        *more: Further flags of train_text_to_image.py.

    Raises:
        UserError: The training failed. It has printed why.
    """
    call(
        "train_text_to_image.py", "--train_config", recipe, "--data_path", data, "--pretrained_model_path", base,
        "--output_path", str(folder), "--resume", "True", *more,
    )  # fmt: skip
    return folder / "ckpt"


def train_lora(recipe: str, data: str, base: str, folder: Path, *more: str) -> Path:
    """Train a LoRA by `train`, and return its file."""
    return train(recipe, data, base, folder, *more) / "lora.ckpt"


def save_images(images: Sequence[Image.Image], files: Sequence[Path]) -> None:
    """Write images to PNG files, one each. Missing folders are created, and files of an earlier run replaced."""
    for image, file in zip(images, files):
        with atomic_path(file, sync=False) as temporary:
            image.save(temporary)


def read_pixels(files: Sequence[Path], size: int | None = None) -> np.ndarray:
    """Read images as (N, H, W, 3) uint8, scaled to size x size pixels. None reads images that have one size already."""
    images = []
    for file in files:
        image = Image.open(file).convert("RGB")
        images.append(np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(images)


def same_pixels(files: Sequence[Path], others: Sequence[Path]) -> bool:
    """Return whether two lists hold equally many images, at least one, that are equal in mode, size and every pixel.

    The texts in the files are not compared. A missing file is equal to none.
    """
    return len(files) == len(others) > 0 and all(map(_same_image, files, others))


def _same_image(file: Path, other: Path) -> bool:
    if not (file.is_file() and other.is_file()):
        return False
    with Image.open(file) as a, Image.open(other) as b:
        return (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in the folder `new` beside `path`, and move its file to `path` at the end.

    For tools that overwrite no file. If the block fails or is interrupted, the file of an earlier run stays.
    """
    with removed_at_end(path.parent / "new") as folder:
        remove_path(folder)  # left by a run that was killed
        folder.mkdir(parents=True)
        yield folder / path.name
        os.replace(folder / path.name, path)
