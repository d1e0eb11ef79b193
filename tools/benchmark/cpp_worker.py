"""stable-diffusion.cpp's side of a workload, started by run.py in an environment with stable-diffusion-cpp-python.

    python -m tools.benchmark.cpp_worker NAME --folder FOLDER [--precision bf16] [--image IMAGE]

The precision is that of the matrices it holds. The kernels of its convolutions are in fp16 in both.
"""

from __future__ import annotations

import argparse
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.benchmark.worker import Turns

turns = Turns() if __name__ == "__main__" else None

from stable_diffusion_cpp import StableDiffusion  # noqa: E402

from ldm.settings.model import load_model_config  # noqa: E402
from tools.benchmark import works  # noqa: E402
from tools.benchmark.inputs import PROMPT  # noqa: E402
from tools.benchmark.works import WORKS, Work  # noqa: E402

PACKAGE = "stable_diffusion_cpp"
TYPES = {"fp32": "f32", "bf16": "bf16"}


def load(folder: Path, precision: str) -> Any:
    """Return the model that run.py wrote, in this type."""
    return StableDiffusion(
        model_path=str(folder / "model"),
        wtype=TYPES[precision],
        n_threads=len(os.sched_getaffinity(0)),
        vae_decode_only=True,
        verbose=False,
    )


def script(work: Work, folder: Path, precision: str, path: Path) -> None:
    """Do what text_to_image.py does: load a model, generate one image and write it."""
    side = work.size * load_model_config(work.config).vae_factor
    (image,) = load(folder, precision).generate_image(
        prompt=PROMPT, width=side, height=side, cfg_scale=works.SCALE, sample_method="dpm++2m",
        sample_steps=works.STEPS, seed=works.SEED,
    )  # fmt: skip
    image.convert("RGB").save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("--precision", choices=TYPES, default="fp32")
    parser.add_argument("--folder", type=Path, required=True, help="what run.py prepared")
    parser.add_argument("--image", type=Path, help="the PNG of a script")
    args = parser.parse_args()
    work = WORKS[args.work]
    if work.kind == "script":
        script(work, args.folder, args.precision, args.image)
    else:
        turns.serve(lambda: load(args.folder, args.precision), {PACKAGE: version(f"{PACKAGE}_python")})


if __name__ == "__main__":
    main()
