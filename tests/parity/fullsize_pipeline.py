"""Draw with the full shapes of a published model on both sides: a diffusers folder that diffusers made, of random
weights, by diffusers' own pipeline and by text_to_image.py from the same starting latents.

    python -m tests.parity.fullsize_pipeline configs/v1-inference.yaml
    python -m tests.parity.fullsize_pipeline configs/v2-vpred-inference.yaml --size 16 --steps 5

In the environment of `make test-parity`; about 12 GB of memory, 6 GB of disk, and some minutes each. Exits with 1 if
the final latents differ by more than 1e-3 of their largest value, or a pixel by more than 2 of 255.
docs/checkpoints.md holds what it printed.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
from pathlib import Path

from ldm.settings.model import load_model_config
from tests.named_weights import relative_error
from tests.parity.folders import draw_with_diffusers, draw_with_ours, largest_pixel_difference, make_pipeline
from tests.pipeline_cases import NEGATIVE_PROMPTS, PROMPTS, SCALE, starting_latents

BOUND, PIXEL_BOUND = 1e-3, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_config")
    parser.add_argument("--size", type=int, default=16, help="height and width of the latents (default 16: 128 pixels)")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()

    config = load_model_config(arguments.model_config)
    start = starting_latents(config, 1, arguments.size, arguments.size)
    pixels = str(arguments.size * config.vae_factor)
    given = (PROMPTS[:1], NEGATIVE_PROMPTS[1:], start, arguments.steps, SCALE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sd"
        make_pipeline(config, Path(temporary) / "tokenizer").save_pretrained(folder)
        gc.collect()
        began = time.time()
        theirs = draw_with_diffusers(folder, *given)
        between = time.time()
        ours = draw_with_ours(folder, *given, Path(temporary) / "out", "--H", pixels, "--W", pixels)
        ended = time.time()
    error, pixel = relative_error(ours[0], theirs[0]), largest_pixel_difference(ours[1], theirs[1])
    print(
        f"{arguments.model_config}: {config.prediction_type}, {pixels}x{pixels} pixels, {arguments.steps} steps: "
        f"final latents differ by {error:.1e} of their largest value, pixels by {pixel} of 255 at most "
        f"(their std {theirs[1].std():.0f}); diffusers {between - began:.0f} s, text_to_image.py "
        f"{ended - between:.0f} s with loading and compiling; peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB"
    )
    return int(error > BOUND or pixel > PIXEL_BOUND)


if __name__ == "__main__":
    sys.exit(main())
