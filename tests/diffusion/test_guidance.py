"""Classifier-free guidance: one batch of 2N, or of N where there is nothing to guide."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from ldm.diffusion.guidance import GuidedDenoiser

X = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float32)
TEXT_EMBEDDINGS = np.random.default_rng(1).standard_normal((3, 7, 5)).astype(np.float32)
NEGATIVE = np.random.default_rng(2).standard_normal((3, 7, 5)).astype(np.float32)


class Recorder:
    """A network that returns its latents plus the first number of the text embeddings, and records its inputs."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timesteps, text_embeddings):
        self.calls.append((latents.asnumpy(), timesteps.asnumpy(), text_embeddings.asnumpy()))
        return ms.Tensor(latents.asnumpy() + text_embeddings.asnumpy()[:, :1, :1, None])


def test_the_output_moves_from_the_negative_one_towards_the_positive_and_beyond():
    guided = GuidedDenoiser(Recorder(), TEXT_EMBEDDINGS, NEGATIVE, scale=4.0)(X, 500)
    positive, negative = X + TEXT_EMBEDDINGS[:, :1, :1, None], X + NEGATIVE[:, :1, :1, None]
    np.testing.assert_allclose(guided, negative + 4.0 * (positive - negative), rtol=1e-5, atol=1e-5)
    assert guided.dtype == np.float32


def test_rescaling_gives_a_share_of_the_output_the_contrast_of_the_positive_one():
    positive, negative = X + TEXT_EMBEDDINGS[:, :1, :1, None], 3.0 * X + NEGATIVE[:, :1, :1, None]

    def unet(latents, timesteps, text_embeddings):
        return ms.Tensor(np.concatenate([negative, positive]))

    plain = negative + 4.0 * (positive - negative)
    rescaled = plain * np.array([p.std() / g.std() for p, g in zip(positive, plain)]).reshape(-1, 1, 1, 1)
    for share in (0.0, 0.7, 1.0):
        output = GuidedDenoiser(unet, TEXT_EMBEDDINGS, NEGATIVE, scale=4.0, rescale=share)(X, 500)
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, share * rescaled + (1 - share) * plain, rtol=1e-5, atol=1e-5)


def test_both_halves_go_through_the_network_in_one_call_the_negative_first():
    unet = Recorder()
    GuidedDenoiser(unet, TEXT_EMBEDDINGS, NEGATIVE, scale=4.0)(X, 500)
    ((latents, timesteps, text_embeddings),) = unet.calls
    np.testing.assert_array_equal(latents, np.concatenate([X, X]))
    np.testing.assert_array_equal(text_embeddings, np.concatenate([NEGATIVE, TEXT_EMBEDDINGS]))
    np.testing.assert_array_equal(timesteps, np.full(6, 500, np.int32))


def test_a_time_step_between_two_keeps_its_fraction_and_a_whole_one_its_type():
    unet = Recorder()
    denoiser = GuidedDenoiser(unet, TEXT_EMBEDDINGS, NEGATIVE, scale=4.0)
    for timestep in (946.421, 946.0, 946):
        denoiser(X, timestep)
    fraction, whole_float, whole = (timesteps for _, timesteps, _ in unet.calls)
    assert fraction.dtype == whole_float.dtype == np.float32 and whole.dtype == np.int32
    np.testing.assert_array_equal(fraction, np.full(6, 946.421, np.float32))


def test_scale_1_needs_no_negative_half():
    unet = Recorder()
    output = GuidedDenoiser(unet, TEXT_EMBEDDINGS, None, scale=1.0)(X, 3)
    ((latents, _, text_embeddings),) = unet.calls
    np.testing.assert_array_equal(latents, X)
    np.testing.assert_array_equal(text_embeddings, TEXT_EMBEDDINGS)
    np.testing.assert_array_equal(output, X + TEXT_EMBEDDINGS[:, :1, :1, None])


def test_scale_0_is_the_negative_output():
    output = GuidedDenoiser(Recorder(), TEXT_EMBEDDINGS, NEGATIVE, scale=0.0)(X, 3)
    np.testing.assert_array_equal(output, X + NEGATIVE[:, :1, :1, None])


@pytest.mark.parametrize("negative", [None, NEGATIVE[:1]])
def test_guidance_without_negative_text_embeddings_of_the_same_shape_is_refused(negative):
    with pytest.raises(ValueError, match="negative text embeddings"):
        GuidedDenoiser(Recorder(), TEXT_EMBEDDINGS, negative, scale=2.0)
