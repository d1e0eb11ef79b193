r"""Measure the embedded model, and what a LoRA makes of it.

    python -m tools.nano.measure --output_path output/nano/measure
    python -m tools.nano.measure --output_path output/nano/measure_lora \
        --lora_ckpt_path output/demo/lora/ckpt/lora.ckpt --lora_scale 0.8

Without a LoRA: the autoencoder's PSNR on Noto's held-out images; for 200 captions of the base's concepts, how often
the real image is among the 5 nearest of all the base's images, by pixels (16x16 RGB, L2) and by the nano CLIP's
image tower; a grid of 64 samples. With a LoRA for emoji_fluent_hc: on the held-out concepts, the mean chroma (max - min
of RGB, 0 to 1) of base and LoRA, and how often the concept's real line art is nearer to its sample than another one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ldm.runtime.script import progress, run, start

if __name__ == "__main__":
    start()

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.data.draws import draws  # noqa: E402
from ldm.diffusion.sampling import Sampling  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.files.paths import user_path  # noqa: E402
from ldm.generation.pipeline import Pipeline  # noqa: E402
from ldm.metrics.networks import nano_clip  # noqa: E402
from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.settings.command_line import Parser, number, whole_number  # noqa: E402
from tools.grid import evenly  # noqa: E402
from tools.nano.images import DATASETS, read_images  # noqa: E402
from tools.nano.train_vae import CONFIG, report  # noqa: E402

MODELS = CONFIG.parents[1] / "models" / "nano"


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) uint8 -> (N, 768) of 16x16 RGB, each the mean of 4x4 pixels."""
    n, size = pixels.shape[:2]
    small = pixels.reshape(n, 16, size // 16, 16, size // 16, 3).astype(np.float64).mean(axis=(2, 4))
    return small.reshape(n, -1)


def own_among_nearest(made: np.ndarray, real: np.ndarray, own: np.ndarray, nearest: int = 5) -> float:
    """Share of rows of `made` (N, D) whose own row of `real` (M, D), numbered by `own` (N,), is among the nearest."""
    distances = ((made[:, None] - real[None]) ** 2).sum(axis=2)
    mine = distances[np.arange(len(made)), own]
    return float(((distances < mine[:, None]).sum(axis=1) < nearest).mean())


def mean_chroma(pixels: np.ndarray) -> float:
    """Mean of max(R, G, B) - min(R, G, B), 0 to 1, of (N, H, W, 3) uint8."""
    return float((pixels.max(axis=3).astype(np.float64) - pixels.min(axis=3)).mean() / 255.0)


def nearer_than_another(made: np.ndarray, real: np.ndarray) -> float:
    """How often real i is nearer to made i than another real is, over all pairs; unit vectors (N, D)."""
    cosines = made @ real.T
    return float((np.diag(cosines)[:, None] > cosines).sum() / (len(made) * (len(made) - 1)))


def grid(pixels: np.ndarray, columns: int, texts: list[str] | None = None, zoom: int = 2) -> Image.Image:
    """Images in rows, each with its caption below where captions are given."""
    size, line = pixels.shape[1] * zoom, 14 if texts else 0
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(pixels):
        x, y = i % columns * (size + 4), i // columns * (size + line + 4)
        sheet.paste(Image.fromarray(image).resize((size, size), Image.LANCZOS), (x, y))
        if texts:
            draw.text((x + 2, y + size + 1), texts[i][: size // 6], fill="black")
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output_path", type=user_path, required=True, help="folder of the grid and measure.json")
    parser.add_argument(
        "--models", type=user_path, default=MODELS, help="folder of nano.safetensors and clip.safetensors"
    )
    parser.add_argument("--lora_ckpt_path", type=user_path, help="a LoRA for emoji_fluent_hc")
    parser.add_argument("--lora_scale", type=number(), default=1.0, help="its weight")
    parser.add_argument(
        "--captions", type=whole_number(2), help="how many are drawn; default 200, with a LoRA all held-out ones"
    )
    parser.add_argument("--scale", type=number(1), default=4.0, help="guidance")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=1)
    args = parser.parse_args(argv)
    grid_path, json_path = (args.output_path / name for name in ("grid.png", "measure.json"))
    with claim_file(grid_path, "--output_path"), claim_file(json_path, "--output_path"):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Draw, measure, and write the grid and the numbers."""
    progress(lambda: "before there was a result")
    setup_runtime("CPU")
    pipeline = Pipeline.from_checkpoint(args.models / "nano.safetensors", config=CONFIG)
    clip = nano_clip(args.models)
    sampling = Sampling(num_inference_steps=20, guidance_scale=args.scale, batch_size=20)

    def images_of(prompts: list[str]) -> np.ndarray:
        made = pipeline.generate(prompts, sampling, args.seed)
        return np.concatenate([batch.images for batch in made])

    result: dict[str, float | int | str] = {"guidance": args.scale, "steps": 20, "seed": args.seed}
    if args.lora_ckpt_path is None:
        vae_report = report(pipeline.model.first_stage_model)
        print(vae_report)
        result["autoencoder"] = vae_report
        rows = read_image_text_csv(DATASETS / "emoji_noto").rows
        real = np.stack([np.asarray(Image.open(row.path).convert("RGB")) for row in rows])
        count = min(args.captions or 200, len(rows))
        chosen = np.sort(draws(args.seed, "captions", 0).choice(len(rows), count, replace=False))
        texts = [rows[i].text for i in chosen]
        made = images_of(texts)
        result["captions"] = len(chosen)
        result["top5_pixels"] = own_among_nearest(thumbnails(made), thumbnails(real), chosen)
        result["top5_image_tower"] = own_among_nearest(clip.of_pixels(made), clip.of_pixels(real), chosen)
        sheet = grid(made[:64], 8, texts[:64])
    else:
        held_out = read_images("emoji_fluent_hc", "test")
        held_out = [held_out[i] for i in evenly(len(held_out), args.captions or len(held_out))]
        texts, real = [p.text for p in held_out], np.stack([p.pixels for p in held_out])
        base = images_of(texts)
        pipeline.load_lora(args.lora_ckpt_path, args.lora_scale)
        made = images_of(texts)
        result["prompts"], result["lora_scale"] = len(texts), args.lora_scale
        result["chroma_base"], result["chroma_lora"] = mean_chroma(base), mean_chroma(made)
        result["chroma_share"] = result["chroma_lora"] / result["chroma_base"]
        features = clip.of_pixels(real)
        result["nearer_base"] = nearer_than_another(clip.of_pixels(base), features)
        result["nearer_lora"] = nearer_than_another(clip.of_pixels(made), features)
        some = evenly(len(texts), 24)
        triples = np.stack([base[some], made[some], real[some]], axis=1).reshape(-1, 64, 64, 3)
        sheet = grid(triples, 12, [t for i in some for t in (texts[i], "with LoRA", "real")])
    print(json.dumps({name: value for name, value in result.items() if name != "autoencoder"}, indent=2))
    with atomic_path(args.output_path / "grid.png") as path:
        sheet.save(path)
    with atomic_path(args.output_path / "measure.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
