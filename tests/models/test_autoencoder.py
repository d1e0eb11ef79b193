"""The autoencoder: shapes, and moments that are handed on as they are. Its numbers are in test_golden.py."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ldm.models.autoencoder import VAEDecode, VAEEncode

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture
def vae(tiny_model):
    return tiny_model.first_stage_model


def images(n, height, width):
    return np.random.default_rng(0).uniform(-1, 1, (n, 3, height, width)).astype(np.float32)


def test_encoding_gives_mean_and_log_variance_at_a_quarter_of_the_size(vae):
    moments = VAEEncode(vae)(Tensor(images(2, 16, 24)))
    assert moments.shape == (2, 8, 4, 6)


def test_decoding_gives_images(vae):
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 6)).astype(np.float32)
    assert VAEDecode(vae)(Tensor(latents)).shape == (2, 3, 16, 24)


def test_log_variance_is_not_clamped(vae):
    """Clamping is for who draws from it: moments are what the published quant_conv gives."""
    bias = np.zeros(8, np.float32)
    bias[4:] = 100.0
    vae.quant_conv.bias.set_data(Tensor(bias))
    moments = VAEEncode(vae)(Tensor(images(1, 8, 8))).asnumpy()
    assert moments[:, 4:].min() > 50 > np.abs(moments[:, :4]).max()


def test_the_graphs_share_the_networks_parameters(vae):
    own = {parameter.name for parameter in vae.get_parameters()}
    for graph in (VAEEncode(vae), VAEDecode(vae)):
        assert {parameter.name for parameter in graph.get_parameters()} == own
