"""Layers: the published formulas, and what stays in fp32 when the network computes in fp16."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.models import layers
from ldm.models.layers import (
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    QuickGELU,
    hold_frozen_weights,
    set_compute_dtype,
)
from ldm.ops import RepeatedCell, graph, silu, upsample2x
from ldm.weights.arrays import to_bfloat16, widen

pytestmark = pytest.mark.usefixtures("graph_mode")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TestForward:
    def test_linear_is_x_times_weight_transposed_plus_bias(self):
        linear, x = Linear(6, 4), normal(2, 3, 6)
        expected = x @ linear.weight.asnumpy().T + linear.bias.asnumpy()
        np.testing.assert_allclose(linear(Tensor(x)).asnumpy(), expected, atol=1e-6)

    @pytest.mark.parametrize(
        "cell, formula",
        [
            (QuickGELU(), lambda x: x / (1 + np.exp(-1.702 * x))),
            (silu(), lambda x: x / (1 + np.exp(-x))),
        ],
    )
    def test_activation(self, cell, formula):
        x = np.linspace(-6, 6, 101, dtype=np.float32)
        np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), formula(x.astype(np.float64)), atol=1e-6)

    def test_group_norm_normalises_each_group_of_channels(self):
        norm, x = GroupNorm(8, num_groups=4, eps=1e-5), 3 + 2 * normal(2, 8, 3, 5)
        groups = x.astype(np.float64).reshape(2, 4, -1)
        expected = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(norm(Tensor(x)).asnumpy(), expected.reshape(x.shape), atol=1e-5)

    def test_layer_norm_normalises_the_last_axis(self):
        norm, x = LayerNorm(8), 3 + 2 * normal(2, 3, 8)
        wide = x.astype(np.float64)
        expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(norm(Tensor(x)).asnumpy(), expected, atol=1e-5)

    def test_upsampling_repeats_each_pixel_in_both_directions(self):
        x = normal(2, 3, 4, 5)
        np.testing.assert_array_equal(upsample2x()(Tensor(x)).asnumpy(), x.repeat(2, axis=2).repeat(2, axis=3))

    def test_convolution_pads_where_it_is_told(self):
        conv = Conv2d(1, 1, 3, stride=2, padding=(0, 1, 0, 1))
        conv.weight.set_data(Tensor(np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)))
        conv.bias.set_data(Tensor(np.zeros(1, np.float32)))
        x = normal(1, 1, 4, 4)
        padded = np.pad(x[0, 0], ((0, 1), (0, 1)))
        expected = [[(padded[i : i + 3, j : j + 3] * np.arange(9).reshape(3, 3)).sum() for j in (0, 2)] for i in (0, 2)]
        np.testing.assert_allclose(conv(Tensor(x)).asnumpy()[0, 0], expected, rtol=1e-5)


class TestHalfPrecision:
    def half(self, cell):
        set_compute_dtype(cell, ms.float16)
        return cell

    @pytest.mark.parametrize("make, shape", [(lambda: Linear(6, 4), (3, 6)), (lambda: Conv2d(6, 4, 3), (1, 6, 5, 5))])
    def test_products_compute_in_fp16_with_fp32_parameters(self, make, shape):
        cell, x = self.half(make()), normal(*shape)
        assert cell.weight.dtype == cell.bias.dtype == ms.float32
        assert cell(Tensor(x)).dtype == ms.float16

    @pytest.mark.parametrize(
        "make, shape",
        [
            (lambda: GroupNorm(8, num_groups=2), (1, 8, 4, 4)),
            (lambda: LayerNorm(8), (4, 8)),
        ],
    )
    def test_norms_compute_in_fp32_and_hand_on_fp16(self, make, shape):
        # Squares of these overflow fp16 (65504): in fp16 the result would be 0 or not a number.
        x = (1000 * normal(*shape)).astype(np.float16)
        expected = make()(Tensor(x.astype(np.float32))).asnumpy()
        found = self.half(make())(Tensor(x))
        assert found.dtype == ms.float16
        np.testing.assert_allclose(found.asnumpy(), expected, atol=2e-3)

    @pytest.mark.parametrize(
        "make, shape",
        [
            (lambda: GroupNorm(8, num_groups=2), (1, 8, 1, 1)),
            (lambda: LayerNorm(8), (1, 8)),
        ],
    )
    def test_norms_apply_their_parameters_in_fp32(self, make, shape):
        """Weights and biases of 100,000, infinite in fp16, that cancel."""
        cell, signs = self.half(make()), np.float32([1, -1] * 4)
        cell.weight.set_data(Tensor(np.full(8, 1e5, np.float32)))
        cell.bias.set_data(Tensor(-1e5 * signs))
        found = cell(Tensor((1000 * signs).reshape(shape).astype(np.float16))).asnumpy()
        np.testing.assert_allclose(found, 0, atol=0.1)

    def test_the_type_reaches_every_layer(self, tiny_model):
        set_compute_dtype(tiny_model, ms.float16)
        types = {cell.dtype for _, cell in tiny_model.cells_and_names() if hasattr(cell, "dtype")}
        assert types == {ms.float16}


class TestRepeatedCell:
    @pytest.fixture
    def cell(self):
        class Outer(RepeatedCell):
            def __init__(self):
                super().__init__()
                self.inner = silu()

            def construct(self, x: Tensor) -> Tensor:
                return self.inner(x)

        return Outer()

    def test_writes_the_graphs_name_into_the_cells_below_once(self, cell):
        cell(Tensor(normal(2, 3)))
        name = cell.inner.compile_phase
        assert name == cell.compile_phase
        cell.inner.compile_phase = "as it was left"
        cell(Tensor(normal(2, 3, seed=1)))
        assert cell.inner.compile_phase == "as it was left"

    def test_gives_back_memory_after_compiling_and_only_then(self, cell, monkeypatch):
        given = []
        monkeypatch.setattr(graph, "give_back_memory", lambda: given.append(len(given)))
        for shape in ((2, 3), (2, 3), (4, 3), (2, 3)):
            cell(Tensor(normal(*shape)))
        assert given == [0, 1]

    def test_and_again_for_another_graph(self, cell):
        """Each shape is a graph."""
        found = [cell(Tensor(normal(*shape))).asnumpy() for shape in ((2, 3), (4, 3), (2, 3))]
        assert [y.shape for y in found] == [(2, 3), (4, 3), (2, 3)]
        np.testing.assert_array_equal(found[0], found[2])
        assert cell.inner.compile_phase == cell.compile_phase != ""


class Block(nn.Cell):
    """A layer of each kind, the norms not at their first values."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.trained = GroupNorm(4, 2), Conv2d(4, 6, 3, padding=1), Conv2d(6, 4, 1)
        self.layer_norm, self.linear = LayerNorm(5), Linear(5, 3)
        self.norm.weight.set_data(Tensor(1 + 0.3 * normal(4)))
        for parameter in self.get_parameters():
            parameter.requires_grad = parameter.name.startswith("trained")

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(self.trained(self.conv(self.norm(x)))))


class TestHoldFrozenWeights:
    @pytest.fixture
    def block(self):
        np.random.seed(3)
        block = Block()
        set_compute_dtype(block, ms.float16)
        return block

    def test_the_output_is_bit_for_bit_that_of_fp32_weights(self, block):
        np.random.seed(3)
        held = Block()
        set_compute_dtype(held, ms.float16)
        hold_frozen_weights(held, ms.float16)
        x = Tensor(normal(2, 4, 5, 5, seed=4))
        np.testing.assert_array_equal(held(x).asnumpy(), block(x).asnumpy())

    def test_frozen_linear_layers_and_convolutions_alone_are_held(self, block):
        assert hold_frozen_weights(block, ms.float16) == 4
        held = {parameter.name for parameter in block.get_parameters() if parameter.dtype == ms.float16}
        assert held == {"conv.weight", "conv.bias", "linear.weight", "linear.bias"}

    def test_in_bf16_weights_alone_are_held_and_layers_go_on_in_fp32(self):
        np.random.seed(3)
        block, held = Block(), Block()
        x = Tensor(normal(2, 4, 5, 5, seed=4))
        set_compute_dtype(held, ms.bfloat16)
        assert held.linear.dtype == ms.float32
        weights = {name: getattr(block, name).weight.asnumpy() for name in ("conv", "linear")}
        for name, weight in weights.items():
            getattr(held, name).weight.set_data(Tensor(weight))
        for name in ("trained", "norm"):
            getattr(held, name).weight.set_data(getattr(block, name).weight)
        for name in ("conv", "trained", "linear"):
            getattr(held, name).bias.set_data(getattr(block, name).bias)
        assert hold_frozen_weights(held, ms.bfloat16) == 2
        assert {p.name for p in held.get_parameters() if p.dtype == ms.bfloat16} == {"conv.weight", "linear.weight"}
        for name, weight in weights.items():
            rounded = widen(to_bfloat16(weight))
            assert (rounded != weight).any()
            getattr(block, name).weight.set_data(Tensor(rounded))
            np.testing.assert_array_equal(getattr(held, name).weight.float().asnumpy(), rounded)
        found, expected = held(x), block(x).asnumpy()
        assert found.dtype == ms.float32
        # The factors of a product may be rounded to 8 bits, in a chain of three products and two norms.
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=0, atol=2e-2 * np.abs(expected).max())

    def test_bf16_takes_the_operators_for_it_where_the_weight_is_held_and_only_there(self, monkeypatch):
        made = []
        monkeypatch.setattr(layers, "linear", lambda *given, **more: made.append(("linear", given, more)))
        monkeypatch.setattr(layers, "conv2d", lambda *given, **more: made.append(("conv2d", given, more)))
        block = Block()
        made.clear()
        block.linear.keeps_fp32 = True
        assert hold_frozen_weights(block, ms.bfloat16) == 1
        assert made == [("conv2d", (6, 3, 1, 1, True), {"bf16_weight": True})]
        block.linear.keeps_fp32 = False
        assert hold_frozen_weights(block, ms.bfloat16) == 1
        assert made[-1] == ("linear", (True,), {"bf16_weight": True}) and block.trained.weight.dtype == ms.float32

    def test_norms_are_held_where_the_kernel_takes_one_type(self, block, monkeypatch):
        monkeypatch.setattr(layers, "on_ascend", lambda: True)
        assert hold_frozen_weights(block, ms.float16) == 8
        assert block.norm.weight.dtype == ms.float16 and block.trained.weight.dtype == ms.float32

    def test_layers_of_another_type_and_layers_whose_weight_others_read_stay(self, block):
        block.linear.dtype = ms.float32
        block.conv.keeps_fp32 = True
        assert hold_frozen_weights(block, ms.float16) == 0
