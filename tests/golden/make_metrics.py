"""Write metrics.npz: what pytorch-fid sees of the odd images and answers for one, and transformers' CLIP features.

Weights are functions of their names (tests/metrics/named_networks.py). Run in an environment that has torch,
transformers and pytorch-fid 0.3.0: python -m tests.golden.make_metrics
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.parity.fid_reference import import_torchvision

import_torchvision()  # before transformers, which fails with a torchvision that fails

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ldm.models.clip import CLIPModel  # noqa: E402
from ldm.tokenizer import Tokenizer  # noqa: E402
from tests.metrics.named_networks import CLIP_ARGUMENTS, clip_weights, inception_weights  # noqa: E402
from tests.metrics.odd_images import write_odd_images  # noqa: E402
from tests.parity.fid_reference import reference_clip, reference_inception, reference_input  # noqa: E402

EVERY = 1009  # of an input's values one in so many is kept
TEXTS = ["a cat", "a photograph of an astronaut riding a horse, " * 12, ""]


def answers() -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {"every": np.array(EVERY)}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = write_odd_images(Path(folder))
        for name, path in paths.items():
            found[f"input {name}"] = reference_input(path).reshape(-1)[::EVERY]
        given = torch.from_numpy((reference_input(paths["odd.png"])[None] + 1) / 2)
        found["features"] = reference_inception(inception_weights())(given)[0][0, :, 0, 0].numpy()
        shapes = {name: tuple(p.shape) for name, p in CLIPModel(**CLIP_ARGUMENTS).parameters_dict().items()}
        clip = reference_clip(clip_weights(shapes), "quick_gelu")
        images = np.random.RandomState(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
        output = clip(
            input_ids=torch.from_numpy(Tokenizer().encode(TEXTS)).long(), pixel_values=torch.from_numpy(images)
        )
        found.update(
            {
                "clip texts": np.array(TEXTS),
                "clip images": images,
                "clip text features": output.text_embeds.numpy(),
                "clip image features": output.image_embeds.numpy(),
            }
        )
    return found


def main() -> None:
    found = answers()
    np.savez_compressed(Path(__file__).with_name("metrics.npz"), **found)
    print(f"torch {torch.__version__}, features {found['features'].mean():.3f} +- {found['features'].std():.3f}")


if __name__ == "__main__":
    main()
