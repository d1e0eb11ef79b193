"""Low-rank cells: the base's output plus scale * (alpha / rank) * up(down(x)), with factors that stay in fp32."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm.lora.layers import LoRAConv, LoRADense
from ldm.models.layers import Conv2d, Dense, set_compute_dtype

RANDOM = np.random.RandomState(0)
RANK = 3


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def lora_dense(alpha=6.0, scale=0.5, fp16=True, has_bias=True):
    base = Dense(7, 5, has_bias)
    cell = LoRADense(base, normal(RANK, 7), "net.layer", alpha, scale, fp16)
    return base, cell


def lora_conv(kernel=3, stride=1, padding=1, alpha=6.0, scale=0.5):
    base = Conv2d(4, 6, kernel, stride, padding)
    cell = LoRAConv(base, normal(RANK, 4, kernel, kernel), "net.layer", alpha, scale)
    return base, cell


def convolved(x, weight, stride, padding):
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    x = np.pad(x, ((0, 0), (0, 0), sides[:2], sides[2:]))
    k = weight.shape[2]
    height, width = (x.shape[2] - k) // stride + 1, (x.shape[3] - k) // stride + 1
    out = np.zeros((x.shape[0], weight.shape[0], height, width))
    for i in range(height):
        for j in range(width):
            patch = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, :, i, j] = np.einsum("ncab,ocab->no", patch, weight, dtype=np.float64)
    return out


class TestDense:
    @pytest.mark.parametrize("shape", [(2, 7), (2, 3, 7)])
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_is_the_base_at_the_start_bit_for_bit(self, shape, has_bias):
        base, cell = lora_dense(has_bias=has_bias)
        x = Tensor(normal(*shape))
        np.testing.assert_array_equal(cell(x).asnumpy(), base(x).asnumpy())

    def test_adds_the_scaled_product_of_the_factors(self):
        base, cell = lora_dense(alpha=6.0, scale=0.5)
        up = normal(5, RANK)
        cell.lora_up.weight.set_data(Tensor(up))
        x = normal(2, 3, 7)
        wanted = base(Tensor(x)).asnumpy() + 0.5 * 6.0 / RANK * (x @ cell.lora_down.weight.asnumpy().T @ up.T)
        np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), wanted, rtol=1e-5, atol=1e-5)

    def test_scale_zero_is_the_base_bit_for_bit(self):
        base, cell = lora_dense(scale=0.0)
        cell.lora_up.weight.set_data(Tensor(normal(5, RANK)))
        x = Tensor(normal(4, 7))
        np.testing.assert_array_equal(cell(x).asnumpy(), base(x).asnumpy())

    def test_shares_the_bases_parameters(self):
        base, cell = lora_dense()
        assert cell.weight is base.weight and cell.bias is base.bias
        assert (cell.rank, cell.alpha, cell.scale) == (RANK, 6.0, 0.5)

    def test_names_its_factors_in_full(self):
        _, cell = lora_dense()
        names = {parameter.name for parameter in cell.get_parameters()}
        assert {"net.layer.lora_down.weight", "net.layer.lora_up.weight"} <= names


class TestConvolution:
    @pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (3, 2, (0, 1, 0, 1)), (1, 1, 0)])
    def test_adds_a_convolution_of_the_same_geometry(self, kernel, stride, padding):
        base, cell = lora_conv(kernel, stride, padding)
        x = normal(2, 4, 6, 6)
        np.testing.assert_array_equal(cell(Tensor(x)).asnumpy(), base(Tensor(x)).asnumpy())
        up = normal(6, RANK, 1, 1)
        cell.lora_up.weight.set_data(Tensor(up))
        low = convolved(x, cell.lora_down.weight.asnumpy(), stride, padding)
        wanted = base(Tensor(x)).asnumpy() + 0.5 * 6.0 / RANK * np.einsum("nrhw,or->nohw", low, up[:, :, 0, 0])
        np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), wanted, rtol=1e-4, atol=1e-4)


class TestPrecision:
    @pytest.mark.parametrize("make", [lora_dense, lora_conv])
    def test_factors_stay_fp32_where_the_layer_computes_in_fp16(self, make):
        _, cell = make()
        set_compute_dtype(cell, ms.float16)
        x = Tensor(normal(2, 7) if make is lora_dense else normal(1, 4, 6, 6))
        assert cell(x).dtype == ms.float16
        assert cell.lora_down.weight.dtype == cell.lora_up.weight.dtype == ms.float32

    def test_fp16_is_a_choice(self):
        x = Tensor(normal(64, 7))
        up = Tensor(normal(5, RANK))
        outputs = {}
        for fp16 in (True, False):
            base, cell = lora_dense(fp16=fp16)
            base.weight.set_data(Tensor(np.zeros((5, 7), np.float32)))
            base.bias.set_data(Tensor(np.zeros(5, np.float32)))
            cell.lora_down.weight.set_data(Tensor(np.full((RANK, 7), 1 / 3, np.float32)))
            cell.lora_up.weight.set_data(up)
            set_compute_dtype(cell, ms.float16)
            outputs[fp16] = cell(x).asnumpy()
        exact = x.asnumpy() @ np.full((7, RANK), 1 / 3) @ up.asnumpy().T
        errors = {fp16: np.abs(output - exact).max() for fp16, output in outputs.items()}
        assert errors[False] < errors[True] < 0.05

    def test_gradients_are_fp32_in_an_fp16_layer(self):
        _, cell = lora_dense()
        set_compute_dtype(cell, ms.float16)
        cell.lora_up.weight.set_data(Tensor(normal(5, RANK)))

        class Loss(nn.Cell):
            def __init__(self, net):
                super().__init__(auto_prefix=False)
                self.net, self.mean = net, ops.ReduceMean()

            def construct(self, x):
                return self.mean(self.net(x).astype(ms.float32))

        weights = ms.ParameterTuple([cell.lora_down.weight, cell.lora_up.weight])

        class Gradient(nn.Cell):
            def __init__(self, loss):
                super().__init__(auto_prefix=False)
                self.loss, self.grad = loss, ops.GradOperation(get_by_list=True)
                self.weights = weights

            def construct(self, x):
                return self.grad(self.loss, self.weights)(x)

        gradients = Gradient(Loss(cell))(Tensor(normal(4, 7)))
        assert [gradient.dtype for gradient in gradients] == [ms.float32, ms.float32]
        assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)
