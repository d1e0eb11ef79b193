"""Low-rank cells: the base's output plus scale * (alpha / rank) * up(down(x)), with factors that stay in fp32."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm.data.draws import draws
from ldm.lora.dropout import StepDropout, make_dropout_key, set_process
from ldm.lora.layers import HardLoRAConv2d, LoRAConv2d, LoRALinear
from ldm.models.layers import Conv2d, Linear, set_compute_dtype

RANDOM = np.random.RandomState(0)
RANK = 3


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


class Outputs(nn.Cell):
    """The outputs of several cells for the same input, in one graph."""

    def __init__(self, *cells):
        super().__init__(auto_prefix=False)
        self.cells_in_order = nn.CellList(list(cells), auto_prefix=False)

    def construct(self, x):
        outputs = ()
        for cell in self.cells_in_order:
            outputs += (cell(x),)
        return outputs

    def arrays(self, x):
        return [output.asnumpy() for output in self(Tensor(x))]


def lora_dense(alpha=6.0, scale=0.5, fp16=True, has_bias=True):
    base = Linear(7, 5, has_bias)
    cell = LoRALinear(base, normal(RANK, 7), "net.layer", alpha, scale, fp16)
    return base, cell


def lora_conv(kernel=3, stride=1, padding=1, alpha=6.0, scale=0.5):
    base = Conv2d(4, 6, kernel, stride, padding)
    cell = LoRAConv2d(base, normal(RANK, 4, kernel, kernel), "net.layer", alpha, scale)
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
        np.testing.assert_array_equal(*Outputs(cell, base).arrays(normal(*shape)))

    def test_adds_the_scaled_product_of_the_factors(self):
        base, cell = lora_dense(alpha=6.0, scale=0.5)
        up = normal(5, RANK)
        cell.lora_up.weight.set_data(Tensor(up))
        x = normal(2, 3, 7)
        found, base_output = Outputs(cell, base).arrays(x)
        wanted = base_output + 0.5 * 6.0 / RANK * (x @ cell.lora_down.weight.asnumpy().T @ up.T)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

    def test_scale_zero_is_the_base_bit_for_bit(self):
        base, cell = lora_dense(scale=0.0)
        cell.lora_up.weight.set_data(Tensor(normal(5, RANK)))
        np.testing.assert_array_equal(*Outputs(cell, base).arrays(normal(4, 7)))

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
        both = Outputs(cell, base)
        np.testing.assert_array_equal(*both.arrays(x))
        up = normal(6, RANK, 1, 1)
        cell.lora_up.weight.set_data(Tensor(up))
        found, base_output = both.arrays(x)
        low = convolved(x, cell.lora_down.weight.asnumpy(), stride, padding)
        wanted = base_output + 0.5 * 6.0 / RANK * np.einsum("nrhw,or->nohw", low, up[:, :, 0, 0])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


class TestPrecision:
    @pytest.mark.parametrize("make", [lora_dense, lora_conv])
    def test_factors_stay_fp32_where_the_layer_computes_in_fp16(self, make):
        _, cell = make()
        set_compute_dtype(cell, ms.float16)
        x = Tensor(normal(2, 7) if make is lora_dense else normal(1, 4, 6, 6))
        assert cell(x).dtype == ms.float16
        assert cell.lora_down.weight.dtype == cell.lora_up.weight.dtype == ms.float32

    def test_fp16_factors_give_the_same_where_the_layer_casts_them(self):
        """Not the hard convolution, whose sum is in fp32, nor `up` where a scale is multiplied into it first."""
        soft, hard = normal(RANK, 4, 1, 1), normal(RANK, 4)
        cells = {
            "convolution": LoRAConv2d(Conv2d(4, 6, 1), soft, "a", 6.0),
            "scale": LoRAConv2d(Conv2d(4, 6, 1), soft, "b", 6.0, trainable_scale=True),
            "fp32": LoRAConv2d(Conv2d(4, 6, 1), soft, "c", 6.0, fp16=False),
            "hard": HardLoRAConv2d(Conv2d(4, 6, 1), hard, "d", 6.0),
            "hard with scale": HardLoRAConv2d(Conv2d(4, 6, 1), hard, "e", 6.0, trainable_scale=True),
        }
        for cell in cells.values():
            assert cell.factors_cast_to(ms.float16) == []  # the layer computes in fp32 still
            cell.lora_up.weight.set_data(Tensor(normal(*cell.lora_up.weight.shape)))
            set_compute_dtype(cell, ms.float16)
        found = {
            kind: [factor.name.split(".")[1] for factor in cell.factors_cast_to(ms.float16)]
            for kind, cell in cells.items()
        }
        down, up = "lora_down", "lora_up"
        assert found == {"convolution": [down, up], "scale": [down], "fp32": [], "hard": [], "hard with scale": []}
        x = normal(2, 4, 5, 5)
        before = Outputs(*cells.values()).arrays(x)
        for cell in cells.values():
            for factor in cell.factors_cast_to(ms.float16):
                factor.set_dtype(ms.float16)
        for expected, output in zip(before, Outputs(*cells.values()).arrays(x)):
            np.testing.assert_array_equal(output, expected)

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


class Masked(nn.Cell):
    """The mask of a StepDropout over ones, and what it makes of an input."""

    def __init__(self, rate, name="net.layer", key=None):
        super().__init__(auto_prefix=False)
        self.key = make_dropout_key() if key is None else key
        self.dropout = StepDropout(rate, name, self.key)
        self.set_train()

    def construct(self, x):
        return self.dropout(x)

    def at(self, step, x):
        self.key.set_data(Tensor(draws(0, "lora_dropout", step).integers(-(2**31), 2**31, 2, dtype=np.int32)))
        return self(Tensor(x)).asnumpy()


class TestDropout:
    @pytest.mark.parametrize("shape", [(300, 200), (6, 50, 200), (3, 20, 25, 40)])
    def test_zeroes_the_share_and_lifts_the_rest(self, shape):
        y = Masked(0.3).at(1, np.ones(shape, np.float32))
        kept = y[y != 0]
        np.testing.assert_allclose(kept, 1 / 0.7, rtol=1e-6)
        # five standard deviations of so many coins
        assert abs(1 - len(kept) / y.size - 0.3) < 5 * np.sqrt(0.21 / y.size)

    def test_looks_like_independent_coins(self):
        net, x = Masked(0.5), np.ones((400, 300), np.float32)
        coins = [net.at(step, x) - 1.0 for step in range(3)]  # -1 or 1
        first = coins[0]
        limit = 5 / np.sqrt(first.size)
        assert abs((coins[0] * coins[1]).mean()) < limit and abs((coins[1] * coins[2]).mean()) < limit
        for axis in (0, 1):
            for distance in (1, 2, 3, 8, 64):
                assert abs((first * np.roll(first, distance, axis)).mean()) < limit, (axis, distance)
        # four corners of a rectangle: what is left of any mask made of rows and columns alone
        corners = first * np.roll(first, 1, 0) * np.roll(first, 1, 1) * np.roll(first, (1, 1), (0, 1))
        assert abs(corners.mean()) < limit
        for axis in (0, 1):  # no row and no column is dropped more than chance has it
            assert 0.8 < first.mean(axis=axis).std() * np.sqrt(first.shape[axis]) < 1.25

    def test_is_a_function_of_key_name_and_place(self):
        x = np.ones((40, 30), np.float32)
        key = make_dropout_key()
        one, same, other = Masked(0.5, "a", key), Masked(0.5, "a"), Masked(0.5, "b", key)
        first = one.at(1, x)
        np.testing.assert_array_equal(same.at(1, x), first)
        assert not np.array_equal(other.at(1, x), first)
        assert not np.array_equal(one.at(2, x), first)
        np.testing.assert_array_equal(one.at(1, x), first)

    @pytest.mark.parametrize("shape", [(2, 5, 30), (2, 4, 3, 5)])
    def test_processes_drop_what_one_process_drops_for_all_their_images(self, shape):
        whole = Masked(0.5).at(1, np.ones((2 * shape[0], *shape[1:]), np.float32))
        parts = []
        for process_index in range(2):
            net = Masked(0.5)
            set_process(net, process_index)
            parts.append(net.at(1, np.ones(shape, np.float32)))
        np.testing.assert_array_equal(np.concatenate(parts), whole)

    def test_outside_of_training_nothing_is_dropped(self):
        net, x = Masked(0.9), normal(5, 6)
        np.testing.assert_array_equal(net(Tensor(x)).asnumpy(), x)  # the key is zero
        net = Masked(0.9)
        net.set_train(False)
        np.testing.assert_array_equal(net.at(1, x), x)

    @pytest.mark.parametrize("kind", ["dense", "convolution"])
    def test_acts_on_the_updates_inputs_alone(self, kind):
        mask = Masked(0.5)
        if kind == "dense":
            base, x = Linear(7, 5), normal(4, 7)
            cell = LoRALinear(base, normal(RANK, 7), "net.layer", 1.0, dropout=mask.dropout)
            cell.lora_up.weight.set_data(Tensor(normal(5, RANK)))
        else:
            base, x = Conv2d(4, 6, 3, 1, 1), normal(2, 4, 6, 6)
            cell = LoRAConv2d(base, normal(RANK, 4, 3, 3), "net.layer", 1.0, dropout=mask.dropout)
            cell.lora_up.weight.set_data(Tensor(normal(6, RANK, 1, 1)))
        cell.set_train()
        both = Outputs(cell, base)
        whole, plain = both.arrays(x)
        seen = mask.at(1, x)
        assert 0.2 < (seen == 0).mean() < 0.8
        trained, _ = both.arrays(x)
        mask.key.set_data(Tensor(np.zeros(2, np.int32)))
        np.testing.assert_array_equal(both.arrays(x)[0], whole)
        found, seen_base = both.arrays(seen)
        wanted = plain + found - seen_base
        np.testing.assert_allclose(trained, wanted, rtol=0, atol=1e-4)
        assert not np.allclose(trained, whole, atol=1e-3)


class TestHardConvolution:
    @pytest.mark.parametrize("trainable_scale", [False, True])
    def test_computes_what_the_soft_one_does(self, trainable_scale):
        base, down, up = Conv2d(4, 6, 1), normal(RANK, 4), normal(6, RANK)
        hard = HardLoRAConv2d(base, down, "a", 6.0, 0.5, trainable_scale=trainable_scale)
        soft = LoRAConv2d(base, down[:, :, None, None], "b", 6.0, 0.5)
        outputs, x = Outputs(hard, base, soft), normal(2, 4, 5, 5)
        np.testing.assert_array_equal(*outputs.arrays(x)[:2])
        hard.lora_up.weight.set_data(Tensor(up))
        soft.lora_up.weight.set_data(Tensor(up[:, :, None, None]))
        hard_output, _, soft_output = outputs.arrays(x)
        np.testing.assert_allclose(hard_output, soft_output, rtol=1e-5, atol=1e-5)

    def test_scale_zero_is_the_base_bit_for_bit(self):
        base = Conv2d(4, 6, 1)
        cell = HardLoRAConv2d(base, normal(RANK, 4), "a", 6.0, 0.0)
        cell.lora_up.weight.set_data(Tensor(normal(6, RANK)))
        np.testing.assert_array_equal(*Outputs(cell, base).arrays(normal(2, 4, 5, 5)))


class TestTrainableScale:
    @pytest.mark.parametrize("kind", [LoRALinear, LoRAConv2d, HardLoRAConv2d])
    def test_starts_at_scale_and_multiplies_the_update(self, kind):
        if kind is LoRALinear:
            base, down, up, x = Linear(7, 5), normal(RANK, 7), normal(5, RANK), normal(4, 7)
        else:
            base, x = Conv2d(4, 6, 1), normal(2, 4, 5, 5)
            tail = () if kind is HardLoRAConv2d else (1, 1)
            down, up = normal(RANK, 4, *tail), normal(6, RANK, *tail)
        fixed, trained = kind(base, down, "a", 6.0, 0.5), kind(base, down, "b", 6.0, 0.5, trainable_scale=True)
        for cell in (fixed, trained):
            cell.lora_up.weight.set_data(Tensor(up))
        assert trained.lora_scale.name == "b.lora_scale" and trained.lora_scale.shape == (1,)
        outputs = Outputs(base, fixed, trained)
        plain, at_fixed, at_trained = outputs.arrays(x)
        np.testing.assert_allclose(at_trained, at_fixed, rtol=1e-5, atol=1e-5)
        trained.lora_scale.set_data(Tensor(np.array([-1.0], np.float32)))
        np.testing.assert_allclose(outputs.arrays(x)[2] - plain, -2 * (at_fixed - plain), rtol=1e-4, atol=1e-4)
