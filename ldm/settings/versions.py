"""The published Stable Diffusion versions: their checkpoints, model configurations and default guidance scales."""

from __future__ import annotations

from typing import NamedTuple


class Version(NamedTuple):
    """A published model.

    Attributes:
        checkpoint: Path of its default checkpoint under the project's folder, with the published file name.
        config: Path of its model YAML under the project's folder.
    """

    checkpoint: str
    config: str


# File names as published by mindone's Stable Diffusion example.
VERSIONS = {
    "1.5": Version("models/sd_v1.5-d0ab7146.ckpt", "configs/v1-inference.yaml"),
    "2.0": Version("models/sd_v2_base-57526ee4.ckpt", "configs/v2-inference.yaml"),
    "2.0-v": Version("models/sd_v2_768_v-e12e3a9b.ckpt", "configs/v2-vpred-inference.yaml"),
    "2.1": Version("models/sd_v2-1_base-7c8d09ce.ckpt", "configs/v2-inference.yaml"),
    "2.1-v": Version("models/sd_v2-1_768_v-061732d1.ckpt", "configs/v2-vpred-inference.yaml"),
    "nano": Version("models/nano/nano.safetensors", "configs/nano.yaml"),
}

# mindone's published defaults for SD1.x and SD2.x; the value for nano is this project's own.
_GUIDANCE_SCALES = {"sd2": 9.0, "nano": 4.0}
_GUIDANCE_SCALE = 7.5


def default_guidance_scale(architecture: str) -> float:
    """Return the guidance scale that is used where none is given."""
    return _GUIDANCE_SCALES.get(architecture, _GUIDANCE_SCALE)
