"""The noise of training: each setting against its formula, from streams of its own, the same for any processes."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.draws import draws
from ldm.diffusion.noise import enlarge, multires_noise, multires_sizes, noise_offset_std, training_noise
from ldm.settings.loss import LossSettings

SHAPE = (4, 4, 32, 24)
NOISE = draws(5, "noise", 3).standard_normal(SHAPE, dtype=np.float32)
LATENTS = 0.5 + draws(5, "latents", 3).standard_normal(SHAPE, dtype=np.float32)
KINDS = [
    dict(noise_offset=0.1),
    dict(noise_offset=0.1, adaptive_noise_scale=0.3),
    dict(multires_noise_iterations=6),
    dict(ip_noise_gamma=0.1),
    dict(multires_noise_iterations=2, multires_noise_discount=0.5, ip_noise_gamma=0.2),
]


def made(settings, rows=slice(None), process_index=0, micro_batch=3):
    return training_noise(LossSettings(**settings), 5, micro_batch, NOISE[rows], LATENTS[rows], process_index)


def stream(name, shape):
    return draws(5, name, 3).standard_normal(shape, dtype=np.float32)


def test_without_a_setting_it_is_the_noise_itself():
    for settings in ({}, dict(noise_offset=0.0, multires_noise_iterations=0, ip_noise_gamma=0.0)):
        assert training_noise(LossSettings(**settings), 5, 3, NOISE, LATENTS) is NOISE


def test_the_offset_is_one_number_for_a_channel():
    offset = stream("noise_offset", (4, 4, 1, 1)).astype(np.float64)
    np.testing.assert_allclose(made(dict(noise_offset=0.1)), NOISE + 0.1 * offset, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_the_offset_grows_with_the_absolute_mean_of_the_latents_channel(scale):
    latents = np.stack([np.full((32, 24), mean, np.float32) for mean in (0.0, 1.0, -2.0, 0.5)])[None]
    expected = np.maximum(0.1 + scale * np.array([0.0, 1.0, 2.0, 0.5]), 0.0)
    std = noise_offset_std(latents, 0.1, scale)
    assert std.dtype == np.float32 and std.shape == (1, 4, 1, 1)
    np.testing.assert_allclose(std.ravel(), expected, rtol=1e-5)
    noise = made(dict(noise_offset=0.1, adaptive_noise_scale=scale))
    std = np.maximum(0.1 + scale * np.abs(LATENTS.mean((2, 3), keepdims=True)), 0.0)
    np.testing.assert_allclose(noise, NOISE + std * stream("noise_offset", (4, 4, 1, 1)), rtol=1e-5, atol=1e-6)


def test_multires_noise_is_the_discounted_sum_of_enlarged_noises_with_a_std_of_1():
    ratios = 2.0 + 2.0 * draws(5, "multires_ratio", 3).random(6)
    total, sizes = NOISE.astype(np.float64), []
    for i in range(6):
        height, width = max(1, int(32 / ratios[i] ** i)), max(1, int(24 / ratios[i] ** i))
        sizes.append((height, width))
        coarse = stream(f"multires_noise_{i}", (4, 4, height, width))
        total = total + 0.3**i * enlarge(coarse, (32, 24)).astype(np.float64)
        if 1 in (height, width):
            break
    assert multires_sizes((32, 24), ratios) == sizes and sizes[0] == (32, 24) and 2 <= len(sizes) < 6
    expected = total / np.array([row.std(ddof=1) for row in total]).reshape(4, 1, 1, 1)
    noise = made(dict(multires_noise_iterations=6))
    np.testing.assert_allclose(noise, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([row.std(ddof=1) for row in noise], 1.0, rtol=1e-5)


def test_multires_noise_has_more_of_the_low_frequencies():
    means = [
        made(settings).mean((2, 3)).std()
        for settings in ({}, dict(multires_noise_iterations=6, multires_noise_discount=0.6))
    ]
    assert means[1] > 2 * means[0]


def test_multires_noise_leaves_its_inputs_as_they_are():
    before = NOISE.copy()
    multires_noise(NOISE, [NOISE], 0.3)
    np.testing.assert_array_equal(NOISE, before)


def test_enlarging_is_torchs_bilinear_upsample():
    # torch.nn.Upsample(size=5, mode="bilinear") of [0, 1] is 0, 0.1, 0.5, 0.9, 1.
    row = enlarge(np.array([[[[0.0, 1.0]]]], np.float32), (1, 5))
    np.testing.assert_allclose(row.ravel(), [0.0, 0.1, 0.5, 0.9, 1.0], atol=1e-6)
    square = enlarge(np.array([[[[0.0, 1.0], [2.0, 4.0]]]], np.float32), (4, 4))
    np.testing.assert_allclose(square[0, 0, 1], [0.5, 0.8125, 1.4375, 1.75], atol=1e-6)
    np.testing.assert_array_equal(enlarge(np.full((1, 1, 1, 1), 3.0, np.float32), (3, 2)), np.full((1, 1, 3, 2), 3.0))


def test_only_the_input_has_the_noise_of_ip_noise_gamma():
    target, given = np.split(made(dict(ip_noise_gamma=0.1)), 2, axis=1)
    np.testing.assert_array_equal(target, NOISE)
    np.testing.assert_allclose(given, NOISE + 0.1 * stream("ip_noise", SHAPE).astype(np.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", KINDS)
def test_processes_divide_what_one_process_draws(settings):
    whole = made(settings)
    assert whole.dtype == np.float32
    for count in (1, 2):
        parts = [made(settings, slice(i, i + count), i // count) for i in range(0, 4, count)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("settings", KINDS)
def test_it_is_a_function_of_the_number_of_the_micro_batch(settings):
    np.testing.assert_array_equal(made(settings), made(settings))
    assert not np.array_equal(made(settings), made(settings, micro_batch=4))
