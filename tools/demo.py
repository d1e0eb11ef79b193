"""Fine-tune the nano model with LoRA on line drawings of emoji, and draw prompts before and after.

    python tools/demo.py

The demo runs the same scripts as a user would and prints each command. It writes output/demo/grid.png, with columns for
the prompt, the base model, the LoRA and the real image, which the LoRA was not trained on. It ends with a table of
scores. Running it again resumes an interrupted demo.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.data.dataset import Row, read_image_text_csv  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import call, from_root  # noqa: E402
from tools.grid import draw_grid, evenly  # noqa: E402

STYLE = ROOT / "datasets" / "emoji_line_art"
BLOCKS = 3  # of the grid, beside each other: all 24 prompts are seen at once


def scores(rows: Sequence[Row], base: Sequence[Path], lora: Sequence[Path]) -> str:
    """Return a table of Fréchet distances to the real images and CLIP scores, by the nano CLIP."""
    # Imported late: the scripts run in other processes, so this one needs MindSpore for the scores only.
    from ldm.runtime.device import setup_runtime

    setup_runtime()
    from ldm.metrics.bootstrap import bootstrap_std
    from ldm.metrics.clip_score import clip_scores
    from ldm.metrics.evaluate import encode_images
    from ldm.metrics.frechet import frechet_of_features
    from ldm.metrics.networks import nano_clip

    clip = nano_clip()
    real, before, after = (
        encode_images(paths, clip, len(rows)).features for paths in ([row.path for row in rows], base, lora)
    )
    texts = clip.encode_texts([row.caption for row in rows])

    def distance(made: np.ndarray, i: np.ndarray) -> float:
        return frechet_of_features(real[i], made[i])

    def score(made: np.ndarray, i: np.ndarray) -> float:
        return float(clip_scores(made[i], texts[i]).mean())

    lines = [f"{'':34}{'base':>17}{'with LoRA':>17}{'difference':>18}{'real images':>17}"]
    everything = np.arange(len(rows))
    for name, measure in (("Fréchet distance to the real ones", distance), ("CLIP score", score)):
        # Every column resamples the same prompts, so the difference is that of pairs.
        columns = (
            partial(measure, before),
            partial(measure, after),
            lambda i, measure=measure: measure(after, i) - measure(before, i),
            partial(measure, real),
        )
        cells = [f"{column(everything):.2f} +- {bootstrap_std(column, len(rows)):.2f}" for column in columns]
        if measure is distance:
            cells[-1] = "0"
        lines.append(f"{name:34}{cells[0]:>17}{cells[1]:>17}{cells[2]:>18}{cells[3]:>17}")
    return "\n".join(lines)


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(Path("output/demo"), "folder of the results", path=True)
    prompts: int = setting(24, "number of prompts, whose drawings the LoRA is not trained on", low=1)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    # The scripts run in the project's folder, so the printed paths are relative to it.
    output = Path(from_root(args.output_path))
    os.chdir(ROOT)
    with (
        claim_folder(output, "--output_path"),
        claim_file(output / "grid.png", "--output_path"),
        claim_file(output / "prompts.txt", "--output_path"),
    ):
        describe_progress(
            lambda: f"before the end; finished parts are saved in {output}: the same command resumes from there"
        )
        demonstrate(output, args.prompts)


def demonstrate(output: Path, prompts: int) -> None:
    """Train a LoRA, draw `prompts` prompts that it is not trained on before and after, and write the grid."""
    begin = time.time()
    rows = read_image_text_csv(STYLE / "test").rows
    rows = [rows[i] for i in evenly(len(rows), prompts)]
    with atomic_path(output / "prompts.txt") as path:
        path.write_text("".join(row.caption + "\n" for row in rows), encoding="utf-8")
    recipe = ("--train_config", "configs/train/train_config_lora_text_nano.yaml", "--resume", "True")
    base = ("--pretrained_model_path", "models/nano/nano.safetensors")
    data = ("--data_path", str((STYLE / "train").relative_to(ROOT)))
    call("train_text_to_image.py", *recipe, *base, *data, "--output_path", str(output / "lora"))
    lora = ("--use_lora", "True", "--lora_ckpt_path", str(output / "lora" / "ckpt" / "lora.ckpt"))
    generate = ("text_to_image.py", "--data_path", str(output / "prompts.txt"), "--batch_size", "12", "--seed", "1")
    call(*generate, "--output_path", str(output / "base"))
    call(*generate, "--output_path", str(output / "with_lora"), *lora)

    images = [sorted((output / name / "samples").glob("*.png")) for name in ("base", "with_lora")]
    columns = {"base": images[0], "with LoRA": images[1], "the real image": [row.path for row in rows]}
    draw_grid([row.caption for row in rows], columns, output / "grid.png", text_width=150, blocks=BLOCKS)
    print(
        f"\n{output / 'grid.png'}: {len(rows)} prompts, before and after, beside the real images "
        f"({(time.time() - begin) / 60:.1f} minutes)"
    )
    if len(rows) > 1:
        print(
            f"\nThe {len(rows)} prompts scored by the nano CLIP, with standard deviations (bootstrap).\n"
            "Compare these scores with each other only. Closer to the real images' is better.\n\n"
            + scores(rows, *images)
        )


if __name__ == "__main__":
    run_script(main)
