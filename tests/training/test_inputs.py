"""What a micro-step trains on."""

from __future__ import annotations

import numpy as np

from ldm.training.inputs import sample_latents


def test_latents_are_a_draw_from_the_moments_times_the_scale():
    mean, logvar = np.full((1, 4, 2, 2), 3.0, np.float32), np.full((1, 4, 2, 2), 2 * np.log(0.5), np.float32)
    eps = np.random.default_rng(0).standard_normal((1, 4, 2, 2)).astype(np.float32)
    latents = sample_latents(np.concatenate([mean, logvar], 1), eps, 0.18215)
    np.testing.assert_allclose(latents, (3.0 + 0.5 * eps) * 0.18215, rtol=1e-6)
    assert latents.dtype == np.float32


def test_an_absurd_variance_is_cut_off():
    moments = np.concatenate([np.zeros((1, 1, 1, 2)), [[[[1000.0, -1000.0]]]]], 1).astype(np.float32)
    latents = sample_latents(moments, np.ones((1, 1, 1, 2), np.float32), 1.0)
    np.testing.assert_allclose(latents.ravel(), [np.exp(10.0), np.exp(-15.0)], rtol=1e-5)
