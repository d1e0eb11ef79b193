r"""Measure the nano model, alone or with a LoRA.

    python -m tools.nano.measure --output_path output/nano/measure --seeds 1,2,3
    python -m tools.nano.measure --output_path output/nano/measure_lora --seeds 1,2,3 \
        --lora_ckpt_path output/demo/lora/ckpt/lora.ckpt

Without a LoRA, it measures the autoencoder's PSNR on Noto's held-out images, and for 200 captions, how often the real
image is among the 5 nearest training images to the generated one, by pixels (16x16 RGB, L2) and by the nano CLIP's
image tower. With a LoRA, or with `--words`, it compares the base model without and with them on the captions of the
held-out images of `--style`: the mean chroma (max - min of RGB, 0 to 1), how often the concept's real image in that
style is among the 5 nearest of the held-out ones to the generated one, or nearer than another one (nano image tower),
the Fréchet distance to the held-out images and the CLIP score (nano CLIP). It writes a grid of samples and the images
for each seed, and the figures of each seed with their means.
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

from ldm.data.draws import draws  # noqa: E402
from ldm.diffusion.sampling import Sampling  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.generation.pipeline import Pipeline  # noqa: E402
from ldm.metrics.clip_score import clip_scores  # noqa: E402
from ldm.metrics.frechet import frechet_of_features  # noqa: E402
from ldm.metrics.networks import NANO, ClipNetwork, nano_clip  # noqa: E402
from ldm.metrics.report import write_json  # noqa: E402
from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.settings.declare import MAX_SEED, REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.grid import evenly  # noqa: E402
from tools.nano.images import STYLES, read_images  # noqa: E402
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

    output_path: Path = setting(REQUIRED, "folder of the grids, the images and measure.json", path=True)
    models: Path = setting(NANO, "folder of nano.safetensors and clip.safetensors", path=True)
    lora_ckpt_path: Optional[Path] = setting(None, "a LoRA", path=True)
    lora_scale: float = setting(1.0, "its strength")
    lora_start: Optional[float] = setting(None, "share of the steps where it begins; None: as the file says")
    lora_end: Optional[float] = setting(None, "share of the steps where it ends; None: as the file says")
    words: str = setting("", 'behind each caption, beside a LoRA or instead of one, such as ", line drawing, bold"')
    style: str = setting("emoji_fluent_hc", "the style whose held-out images are the real ones", choices=STYLES)
    captions: Optional[int] = setting(None, "number; None: 200, or all held-out ones with a LoRA or words", low=2)
    scale: float = setting(4.0, "guidance", low=1)
    seeds: list[int] = setting([1], "seeds of the starting latents", low=0, high=MAX_SEED)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    grid_path, json_path = (args.output_path / name for name in ("grid.png", "measure.json"))
    with claim_file(grid_path, "--output_path"), claim_file(json_path, "--output_path"):
        measure(args)


def measure(args: Settings) -> None:
    """Generate images, measure them, and write grids, images and figures."""
    describe_progress(lambda: "before there was a result")
    setup_runtime("CPU")
    pipeline = Pipeline.from_checkpoint(args.models / "nano.safetensors", config=CONFIG)
    clip = nano_clip(args.models)
    sampling = Sampling(num_inference_steps=20, guidance_scale=args.scale, batch_size=20)

    def images_of(prompts: list[str], seed: int) -> np.ndarray:
        return np.concatenate([batch.images for batch in pipeline.generate(prompts, sampling, seed)])

    result: dict[str, Any] = {"guidance": args.scale, "steps": 20}
    by_seed = {}
    if args.lora_ckpt_path is None and not args.words:
        print(vae_report := report(pipeline.model.first_stage_model))
        result["autoencoder"] = vae_report
        known = read_images("emoji_noto", "")
        real = np.stack([image.pixels for image in known])
        count = min(args.captions or 200, len(known))
        chosen = np.sort(draws(1, "captions", 0).choice(len(known), count, replace=False))
        captions = [known[i].caption for i in chosen]
        result["captions"] = count
        for seed in args.seeds:
            made = images_of(captions, seed)
            by_seed[seed] = measure_base(clip, made, real, chosen)
            save_images(args.output_path / f"seed_{seed}" / "base", made)
            write_grid(args.output_path, seed, args.seeds, grid(made[:64], 8, captions[:64]))
    else:
        held_out = read_images(args.style, "test")
        held_out = [held_out[i] for i in evenly(len(held_out), args.captions or len(held_out))]
        captions, real = [image.caption for image in held_out], np.stack([image.pixels for image in held_out])
        result.update(style=args.style, prompts=len(captions), lora_scale=args.lora_scale, words=args.words)
        base = {seed: images_of(captions, seed) for seed in args.seeds}
        if args.lora_ckpt_path is not None:
            pipeline.load_lora(args.lora_ckpt_path, args.lora_scale, start=args.lora_start, end=args.lora_end)
        shown = evenly(len(captions), 24)
        made_by = "with LoRA" if args.lora_ckpt_path else "by words"
        texts = [text for i in shown for text in (captions[i], made_by, "real")]
        for seed in args.seeds:
            made = images_of([caption + args.words for caption in captions], seed)
            by_seed[seed] = measure_lora(clip, base[seed], made, real, captions)
            save_images(args.output_path / f"seed_{seed}" / "base", base[seed])
            save_images(args.output_path / f"seed_{seed}" / "with_lora", made)
            triples = np.stack([base[seed][shown], made[shown], real[shown]], axis=1).reshape(-1, 64, 64, 3)
            write_grid(args.output_path, seed, args.seeds, grid(triples, 12, texts))
    result["seeds"] = by_seed
    result["mean"] = {
        name: float(np.mean([figures[name] for figures in by_seed.values()])) for name in by_seed[args.seeds[0]]
    }
    print(json.dumps({name: value for name, value in result.items() if name != "autoencoder"}, indent=2))
    write_json(args.output_path / "measure.json", result)


def measure_base(clip: ClipNetwork, made: np.ndarray, real: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """Compare images of the base model with the real ones, of which `own` are those of the captions."""
    return {
        "top5_pixels": own_among_nearest(thumbnails(made), thumbnails(real), own),
        "top5_image_tower": own_among_nearest(clip.encode_pixels(made), clip.encode_pixels(real), own),
    }


def measure_lora(
    clip: ClipNetwork, base: np.ndarray, made: np.ndarray, real: np.ndarray, captions: list[str]
) -> dict[str, float]:
    """Compare images (N, 64, 64, 3) of base model and LoRA with the held-out real ones of the same captions."""
    figures = {"chroma_base": mean_chroma(base), "chroma_lora": mean_chroma(made)}
    figures["chroma_share"] = figures["chroma_lora"] / figures["chroma_base"]
    features, texts, own = clip.encode_pixels(real), clip.encode_texts(captions), np.arange(len(real))
    for name, images in (("base", base), ("lora", made)):
        drawn = clip.encode_pixels(images)
        figures[f"top5_{name}"] = own_among_nearest(drawn, features, own)
        figures[f"nearer_{name}"] = nearer_than_another(drawn, features)
        figures[f"frechet_{name}"] = frechet_of_features(features, drawn)
        figures[f"clip_score_{name}"] = float(clip_scores(drawn, texts).mean())
    return figures


def save_images(folder: Path, pixels: np.ndarray) -> None:
    """Write images as 00000.png and so on, for other judges, in place of those of an earlier measurement."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        earlier.unlink()
    for i, image in enumerate(pixels):
        with atomic_path(folder / f"{i:05}.png", sync=False) as path:
            Image.fromarray(image).save(path)


def write_grid(folder: Path, seed: int, seeds: list[int], sheet: Image.Image) -> None:
    """Write the grid of a seed; that of the first one is grid.png."""
    with atomic_path(folder / ("grid.png" if seed == seeds[0] else f"grid_{seed}.png")) as path:
        sheet.save(path)


if __name__ == "__main__":
    run_script(main)
