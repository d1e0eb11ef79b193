"""Lesson 5, a new word or a LoRA: the same three images, learned as a token and as a LoRA, measured and side by side.

    python examples/textual_inversion.py
    python examples/textual_inversion.py --seeds 42 1 2     # three trainings of each; takes three times as long

It prints each command that it runs. The results are in output/examples/textual_inversion: the tokens, the LoRAs,
textual_inversion.png (the images of each), textual_inversion_table.md (the table that it prints) and all images one by
one. The same command resumes an interrupted lesson. examples/textual_inversion.md explains what one sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.settings.declare import MAX_COUNT, MAX_SEED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.commands import from_root  # noqa: E402
from tools.grid import draw_grid  # noqa: E402
from tools.lessons import PROMPTS, check_prompts, read_pixels, save_images, train  # noqa: E402

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline

TOKEN = "<green-face>"  # of the recipe
CAPTION = "a nauseated face"  # of the LoRA. The text encoder knows the words, the UNet has drawn no such face
HEADER = ("learned as", "file", "nearness to the unseen image", "change of the other prompts")
CLIP_SIZE = 64  # pixels; the nano CLIP scales images to this square


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(ROOT / "output/examples/textual_inversion", "folder of the results", path=True)
    steps: int = setting(150, "steps of each training", low=1, high=MAX_COUNT)
    seeds: list[int] = setting([42], "seeds of the trainings, one of each kind for each", low=0, high=MAX_SEED)
    samples: int = setting(16, "images of the new face that are measured", low=1, high=1000)
    prompts: list[str] = setting(
        ["a face", *PROMPTS[:3]], "other prompts, which the training should not change", length=(1, 100)
    )
    data_path: Path = setting(ROOT / "datasets/green_face", "folder with the images, to train on", path=True)
    unseen: Path = setting(
        ROOT / "datasets/emoji_noto/train/1f922.png",
        "an image of the same thing that nothing was trained on",
        path=True,
    )
    base_model: Path = setting(ROOT / "models/nano/nano.safetensors", "the base model", path=True)
    token_config: Path = setting(
        ROOT / "configs/train/train_config_ti_nano.yaml", "the recipe of the token, a YAML of configs/train", path=True
    )
    train_config: Path = setting(
        ROOT / "configs/train/train_config_lora_nano.yaml", "the recipe of the LoRA", path=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the lesson."""
    settings = read_settings(Settings, argv, description=__doc__)
    check_prompts(settings.prompts)
    data, base, unseen, of_token, of_lora = (
        from_root(path)
        for path in (
            settings.data_path, settings.base_model, settings.unseen, settings.token_config, settings.train_config,
        )
    )  # fmt: skip
    output = Path(from_root(settings.output_path))
    os.chdir(ROOT)  # so that all paths are those of the printed commands
    with claim_folder(output, "--output_path"):
        describe_progress(lambda: f"before the end; the same command resumes from what is in {output}")
        tokens, loras = {}, {}
        for seed in settings.seeds:
            # The images, the steps and the batch size are the same.
            same = ("--max_steps", str(settings.steps), "--seed", str(seed))
            tokens[seed] = train(of_token, data, base, output / f"token-{seed}", *same) / "ti.safetensors"
            loras[seed] = train(
                of_lora, data, base, output / f"lora-{seed}", *same, "--lora_rank", "4", "--train_batch_size", "6",
                "--num_repeats", "16", "--random_flip", "True", "--instance_prompt", CAPTION,
            ) / "lora.ckpt"  # fmt: skip
        compare(base, tokens, loras, Path(unseen), settings, output)


def compare(
    base: str, tokens: dict[int, Path], loras: dict[int, Path], unseen: Path, settings: Settings, output: Path
) -> None:
    """Draw and measure the images of each token and LoRA, write the grid, and print the table."""
    from ldm.generation.pipeline import Pipeline
    from ldm.metrics.networks import nano_clip

    print("\nFrom Python, one pipeline draws all images:", flush=True)
    pipe = Pipeline.from_checkpoint(base)
    clip = nano_clip()
    wanted = clip.encode_pixels(read_pixels([unseen], CLIP_SIZE))[0]

    def nearness(files: Sequence[Path]) -> float:
        return float((clip.encode_pixels(read_pixels(files, CLIP_SIZE)) @ wanted).mean())

    def draw(face: str, name: str) -> tuple[list[Path], list[Path]]:
        """Return the images of the face and those of the other prompts."""
        faces = draw_images(pipe, [face] * settings.samples, output / name / "face")
        return faces, draw_images(pipe, settings.prompts, output / name / "others")

    faces, others = draw(CAPTION, "base")
    rows = {"base model": (faces, others)}
    table = [HEADER, (f'nothing: "{CAPTION}"', "", f"{nearness(faces):.3f}", "0.0")]
    for kind, files in (("token", tokens), ("LoRA", loras)):
        for seed, path in files.items():
            if kind == "token":
                pipe.load_embedding(path)
            else:
                pipe.set_loras([path])
            faces, changed = draw(f"a {TOKEN}" if kind == "token" else CAPTION, f"{kind}-{seed}")
            if kind == "token":
                pipe.unload_embedding()
            else:
                pipe.unload_lora()
            name = f"{kind}, seed {seed}" if len(files) > 1 else kind
            rows[name] = (faces, changed)
            change = np.abs(read_pixels(changed).astype(float) - read_pixels(others)).mean()
            table.append((name, f"{path.stat().st_size / 1e3:.1f} KB", f"{nearness(faces):.3f}", f"{change:.1f}"))

    columns = {name: [*faces[:2], *others] for name, (faces, others) in rows.items()}
    names = ["the new face", "the new face, once more", *settings.prompts]
    draw_grid(names[2 - len(faces[:2]) :], columns, output / "textual_inversion.png", text_width=160, colours=256)
    lines = [f"| {' | '.join(line)} |" for line in table]
    lines.insert(1, "| --- " * len(HEADER) + "|")
    with atomic_path(output / "textual_inversion_table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{output / 'textual_inversion.png'}\n\n" + "\n".join(lines))


def draw_images(pipe: Pipeline, prompts: Sequence[str], folder: Path) -> list[Path]:
    """Draw the prompts and return the files."""
    files = [folder / f"{i:02}.png" for i in range(len(prompts))]
    save_images(pipe(prompts, seed=1).images, files)
    return files


if __name__ == "__main__":
    run_script(main)
