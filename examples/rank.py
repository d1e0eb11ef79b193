"""Lesson 3, what the rank does: the same images, seed and steps at several ranks, measured and side by side.

    python examples/rank.py
    python examples/rank.py --targets attention all     # also on the attention layers alone; takes twice as long

It prints each command that it runs. The results are in output/examples/rank: a LoRA for each rank, rank.png (the images
of each), rank_table.md (the table that it prints) and all images one by one. The same command resumes an interrupted
lesson. examples/rank.md explains what one sees.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.data.dataset import Row, read_image_text_csv  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.settings.declare import MAX_COUNT, MAX_RANK, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import from_root  # noqa: E402
from tools.grid import draw_grid, evenly  # noqa: E402
from tools.lessons import PROMPTS, read_pixels, save_images, train_lora  # noqa: E402

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline

HEADER = ("LoRA", "parameters", "file", "loss at the end", "chroma left", "likeness to the real images")
CLIP_SIZE = 64  # pixels; the nano CLIP scales images to this square


class Images(NamedTuple):
    """The images of one model, in the order of the prompts, and their measures."""

    files: list[Path]
    chroma: float  # mean of max(R, G, B) - min(R, G, B), from 0 to 1
    likeness: float  # mean cosine to the real image of the same prompt, by the nano CLIP's image tower


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/rank", "folder of the results", path=True)
    ranks: list[int] = setting([1, 4, 16, 64], "the ranks", low=1, high=MAX_RANK, length=(1, 10))
    targets: list[str] = setting(
        ["all"], "layers to train, each with all ranks", choices=("attention", "all"), length=(1, 2)
    )
    steps: int = setting(200, "steps of each training", low=1, high=MAX_COUNT)
    data_path: Path = setting(
        ROOT / "datasets/emoji_line_art/train", "folder with images and img_txt.csv, to train on", path=True
    )
    test_path: Path = setting(
        ROOT / "datasets/emoji_line_art/test", "another one: its captions are drawn, its images compared", path=True
    )
    prompts: int = setting(24, "number of captions of the latter that are drawn", low=1)
    shown: list[str] = setting(PROMPTS, "captions of the latter that are drawn first, for the grid", length=(0, 100))
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_nano.yaml", "the recipe, a YAML of configs/train", path=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    data, base, recipe = (from_root(path) for path in (settings.data_path, settings.base_model, settings.train_config))
    test, output = from_root(settings.test_path), Path(from_root(settings.output_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    rows, shown = choose_rows(read_image_text_csv(test).rows, settings.shown, settings.prompts)
    real = read_pixels([row.path for row in rows], CLIP_SIZE)
    with claim_folder(output, "--output_path"):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        folders = {}
        for targets in settings.targets:
            for rank in settings.ranks:
                folders[f"{targets}, rank {rank}"] = folder = output / f"{targets}-{rank}"
                # Everything but the layers and the rank is the same: the images, their order, the noise, the rate.
                train_lora(
                    recipe, data, base, folder, "--max_steps", str(settings.steps), "--lora_rank", str(rank),
                    "--lora_targets", targets,
                )  # fmt: skip
        compare(base, folders, rows, real, max(1, shown), output)


def choose_rows(rows: Sequence[Row], first: Sequence[str], count: int) -> tuple[list[Row], int]:
    """Return at most `count` rows and the number of those whose captions are in `first`.

    These come first. The others are evenly spaced over the rest of the data set.
    """
    shown = [row for row in rows if row.caption in first][:count]
    others = [row for row in rows if row.caption not in first]
    return [*shown, *(others[i] for i in evenly(len(others), count - len(shown)))], len(shown)


def compare(
    base: str, folders: dict[str, Path], rows: Sequence[Row], real: np.ndarray, shown: int, output: Path
) -> None:
    """Draw and measure the images of each LoRA, write the grid of the first `shown` rows, and print the table.

    real: The images of the rows, (N, CLIP_SIZE, CLIP_SIZE, 3) uint8.
    """
    from ldm.generation.pipeline import Pipeline
    from ldm.lora import read_lora
    from ldm.metrics.networks import nano_clip

    print("\nFrom Python, one pipeline draws the images of all LoRAs:", flush=True)
    pipe = Pipeline.from_checkpoint(base)
    clip = nano_clip()
    real_features = clip.encode_pixels(real)

    def draw(loras: list[Path], folder: Path) -> Images:
        files = draw_images(pipe, loras, [row.caption for row in rows], folder)
        drawn = read_pixels(files)
        chroma = float((drawn.max(axis=3).astype(float) - drawn.min(axis=3)).mean() / 255)
        return Images(files, chroma, float((clip.encode_pixels(drawn) * real_features).sum(axis=1).mean()))

    before = draw([], output / "base")
    columns = {"base model": before.files}
    table = [
        HEADER,
        ("none: the base model", "0", "", "", percent(before.chroma, before.chroma), f"{before.likeness:.3f}"),
    ]
    for name, folder in folders.items():
        path = folder / "ckpt" / "lora.ckpt"
        layers = read_lora(path, pipe.config).layers.values()
        images = draw([path], folder / "images")
        columns[name] = images.files
        table.append((
            name, f"{sum(layer.down.size + layer.up.size for layer in layers):,}",
            f"{path.stat().st_size / 1e6:.1f} MB", f"{final_loss(folder):.3f}",
            percent(images.chroma, before.chroma), f"{images.likeness:.3f}",
        ))  # fmt: skip
    columns["the real image"] = [row.path for row in rows]

    columns = {title: files[:shown] for title, files in columns.items()}
    draw_grid([row.caption for row in rows[:shown]], columns, output / "rank.png", text_width=160, colours=256)
    lines = [f"| {' | '.join(line)} |" for line in table]
    lines.insert(1, "| --- " * len(HEADER) + "|")
    with atomic_path(output / "rank_table.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{output / 'rank.png'}: the first of the {len(rows)} prompts\n\n" + "\n".join(lines))


def draw_images(pipe: Pipeline, loras: list[Path], prompts: Sequence[str], folder: Path) -> list[Path]:
    """Draw the prompts with these LoRAs merged, and return the files."""
    pipe.set_loras(loras)
    files = [folder / f"{i:02}.png" for i in range(len(prompts))]
    save_images(pipe(prompts, seed=1).images, files)
    return files


def percent(part: float, whole: float) -> str:
    """Return `part` as a share of `whole`, such as "56 %", or nothing if `whole` is 0."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def final_loss(folder: Path) -> float:
    """Return the mean loss of the last fifth of the steps. Single steps differ more by their noise than by the rank."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return float(np.mean(losses[-max(1, len(losses) // 5) :]))


if __name__ == "__main__":
    run_script(main)
