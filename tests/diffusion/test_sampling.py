"""The sizes that a model can draw, and how many images a call of the network takes."""

from __future__ import annotations

import pytest

from ldm.diffusion.sampling import default_batch_size, latent_shape


def test_latents_have_the_size_of_the_image_over_the_vaes_factor(tiny_config):
    assert tiny_config.size_multiple == 8
    assert latent_shape(tiny_config, 40, 32) == (4, 10, 8)
    assert latent_shape(tiny_config) == (4, 8, 8)


@pytest.mark.parametrize(
    ("images_per_prompt", "side", "batch_size"),
    [(4, 512, 4), (4, 64, 16), (100, 64, 100), (1000, 512, 8), (1000, 768, 3), (1000, 4096, 1)],
)
def test_the_default_batch_size_is_the_images_of_a_prompt_within_bounds(images_per_prompt, side, batch_size):
    assert default_batch_size(images_per_prompt, side, side) == batch_size
