"""Make the data set that teaches the nano model's UNet the concepts in more styles.

    python -m tools.nano.style_images --output_path output/nano/styles_varied

Every concept of datasets/emoji_noto/img_txt.csv is taken in Noto's style and in three of datasets/styles, each image
once as it is and, unless `--variations False`, once slightly turned, scaled and shifted. Captions name the style: "a
koala, line drawing, bold". Noto's captions name none, because its style is the one that the model draws by default.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ldm.data.dataset import read_image_text_csv  # noqa: E402
from ldm.data.upright import open_rgb  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.nano.images import DATASETS  # noqa: E402

# The folders of datasets/styles, and how a caption names each style. The styles in colour are left out: each
# style takes training time and a part of a small model (docs/nano.md, "Training runs").
STYLE_WORDS = {
    "emojione-monotone": "black and white",
    "notomono": "line drawing",
    "notomono-bold": "line drawing, bold",
}
SEED = 17  # of the variations
WHITE = (255, 255, 255)


def vary(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn an image of 64x64 pixels by up to 8 degrees, scale it by 0.88 to 1.08, and shift it by up to 3 pixels."""
    scale, angle = 1 / rng.uniform(0.88, 1.08), np.deg2rad(rng.uniform(-8, 8))
    dx, dy = rng.uniform(-3, 3, 2)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    centre, finer = 31.5, 4  # the transform works on a finer grid, so that thin lines stay even
    x0 = centre - cos * (centre + dx) + sin * (centre + dy)
    y0 = centre - sin * (centre + dx) - cos * (centre + dy)
    large = image.resize((64 * finer, 64 * finer), Image.LANCZOS)
    matrix = (cos, -sin, finer * x0, sin, cos, finer * y0)
    turned = large.transform(large.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=WHITE)
    return turned.resize((64, 64), Image.LANCZOS)


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(REQUIRED, "folder of the data set", path=True)
    variations: bool = setting(True, "write a second copy of each image, slightly turned, scaled and shifted")


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    with claim_folder(args.output_path, "--output_path"), claim_file(args.output_path / "img_txt.csv", "--output_path"):
        write_images(args.output_path, args.variations)


def write_images(output: Path, variations: bool = True) -> None:
    """Write the images, and img_txt.csv last."""
    rng = np.random.default_rng(SEED)
    concepts = sorted(read_image_text_csv(DATASETS / "emoji_noto").rows, key=lambda row: row.path.name)
    listed = []
    for style, words in tqdm([("emoji_noto", ""), *STYLE_WORDS.items()], desc="styles"):
        (output / style).mkdir(parents=True, exist_ok=True)
        for concept in concepts:
            name = concept.path.name
            source = concept.path if not words else DATASETS / "styles" / style / name
            if not source.exists():  # not every style draws every concept
                continue
            image = open_rgb(source)
            caption = f"{concept.caption}, {words}" if words else concept.caption
            files = [(name, image)]
            if variations:
                files.append((f"v_{name}", vary(image, rng)))
            for file, made in files:
                made.save(output / style / file)
                listed.append((f"{style}/{file}", caption))
    with atomic_path(output / "img_txt.csv") as path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("dir", "text"))
            writer.writerows(listed)
    print(f"{output}: {len(listed)} images of {len(concepts)} concepts in {1 + len(STYLE_WORDS)} styles")


if __name__ == "__main__":
    run_script(main)
