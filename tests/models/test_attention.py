"""The UNet's transformer, and the choice of its attention operator."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ldm.models.attention import CrossAttention, LinearSpatialTransformer, SpatialTransformer, set_attention
from ldm.ops.ascend import FlashAttention


def test_flash_attention_goes_into_the_unet_and_out_again(tiny_model):
    def kinds():
        return {type(layer.attention) for layer in layers}

    layers = [cell for _, cell in tiny_model.cells_and_names() if isinstance(cell, CrossAttention)]
    before = kinds()
    assert set_attention(tiny_model, flash=True) == len(layers) > 0
    assert kinds() == {FlashAttention}
    set_attention(tiny_model)
    assert kinds() == before


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("cell_type", [SpatialTransformer, LinearSpatialTransformer])
def test_a_transformer_of_zero_projection_hands_its_input_on(cell_type):
    cell = cell_type(32, num_heads=2, head_dim=16, depth=1, context_dim=24)
    for parameter in (cell.proj_out.weight, cell.proj_out.bias):
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    x = np.random.default_rng(0).standard_normal((2, 32, 3, 4)).astype(np.float32)
    found = cell(Tensor(x), Tensor(np.ones((2, 8), np.float32)), Tensor(np.ones((2 * 5, 24), np.float32)))
    np.testing.assert_array_equal(found.asnumpy(), x)
