"""Assemble the nano model from its parts, in fp16.

    python -m tools.nano.assemble --vae output/nano/vae --clip output/nano/clip --output_path models/nano
    python -m tools.nano.assemble --vae … --clip … --unet output/nano/unet/ckpt/model.ckpt --output_path models/nano

Writes nano.safetensors (the autoencoder, CLIP's text tower as the text encoder, and the UNet) and clip.safetensors
(CLIP's image tower and projections). Without --unet, nano.safetensors is the base model that the UNet's training starts
from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.errors import UserError  # noqa: E402
from ldm.files.outputs import claim_all, claim_file  # noqa: E402
from ldm.files.paths import user_path  # noqa: E402
from ldm.settings.command_line import Parser  # noqa: E402
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint  # noqa: E402

TEXT = "cond_stage_model.transformer."
FILES = ("nano.safetensors", "clip.safetensors")


def half(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rounds arrays to fp16. Raises UserError for a value that overflows."""
    with np.errstate(over="ignore"):  # checked below, by name
        rounded = {name: array.astype(np.float16) for name, array in arrays.items()}
    for name, array in rounded.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} overflows fp16: train with smaller weights")
    return rounded


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--vae", type=user_path, required=True, help="output folder of train_vae")
    parser.add_argument("--clip", type=user_path, required=True, help="output folder of train_clip")
    parser.add_argument(
        "--unet", type=user_path, help="checkpoint of train_text_to_image.py with the vanilla nano recipe"
    )
    parser.add_argument("--output_path", type=user_path, required=True, help="folder of the two files")
    args = parser.parse_args(argv)
    with claim_all(*(claim_file(args.output_path / name, "--output_path") for name in FILES)):
        assemble(args)


def assemble(args: argparse.Namespace) -> None:
    """Writes the two files."""
    base, _ = read_checkpoint(args.vae / "vae.safetensors")
    clip, _ = read_checkpoint(args.clip / "clip.safetensors")
    base.update({TEXT + name: array for name, array in clip.items() if name.startswith("text_model.")})
    if args.unet:
        unet, _ = read_checkpoint(args.unet)
        base.update({name: array for name, array in unet.items() if name.startswith("model.diffusion_model.")})
    rest = {name: array for name, array in clip.items() if not name.startswith("text_model.")}
    metadata = {"architecture": "nano", "licence": "see NOTICE", "prediction_type": "v_prediction"}
    for path, arrays in zip(FILES, (base, rest)):
        write_checkpoint(args.output_path / path, half(arrays), metadata)
        size = (args.output_path / path).stat().st_size
        print(f"{args.output_path / path}: {len(arrays)} arrays, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
