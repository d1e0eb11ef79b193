"""The UNet: its shapes, what its output depends on, and fp16 against fp32. Its numbers are in test_golden.py."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.models.layers import set_compute_dtype
from ldm.models.unet import TimestepBlock, TimestepEmbedding
from tests.named_weights import relative_error
from tests.network_cases import inputs_for, model_with_named_weights, run_network

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module")
def given(tiny_config):
    return inputs_for(tiny_config, batch=2, height=8, width=4)


@pytest.fixture(scope="module")
def model(tiny_config):
    ms.set_context(mode=ms.GRAPH_MODE)
    return model_with_named_weights(tiny_config)


@pytest.fixture(scope="module")
def answer(model, given):
    return run_network(model, "unet", given)


def test_time_steps_become_cosines_then_sines_of_falling_frequency():
    found = TimestepEmbedding(8)(Tensor([0, 10], ms.int32)).asnumpy()
    angles = 10 * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(found[0], [1, 1, 1, 1, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-5)


def test_output_has_the_latents_shape_in_fp32(given, answer):
    assert answer.shape == given["latents"].shape and answer.dtype == np.float32


def test_each_image_has_its_own_time_step_and_text(model, given, answer):
    """The second image's latents, time step and text leave the first image's answer alone."""
    for name in ("latents", "timesteps", "context"):
        changed = {**given, name: given[name].copy()}
        changed[name][1] = changed[name][1] // 2
        found = run_network(model, "unet", changed)
        np.testing.assert_allclose(found[0], answer[0], atol=1e-6)
        assert np.abs(found[1] - answer[1]).max() > 1e-3, f"{name} changes nothing"


def test_a_context_for_another_number_of_images_is_refused(model, given):
    """Twice as many texts would else be twice as many tokens for each image."""
    with pytest.raises((ValueError, RuntimeError), match="(?i)shape"):
        run_network(model, "unet", {**given, "context": np.concatenate([given["context"]] * 2)})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_block_runs_all_its_members(count):
    class Scaled(nn.Cell):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def construct(self, x, emb, context):
            return x * self.factor + emb + context

    block = TimestepBlock(*(Scaled(2.0 + i) for i in range(count)))
    found = block(Tensor(1.0), Tensor(0.25), Tensor(0.5)).asnumpy()
    expected = 1.0
    for i in range(count):
        expected = expected * (2 + i) + 0.75
    assert found == expected


def test_fp16_is_near_fp32(tiny_config, given, answer):
    model = model_with_named_weights(tiny_config)
    set_compute_dtype(model, ms.float16)
    found = run_network(model, "unet", given)
    assert found.dtype == np.float32
    assert 1e-6 < relative_error(found, answer) < 2e-2
