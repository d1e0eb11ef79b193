"""Assemble the nano model from its parts, in fp16.

    python -m tools.nano.assemble --vae output/nano/vae --clip output/nano/clip --output_path models/nano
    python -m tools.nano.assemble --vae … --clip … --unet output/nano/unet/ckpt/model.ckpt --output_path models/nano

Writes nano.safetensors (the autoencoder, CLIP's text tower as the text encoder, and the UNet) and clip.safetensors
(CLIP's image tower and projections). Without --unet, nano.safetensors is the base model that the UNet's training starts
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.errors import UserError  # noqa: E402
from ldm.files.outputs import claim_all, claim_file  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint  # noqa: E402

TEXT = "cond_stage_model.transformer."
FILES = ("nano.safetensors", "clip.safetensors")


def half(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Round arrays to fp16. Raises UserError for a value that overflows."""
    with np.errstate(over="ignore"):  # checked below, by name
        rounded = {name: array.astype(np.float16) for name, array in arrays.items()}
    for name, array in rounded.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} overflows fp16: train with smaller weights")
    return rounded


@dataclass
class Settings:
    """The command line."""

    vae: Path = setting(REQUIRED, "output folder of train_vae", path=True)
    clip: Path = setting(REQUIRED, "output folder of train_clip", path=True)
    unet: Optional[Path] = setting(None, "checkpoint of train_text_to_image.py with the vanilla nano recipe", path=True)
    output_path: Path = setting(REQUIRED, "folder of the two files", path=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    with claim_all(*(claim_file(args.output_path / name, "--output_path") for name in FILES)):
        assemble(args)


def assemble(args: Settings) -> None:
    """Write the two files."""
    model, _ = read_checkpoint(args.vae / "vae.safetensors")
    clip, _ = read_checkpoint(args.clip / "clip.safetensors")
    model.update({TEXT + name: array for name, array in clip.items() if name.startswith("text_model.")})
    if args.unet:
        unet, _ = read_checkpoint(args.unet)
        model.update({name: array for name, array in unet.items() if name.startswith("model.diffusion_model.")})
    rest = {name: array for name, array in clip.items() if not name.startswith("text_model.")}
    metadata = {"architecture": "nano", "licence": "see NOTICE", "prediction_type": "v_prediction"}
    for name, arrays in zip(FILES, (model, rest)):
        path = args.output_path / name
        write_checkpoint(path, half(arrays), metadata)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
