"""What class images and samples share: networks of a training as graphs of their own, and the text fields of a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn

from ldm.diffusion.sampling import Sampling
from ldm.ops import RepeatedCell
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from ldm.weights.base_model import base_model_hash


class OwnGraph(RepeatedCell):
    """A network as a graph of its own, which can be freed while the network stays."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, *inputs: ms.Tensor) -> ms.Tensor:
        return self.network(*inputs)


def model_fields(settings: TrainSettings, config: ModelConfig) -> dict[str, Any]:
    """Return what the text fields of a PNG say of the base model, as those of text_to_image.py do.

    The files are hashed, which takes seconds.
    """
    checkpoint = settings.pretrained_model_path or ""
    fields: dict[str, Any] = {
        "model": config.architecture,
        "model_config": Path(config.path).name,
        "checkpoint": Path(checkpoint).name,
        "checkpoint_sha256": base_model_hash(checkpoint),
    }
    if settings.pretrained_model_ema:
        fields["checkpoint_ema"] = "True"
    if settings.vae_ckpt_path is not None:
        fields["vae_checkpoint"] = Path(settings.vae_ckpt_path).name
        fields["vae_checkpoint_sha256"] = base_model_hash(settings.vae_ckpt_path)
    return fields


def sampling_field(sampling: Sampling, config: ModelConfig, precision: str) -> dict[str, Any]:
    """Return the text field "settings", as that of text_to_image.py."""
    return {
        **sampling.fields(),
        "H": sampling.height,
        "W": sampling.width,
        "batch_size": sampling.batch_size,
        "precision": precision,
        "prediction_type": config.prediction_type,
    }
