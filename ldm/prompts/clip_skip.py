"""Clip skip: text embeddings from an earlier layer of the text encoder, counted as A1111 does."""

from __future__ import annotations

from ldm.errors import UserError, plain
from ldm.settings.model import ModelConfig


def own_clip_skip(config: ModelConfig) -> int:
    """Return the clip skip that a model is trained with: 2 for SD2.x, whose last layer checkpoints may lack, else 1."""
    return 2 if config.architecture == "sd2" else 1


def layers_to_run(config: ModelConfig, clip_skip: int | None = None) -> int:
    """Return how many layers give hidden_states[-clip_skip], on which the final LayerNorm follows.

    Args:
        config: The model's. It has the layers up to the model's own clip skip.
        clip_skip: None for the model's own.

    Raises:
        UserError: The model has no such layer.
    """
    layers, own = config.text["num_layers"], own_clip_skip(config)
    if clip_skip is None:
        return layers
    if not own <= clip_skip < own + layers:
        raise UserError(
            f"clip_skip {clip_skip}: the text encoder of {plain(config.path)} takes {own} to {own + layers - 1}, and "
            f"{own} is its default"
        )
    return layers + own - clip_skip
