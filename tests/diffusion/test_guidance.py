"""Classifier-free guidance: one batch of 2N, or of N where there is nothing to guide."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from ldm.diffusion.guidance import GuidedDenoiser

X = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float32)
CONTEXT = np.random.default_rng(1).standard_normal((3, 7, 5)).astype(np.float32)
NEGATIVE = np.random.default_rng(2).standard_normal((3, 7, 5)).astype(np.float32)


class Recorder:
    """A network whose output is its latents plus the first number of each context, and which remembers its inputs."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timesteps, context):
        self.calls.append((latents.asnumpy(), timesteps.asnumpy(), context.asnumpy()))
        return ms.Tensor(latents.asnumpy() + context.asnumpy()[:, :1, :1, None])


def test_the_output_moves_from_the_unconditional_one_towards_the_conditional_and_beyond():
    guided = GuidedDenoiser(Recorder(), CONTEXT, NEGATIVE, scale=4.0)(X, 500)
    conditional, unconditional = X + CONTEXT[:, :1, :1, None], X + NEGATIVE[:, :1, :1, None]
    np.testing.assert_allclose(guided, unconditional + 4.0 * (conditional - unconditional), rtol=1e-5, atol=1e-5)
    assert guided.dtype == np.float32


def test_both_halves_go_through_the_network_in_one_call_the_unconditional_first():
    unet = Recorder()
    GuidedDenoiser(unet, CONTEXT, NEGATIVE, scale=4.0)(X, 500)
    ((latents, timesteps, context),) = unet.calls
    np.testing.assert_array_equal(latents, np.concatenate([X, X]))
    np.testing.assert_array_equal(context, np.concatenate([NEGATIVE, CONTEXT]))
    np.testing.assert_array_equal(timesteps, np.full(6, 500, np.int32))


def test_scale_1_needs_no_unconditional_half():
    unet = Recorder()
    output = GuidedDenoiser(unet, CONTEXT, None, scale=1.0)(X, 3)
    ((latents, _, context),) = unet.calls
    np.testing.assert_array_equal(latents, X)
    np.testing.assert_array_equal(context, CONTEXT)
    np.testing.assert_array_equal(output, X + CONTEXT[:, :1, :1, None])


def test_scale_0_is_the_unconditional_output():
    output = GuidedDenoiser(Recorder(), CONTEXT, NEGATIVE, scale=0.0)(X, 3)
    np.testing.assert_array_equal(output, X + NEGATIVE[:, :1, :1, None])


@pytest.mark.parametrize("negative", [None, NEGATIVE[:1]])
def test_guidance_without_a_negative_text_embeddings_of_the_same_shape_is_refused(negative):
    with pytest.raises(ValueError, match="negative text embeddings"):
        GuidedDenoiser(Recorder(), CONTEXT, negative, scale=2.0)
