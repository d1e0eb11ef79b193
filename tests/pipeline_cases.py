"""What golden and live comparisons of whole pipelines share."""

from __future__ import annotations

import numpy as np

from ldm.settings.model import ModelConfig
from tests.named_weights import named_input

PROMPTS = ["a watercolour of a fox in the snow", "three ripe lemons on a blue plate"]
NEGATIVE_PROMPTS = ["", "blurry, grey"]
PREDICTION_TYPES = {"small_sd1": "epsilon", "small_sd2": "v_prediction"}
STEPS = 20
SCALE = 7.5


def starting_latents(config: ModelConfig, count: int = 2, height: int = 8, width: int = 12) -> np.ndarray:
    """Noise (count, C, height, width) that is no square, so that a swap of the two shows."""
    return named_input("starting latents", (count, config.latent_channels, height, width))
