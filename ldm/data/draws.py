"""Randomness as a pure function of where training is, so that a resumed run needs no saved generator."""

from __future__ import annotations

import hashlib

import numpy as np


def draws(seed: int, stream: str, step: int, rank: int = 0) -> np.random.Generator:
    """A generator that depends on its arguments alone.

    Args:
        seed: the run's seed.
        stream: what is drawn ("noise", "timesteps", "flip", ...); streams are independent of each other.
        step: the global micro-step, or whatever else counts what was drawn (an epoch, a picture).
        rank: the process, where each is to draw something else.
    """
    # A digest of the text rather than a list of integers, which SeedSequence would run together:
    # (1, 2 ** 32) and (2 ** 64 + 1,) would be one seed.
    digest = hashlib.sha256(f"{seed:d}/{stream}/{step:d}/{rank:d}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
