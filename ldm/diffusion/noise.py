"""The noise of training: what noise_offset, multires_noise_iterations and ip_noise_gamma make of normal noise.

It is computed on the host. Each setting has streams of its own (ldm.data.draws), so turning one on changes no other
draw. A row's noise depends on its place among the rows of all processes, not on which process draws it.
"""

from __future__ import annotations

import numpy as np

from ldm.data.draws import draws
from ldm.settings.loss import LossSettings


def training_noise(
    settings: LossSettings, seed: int, micro_batch: int, noise: np.ndarray, latents: np.ndarray, process_index: int = 0
) -> np.ndarray:
    """Return the noise that a process's rows of a micro-batch are trained with.

    Args:
        settings: Without any of the settings above, `noise` itself is returned.
        seed: Of the run.
        micro_batch: The number of the micro-batch, counted over the whole run.
        noise: Standard normal, (N, C, h, w) float32. It is not changed.
        latents: (N, C, h, w) float32, scaled.
        process_index: Of the process.

    Returns:
        (N, C, h, w) float32, or (N, 2 C, h, w) with ip_noise_gamma: first the noise of the target, then that of the
        network's input. In one array, the batch and all that handles it stay as they are, and the graph has only one
        operator more, which splits it. The input cannot be computed on the host from other latents instead: the
        target of a velocity depends on the latents too.
    """
    count, channels, height, width = noise.shape
    end = (process_index + 1) * count

    def normal(stream: str, channels: int, height: int, width: int) -> np.ndarray:
        # All rows up to this process's, as in micro_batch_draws.
        rng = draws(seed, stream, micro_batch)
        return rng.standard_normal((end, channels, height, width), dtype=np.float32)[-count:]

    if settings.noise_offset:
        std = noise_offset_std(latents, settings.noise_offset, settings.adaptive_noise_scale)
        noise = noise + std * normal("noise_offset", channels, 1, 1)
    if settings.multires_noise_iterations:
        ratio = 2.0 + 2.0 * draws(seed, "multires_ratio", micro_batch).random(settings.multires_noise_iterations)
        coarser = [
            normal(f"multires_noise_{i}", channels, *size)
            for i, size in enumerate(multires_sizes((height, width), ratio))
        ]
        noise = multires_noise(noise, coarser, settings.multires_noise_discount)
    if settings.ip_noise_gamma:
        further = np.float32(settings.ip_noise_gamma) * normal("ip_noise", channels, height, width)
        noise = np.concatenate([noise, noise + further], axis=1)
    return noise


def noise_offset_std(latents: np.ndarray, noise_offset: float, adaptive_noise_scale: float | None) -> np.ndarray:
    """Return noise_offset + adaptive_noise_scale |mean of a channel|, at least 0: float32 (N, C, 1, 1)."""
    means = np.abs(latents.mean(axis=(2, 3), keepdims=True))
    return np.maximum(noise_offset + (adaptive_noise_scale or 0.0) * means, 0.0).astype(np.float32)


def multires_sizes(size: tuple[int, int], ratios: np.ndarray) -> list[tuple[int, int]]:
    """Return the sizes of the noises that are added: the full one, then size / r^i, until a side is 1 pixel.

    Args:
        size: Height and width of the latents.
        ratios: r for each i from 0, between 2 and 4.
    """
    sizes: list[tuple[int, int]] = []
    for i, ratio in enumerate(ratios.tolist()):
        height, width = (max(1, int(side / ratio**i)) for side in size)
        sizes.append((height, width))
        if height == 1 or width == 1:
            break
    return sizes


def multires_noise(noise: np.ndarray, coarser: list[np.ndarray], discount: float) -> np.ndarray:
    """Return noise + the sum of discount^i coarser[i], enlarged bilinearly, with a standard deviation of 1 in each row.

    sd-scripts divides all rows by one standard deviation. Here each row has its own, so that it does not depend on the
    other rows, which other processes may have. For a batch of one image they are equal.

    Args:
        noise: (N, C, h, w) float32.
        coarser: Noises (N, C, h_i, w_i) float32.
        discount: The factor of each further noise.
    """
    total = noise.copy()
    for i, array in enumerate(coarser):
        total += np.float32(discount**i) * enlarge(array, noise.shape[2:])
    stds = np.array([row.std(ddof=1, dtype=np.float64) for row in total], np.float32)
    return total / stds.reshape(-1, 1, 1, 1)


def enlarge(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize (N, C, h, w) bilinearly to `size`, with pixels' centres aligned: torch's Upsample with its defaults."""
    if array.shape[2:] == size:
        return array
    rows, columns = (_bilinear(new, old) for new, old in zip(size, array.shape[2:]))
    return rows @ array @ columns.T


def _bilinear(new: int, old: int) -> np.ndarray:
    """Return the matrix (new, old) float32 that interpolates `old` values at `new` places."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0.0, old - 1.0)
    left = np.floor(place).astype(int)
    right = np.minimum(left + 1, old - 1)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), left), 1.0 - (place - left))
    np.add.at(matrix, (np.arange(new), right), place - left)
    return matrix.astype(np.float32)
