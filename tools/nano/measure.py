r"""Measure the nano model, alone or with a LoRA.

    python -m tools.nano.measure --output_path output/nano/measure
    python -m tools.nano.measure --output_path output/nano/measure_lora \
        --lora_ckpt_path output/demo/lora/ckpt/lora.ckpt --lora_scale 0.8

Without a LoRA, it measures the autoencoder's PSNR on Noto's held-out images, and for 200 captions, how often the real
image is among the 5 nearest training images to the generated one, by pixels (16x16 RGB, L2) and by the nano CLIP's
image tower. It writes a grid of 64 samples. With a LoRA for emoji_fluent_hc, it measures on the held-out concepts the
mean chroma (max - min of RGB, 0 to 1) of base model and LoRA, and how often the concept's real line art is nearer to
the generated image than another one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ldm.runtime.script import describe_progress, run_script, start_script

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.data.draws import draws  # noqa: E402
from ldm.diffusion.sampling import Sampling  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.generation.pipeline import Pipeline  # noqa: E402
from ldm.metrics.networks import NANO, nano_clip  # noqa: E402
from ldm.metrics.report import write_json  # noqa: E402
from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.settings.declare import MAX_SEED, REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.grid import evenly  # noqa: E402
from tools.nano.images import DATASETS, read_images  # noqa: E402
from tools.nano.train_vae import CONFIG, report  # noqa: E402


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """Reduce uint8 pixels (N, 64, 64, 3) to (N, 768): 16x16 RGB, each the mean of 4x4 pixels."""
    return pixels.reshape(-1, 16, 4, 16, 4, 3).astype(np.float64).mean(axis=(2, 4)).reshape(len(pixels), -1)


def own_among_nearest(made: np.ndarray, real: np.ndarray, own: np.ndarray, nearest: int = 5) -> float:
    """Return the share of rows of `made` (N, D) whose own row of `real` (M, D) is among the `nearest` nearest.

    own: (N,), the index of each row's own row of `real`.
    """
    distances = ((made[:, None] - real[None]) ** 2).sum(axis=2)
    own_distances = distances[np.arange(len(made)), own]
    return float(((distances < own_distances[:, None]).sum(axis=1) < nearest).mean())


def mean_chroma(pixels: np.ndarray) -> float:
    """Return the mean of max(R, G, B) - min(R, G, B) of uint8 pixels (N, H, W, 3), from 0 to 1."""
    return float((pixels.max(axis=3).astype(np.float64) - pixels.min(axis=3)).mean() / 255.0)


def nearer_than_another(made: np.ndarray, real: np.ndarray) -> float:
    """Return how often real[i] is nearer to made[i] than another real is, over all pairs of unit vectors (N, D)."""
    cosines = made @ real.T
    return float((np.diag(cosines)[:, None] > cosines).sum() / (len(made) * (len(made) - 1)))


def grid(pixels: np.ndarray, columns: int, captions: list[str]) -> Image.Image:
    """Arrange images in rows, at twice their size and with their captions below them."""
    size, line = 2 * pixels.shape[1], 14
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(pixels):
        x, y = i % columns * (size + 4), i // columns * (size + line + 4)
        sheet.paste(Image.fromarray(image).resize((size, size), Image.LANCZOS), (x, y))
        draw.text((x + 2, y + size + 1), captions[i][: size // 6], fill="black")
    return sheet


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(REQUIRED, "folder of the grid and measure.json", path=True)
    models: Path = setting(NANO, "folder of nano.safetensors and clip.safetensors", path=True)
    lora_ckpt_path: Optional[Path] = setting(None, "a LoRA for emoji_fluent_hc", path=True)
    lora_scale: float = setting(1.0, "its strength")
    captions: Optional[int] = setting(None, "number of captions; None: 200, or all held-out ones with a LoRA", low=2)
    scale: float = setting(4.0, "guidance", low=1)
    seed: int = setting(1, "seed of the starting latents", low=0, high=MAX_SEED)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    grid_path, json_path = (args.output_path / name for name in ("grid.png", "measure.json"))
    with claim_file(grid_path, "--output_path"), claim_file(json_path, "--output_path"):
        measure(args)


def measure(args: Settings) -> None:
    """Generate images, measure them, and write the grid and the numbers."""
    describe_progress(lambda: "before there was a result")
    setup_runtime("CPU")
    pipeline = Pipeline.from_checkpoint(args.models / "nano.safetensors", config=CONFIG)
    clip = nano_clip(args.models)
    sampling = Sampling(num_inference_steps=20, guidance_scale=args.scale, batch_size=20)

    def images_of(prompts: list[str]) -> np.ndarray:
        return np.concatenate([batch.images for batch in pipeline.generate(prompts, sampling, args.seed)])

    result: dict[str, Any] = {"guidance": args.scale, "steps": 20, "seed": args.seed}
    if args.lora_ckpt_path is None:
        vae_report = report(pipeline.model.first_stage_model)
        print(vae_report)
        result["autoencoder"] = vae_report
        rows = read_image_text_csv(DATASETS / "emoji_noto").rows
        real = np.stack([np.asarray(Image.open(row.path).convert("RGB")) for row in rows])
        count = min(args.captions or 200, len(rows))
        chosen = np.sort(draws(args.seed, "captions", 0).choice(len(rows), count, replace=False))
        captions = [rows[i].caption for i in chosen]
        made = images_of(captions)
        result["captions"] = len(chosen)
        result["top5_pixels"] = own_among_nearest(thumbnails(made), thumbnails(real), chosen)
        result["top5_image_tower"] = own_among_nearest(clip.encode_pixels(made), clip.encode_pixels(real), chosen)
        sheet = grid(made[:64], 8, captions[:64])
    else:
        held_out = read_images("emoji_fluent_hc", "test")
        held_out = [held_out[i] for i in evenly(len(held_out), args.captions or len(held_out))]
        captions, real = [image.caption for image in held_out], np.stack([image.pixels for image in held_out])
        base = images_of(captions)
        pipeline.load_lora(args.lora_ckpt_path, args.lora_scale)
        made = images_of(captions)
        result["prompts"], result["lora_scale"] = len(captions), args.lora_scale
        result["chroma_base"], result["chroma_lora"] = mean_chroma(base), mean_chroma(made)
        result["chroma_share"] = result["chroma_lora"] / result["chroma_base"]
        features = clip.encode_pixels(real)
        result["nearer_base"] = nearer_than_another(clip.encode_pixels(base), features)
        result["nearer_lora"] = nearer_than_another(clip.encode_pixels(made), features)
        shown = evenly(len(captions), 24)
        triples = np.stack([base[shown], made[shown], real[shown]], axis=1).reshape(-1, 64, 64, 3)
        sheet = grid(triples, 12, [text for i in shown for text in (captions[i], "with LoRA", "real")])
    print(json.dumps({name: value for name, value in result.items() if name != "autoencoder"}, indent=2))
    with atomic_path(args.output_path / "grid.png") as path:
        sheet.save(path)
    write_json(args.output_path / "measure.json", result)


if __name__ == "__main__":
    run_script(main)
