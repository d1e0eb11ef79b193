"""Randomness as a pure function of where training is, so that a resumed run needs no saved generator."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np


def draws(seed: int, stream: str, step: int, rank: int = 0) -> np.random.Generator:
    """A generator that depends on its arguments alone.

    Args:
        seed: the run's seed.
        stream: what is drawn ("noise", "timesteps", "flip", ...); streams are independent of each other.
        step: the global micro-step, or whatever else counts what was drawn (an epoch, an image).
        rank: the process, where each is to draw something else.
    """
    # A digest of the text rather than a list of integers, which SeedSequence would run together:
    # (1, 2 ** 32) and (2 ** 64 + 1,) would be one seed.
    digest = hashlib.sha256(f"{seed:d}/{stream}/{step:d}/{rank:d}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


class StepDraws(NamedTuple):
    """What the diffusion loss of one micro-step draws for its N rows."""

    posterior: np.ndarray  # (N, C, h, w) float32, standard normal: where in its distribution each latent lies
    noise: np.ndarray  # like posterior: what the latents are noised with
    timesteps: np.ndarray  # (N,) int32
    dropped: np.ndarray  # (N,) bool: the captions that the empty one takes the place of


def step_draws(
    seed: int, micro_step: int, shape: tuple[int, ...], timesteps: int, caption_dropout: float, rank: int = 0
) -> StepDraws:
    """The draws of `micro_step` for latents of `shape` (N, C, h, w), timesteps below `timesteps`."""

    def stream(name: str) -> np.random.Generator:
        return draws(seed, name, micro_step, rank)

    return StepDraws(
        stream("posterior").standard_normal(shape, dtype=np.float32),
        stream("noise").standard_normal(shape, dtype=np.float32),
        stream("timesteps").integers(0, timesteps, shape[0], dtype=np.int32),
        stream("caption_dropout").random(shape[0]) < caption_dropout,
    )


def augmentation_draws(seed: int, micro_step: int, count: int, rank: int = 0) -> list[np.random.Generator]:
    """The generator of each of a micro-step's images, for its crop and flip."""
    seeds = draws(seed, "augment", micro_step, rank).integers(0, 2**63, count)
    return [np.random.default_rng(image) for image in seeds]
