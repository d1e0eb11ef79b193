"""Weights that are a function of a parameter's name and shape: both sides of a comparison make them for themselves, so
that no golden file has to hold them."""

from __future__ import annotations

import zlib

import numpy as np

# Queries and keys are strong, so that attention is far from uniform, and what goes into a GELU, so that its exact form
# differs from the tanh form; all else is quiet, so that the variances which the norms see are small and their epsilons
# show.
STRONG = (".to_q.", ".to_k.", ".q_proj.", ".k_proj.", ".attn_1.q.", ".attn_1.k.", ".ff.net.0.proj.", ".mlp.fc1.")


def named_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of `shape` for the canonical parameter `name`.

    Matrices, kernels and tables: uniform, of variance gain^2 / fan_in; norms: 1 +- 0.3; biases +- 0.1. The generator is
    numpy's RandomState, whose stream never changes between versions.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.uniform(-1.0, 1.0, shape)
    if len(shape) == 1:
        values = 1.0 + 0.3 * values if name.endswith(".weight") else 0.1 * values
    else:
        gain = 2.0 if any(part in name for part in STRONG) else 0.2
        values *= gain * np.sqrt(3.0 / np.prod(shape[1:]))
    return values.astype(np.float32)


def named_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of `shape`, by `name`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, over the largest value of the reference."""
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())
