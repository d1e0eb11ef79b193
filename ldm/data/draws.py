"""Random draws as pure functions of the seed and the step, so that resuming needs no saved generator."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np


def draws(seed: int, stream: str, step: int, process_index: int = 0) -> np.random.Generator:
    """Return a generator that depends only on the arguments.

    Args:
        stream: What is drawn ("noise", "timesteps", "flip", ...). Streams are independent of each other.
        step: The number of the draw in its stream: of a micro-batch, an epoch or an image.
        process_index: The number of the process, for draws that differ between processes.
    """
    # A digest of the text, because SeedSequence joins lists of integers: (1, 2 ** 32) and (2 ** 64 + 1,) are the same
    # seed.
    digest = hashlib.sha256(f"{seed:d}/{stream}/{step:d}/{process_index:d}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


class MicroBatchDraws(NamedTuple):
    """The random draws of the diffusion loss for one micro-batch of N images."""

    posterior: np.ndarray  # (N, C, h, w) float32, standard normal: samples the autoencoder's distribution of latents
    noise: np.ndarray  # (N, C, h, w) float32, standard normal: added to the latents
    timesteps: np.ndarray  # (N,) int32
    dropped: np.ndarray  # (N,) bool: captions that are replaced by the empty caption


def micro_batch_draws(
    seed: int, micro_batch: int, shape: tuple[int, ...], timesteps: int, caption_dropout: float, process_index: int = 0
) -> MicroBatchDraws:
    """Return the draws of a micro-batch.

    Args:
        micro_batch: The number of the micro-batch, counted over the whole run.
        shape: Shape of the latents, (N, C, h, w).
        timesteps: The model's number of time steps.
        caption_dropout: Probability that a caption is dropped.
    """

    def stream(name: str) -> np.random.Generator:
        return draws(seed, name, micro_batch, process_index)

    return MicroBatchDraws(
        stream("posterior").standard_normal(shape, dtype=np.float32),
        stream("noise").standard_normal(shape, dtype=np.float32),
        stream("timesteps").integers(0, timesteps, shape[0], dtype=np.int32),
        stream("caption_dropout").random(shape[0]) < caption_dropout,
    )


def augmentation_draws(seed: int, micro_batch: int, count: int, process_index: int = 0) -> list[np.random.Generator]:
    """Return a generator for each of a micro-batch's `count` images, for its crop and flip."""
    seeds = draws(seed, "augment", micro_batch, process_index).integers(0, 2**63, count)
    return [np.random.default_rng(image_seed) for image_seed in seeds]
