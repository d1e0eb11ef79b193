"""The forms of the CPU and of Ascend: chosen by the device in one place, the same formulas and derivatives."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm import ops as operators
from ldm.models.stable_diffusion import build_model
from ldm.ops import ascend, cpu
from ldm.settings.model import load_model_config
from tests.conftest import ROOT
from tests.ops.ascend_stand_ins import build_as_on_ascend
from tests.ops.helpers import WithArguments, needs_compiler, normal

pytestmark = pytest.mark.usefixtures("graph_mode")

erf = np.vectorize(math.erf)

EPS = 1e-2  # of the norms: so far above the usual 1e-5 that a form which takes 1e-5 is found wrong


@pytest.fixture(params=["CPU", "Ascend"])
def device(request, monkeypatch):
    """Networks are built as for this device; they run on the CPU, with stand-ins for kernels of Ascend alone."""
    if request.param == "Ascend":
        with build_as_on_ascend(monkeypatch):
            yield request.param
    else:
        yield request.param


def value_and_gradients(form, *inputs, weight):
    """form(*inputs), and the gradients of sum(form(*inputs) * weight) by every input, in graph mode."""

    class Weighted(nn.Cell):
        def __init__(self):
            super().__init__()
            self.form, self.weight, self.sum = form, Tensor(weight), ops.ReduceSum()

        def construct(self, *xs):
            y = self.form(*xs)
            return self.sum(y * self.weight), y

    step = ms.value_and_grad(Weighted(), grad_position=tuple(range(len(inputs))), has_aux=True)
    (_, y), found = step(*(Tensor(x) for x in inputs))
    return y.asnumpy(), [gradient.asnumpy() for gradient in (found if isinstance(found, tuple) else (found,))]


def test_row_bias():
    x, bias, weight = normal(7, 5), normal(5, seed=1), normal(7, 5, seed=2)
    y, (by_x, by_bias) = value_and_gradients(operators.add_row_bias(), x, bias, weight=weight)
    np.testing.assert_array_equal(y, x + bias)
    np.testing.assert_array_equal(by_x, weight)
    np.testing.assert_allclose(by_bias, weight.sum(0), atol=1e-5)


def test_channel_bias():
    x, bias, weight = normal(2, 5, 3, 4), normal(5, seed=1), normal(2, 5, 3, 4, seed=2)
    y, (by_x, by_bias) = value_and_gradients(operators.add_channel_bias(), x, bias, weight=weight)
    np.testing.assert_array_equal(y, x + bias.reshape(5, 1, 1))
    np.testing.assert_array_equal(by_x, weight)
    np.testing.assert_allclose(by_bias, weight.sum((0, 2, 3)), atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("cell, shape", [(cpu.AddRowBias, (300, 321)), (cpu.AddChannelBias, (2, 5, 96, 97))])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kernels_add_biases_as_mindspore_does(cell, shape, dtype):
    """Bit for bit, in vectors and what is left over, in one thread and in several."""
    x, bias = normal(*shape).astype(dtype), normal(shape[1], seed=1)
    by_kernel, by_mindspore = (cell(in_vectors)(Tensor(x), Tensor(bias)).asnumpy() for in_vectors in (True, False))
    assert by_kernel.dtype == dtype
    np.testing.assert_array_equal(by_kernel, by_mindspore)


def test_broadcast_add(device):
    x, shift, weight = normal(2, 5, 3, 4), normal(2, 5, 1, 1, seed=1), normal(2, 5, 3, 4, seed=2)
    y, (by_x, by_shift) = value_and_gradients(operators.broadcast_add(), x, shift, weight=weight)
    np.testing.assert_array_equal(y, x + shift)
    np.testing.assert_array_equal(by_x, weight)
    np.testing.assert_allclose(by_shift, weight.sum((2, 3), keepdims=True), atol=1e-5)


@pytest.mark.parametrize("images, channels, size, kernel, padding", [
    (2, (6, 4), (5, 6), 3, 1),
    (4, (17, 18), (8, 8), 3, 1),  # the fewest pixels that Winograd's form takes
    (4, (32, 20), (16, 17), 3, 1),  # shared out among threads by channels too
    (1, (17, 16), (33, 35), 3, 1),
    (2, (16, 18), (63, 60), 3, 1),  # shared out by pixels alone
    (2, (16, 3), (32, 32), 3, 1),  # few channels
    (1024, (16, 16), (1, 1), 3, 1),
    (1, (3, 4), (6, 5), 5, 1),
    (1, (2, 3), (4, 4), 3, 2),
    (2, (3, 40), (4, 5), 3, 1),  # a weight larger than the image
])  # fmt: skip
def test_convolution(device, images, channels, size, kernel, padding):
    """Against sums of shifted products, and their gradients."""
    x, kernels = normal(images, channels[0], *size), normal(channels[1], channels[0], kernel, kernel, seed=1)
    height, width = (side + 2 * padding - kernel + 1 for side in size)
    weight = normal(images, channels[1], height, width, seed=2)
    form = WithArguments(operators.conv2d(channels[1], kernel, 1, padding, has_bias=False), None, ms.float32)
    y, (by_x, by_kernels) = value_and_gradients(form, x, kernels, weight=weight)

    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    expected, by_padded, by_expected = np.zeros_like(y), np.zeros_like(padded), np.zeros_like(kernels)
    for i in range(kernel):
        for j in range(kernel):
            part = np.s_[:, :, i : i + height, j : j + width]
            expected += np.einsum("nihw,oi->nohw", padded[part], kernels[:, :, i, j])
            by_padded[part] += np.einsum("nohw,oi->nihw", weight, kernels[:, :, i, j])
            by_expected[:, :, i, j] = np.einsum("nohw,nihw->oi", weight, padded[part])
    by_expected_x = by_padded[:, :, padding : padding + size[0], padding : padding + size[1]]
    for ours, theirs in ((y, expected), (by_x, by_expected_x), (by_kernels, by_expected)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (2, 0, 1, 3)], ids=str)
def test_a_strided_convolution_pads_each_side_as_it_is_told(device, sides):
    """The autoencoder's encoder pads at the bottom and right only."""
    x, kernels = normal(2, 3, 6, 7), normal(4, 3, 3, 3, seed=1)
    top, bottom, left, right = sides
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    expected = np.einsum("nihwab,oiab->nohw", windows, kernels)
    weight = normal(*expected.shape, seed=2)
    form = WithArguments(operators.conv2d(4, 3, 2, sides, has_bias=False), None, ms.float32)
    y, (_, by_kernels) = value_and_gradients(form, x, kernels, weight=weight)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(by_kernels, np.einsum("nihwab,nohw->oiab", windows, weight), atol=1e-4)


def test_linear_and_convolution_have_the_gradients_of_their_bias(device):
    x, weight, bias, dy = normal(6, 5), normal(4, 5, seed=1), normal(4, seed=2), normal(6, 4, seed=3)
    y, found = value_and_gradients(
        WithArguments(operators.linear(has_bias=True), ms.float32), x, weight, bias, weight=dy
    )
    np.testing.assert_allclose(y, x @ weight.T + bias, atol=1e-5)
    for ours, expected in zip(found, (dy @ weight, dy.T @ x, dy.sum(0))):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    image, dy = x.T.reshape(1, 5, 2, 3), dy.T.reshape(1, 4, 2, 3)
    form = WithArguments(operators.conv2d(4, 1, 1, 0, has_bias=True), ms.float32)
    y, found = value_and_gradients(form, image, weight[:, :, None, None], bias, weight=dy)
    np.testing.assert_allclose(y.reshape(4, 6).T, x @ weight.T + bias, atol=1e-5)
    np.testing.assert_allclose(found[2], dy.sum((0, 2, 3)), atol=1e-5)


def test_the_gradients_of_a_forks_readers_are_added(device):
    x, weight = normal(3, 4), normal(3, 4, seed=1)

    class TwoReaders(nn.Cell):
        def __init__(self):
            super().__init__()
            self.fork = operators.fork()

        def construct(self, x):
            first, second = self.fork(x)
            return first * first + 3 * second

    y, (by_x,) = value_and_gradients(TwoReaders(), x, weight=weight)
    np.testing.assert_allclose(y, x * x + 3 * x, atol=1e-6)
    np.testing.assert_allclose(by_x, weight * (2 * x + 3), atol=1e-6)


@pytest.mark.parametrize("shape", [(9,), (9, 4)], ids=["numbers", "rows"])
@pytest.mark.parametrize("index", [[2, 0, 2], [[8, 1, 1], [0, 3, 5]]], ids=["a row", "rows of tokens"])
def test_rows_of_a_table_and_their_gradients(device, shape, index):
    table, index = normal(*shape), np.array(index, np.int32)
    weight = normal(*index.shape, *shape[1:], seed=1)
    y, (by_table,) = value_and_gradients(WithArguments(operators.take_rows(), Tensor(index)), table, weight=weight)
    np.testing.assert_array_equal(y, table[index])
    expected = np.zeros_like(table)
    np.add.at(expected, index, weight)
    np.testing.assert_allclose(by_table, expected, atol=1e-6)


def test_the_mean_of_all_elements(device):
    x = normal(2, 3, 4, 5) + 100
    y, (by_x,) = value_and_gradients(operators.mean(), x, weight=np.float32(3.0))
    assert y.shape == ()
    np.testing.assert_allclose(y, x.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(by_x, np.full_like(x, 3 / 120), rtol=1e-6)


def test_the_mean_of_each_row(device):
    x = normal(3, 2, 4, 5) + 100
    y, (by_x,) = value_and_gradients(operators.row_means(), x, weight=np.array([3.0, 0.0, 1.0], np.float32))
    np.testing.assert_allclose(y, x.mean((1, 2, 3), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(by_x, np.full_like(x, 1 / 40) * np.reshape([3, 0, 1], (3, 1, 1, 1)), rtol=1e-6)


def test_upsampling_and_its_derivative(device):
    x, weight = normal(2, 3, 4, 5), normal(2, 3, 8, 10, seed=1)
    y, (by_x,) = value_and_gradients(operators.upsample2x(), x, weight=weight)
    np.testing.assert_array_equal(y, x.repeat(2, axis=2).repeat(2, axis=3))
    np.testing.assert_allclose(by_x, weight.reshape(2, 3, 4, 2, 5, 2).sum((3, 5)), atol=1e-6)


def test_gelu_is_the_exact_form(device):
    """The form in tanh differs by up to 5e-4."""
    x, weight = np.linspace(-6, 6, 101, dtype=np.float32), normal(101)
    wide = x.astype(np.float64)
    cumulative = (1 + erf(wide / math.sqrt(2))) / 2
    density = np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    y, (by_x,) = value_and_gradients(operators.gelu(), x, weight=weight)
    np.testing.assert_allclose(y, wide * cumulative, atol=1e-6)
    np.testing.assert_allclose(by_x, weight * (cumulative + wide * density), atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("form, shape, shape_y", [
    ("silu", (4, 6), (4, 6)), ("gelu", (4, 6), (4, 6)), ("gelu_gate", (4, 6), (4, 3)),
    ("swap_middle_axes", (2, 3, 4, 5), (2, 4, 3, 5)),
])  # fmt: skip
def test_fp16_stays_fp16(form, shape, shape_y):
    form, x, weight = getattr(operators, form)(), normal(*shape), normal(*shape_y, seed=1)
    expected, (by_expected,) = value_and_gradients(form, x, weight=weight)
    y, (by_x,) = value_and_gradients(form, x.astype(np.float16), weight=weight.astype(np.float16))
    assert y.dtype == by_x.dtype == np.float16
    np.testing.assert_allclose(y, expected, atol=5e-3)
    np.testing.assert_allclose(by_x, by_expected, atol=1e-2)


@needs_compiler
def test_convolution_in_fp16():
    x, kernels = normal(1, 16, 32, 32), normal(16, 16, 3, 3, seed=1) / 12
    conv, weight = operators.conv2d(16, 3, 1, 1, has_bias=False), normal(1, 16, 32, 32, seed=2)
    expected = value_and_gradients(WithArguments(conv, None, ms.float32), x, kernels, weight=weight)
    y, found = value_and_gradients(
        WithArguments(conv, None, ms.float16),
        *(given.astype(np.float16) for given in (x, kernels)),
        weight=weight.astype(np.float16),
    )
    assert y.dtype == found[0].dtype == np.float16
    np.testing.assert_allclose(y, expected[0], atol=2e-2)
    np.testing.assert_allclose(found[0], expected[1][0], atol=2e-2)


def test_gelu_gate(device):
    x, weight = 3 * normal(6, 10), normal(6, 5, seed=1)

    def plain(x):
        value, gate = np.split(x, 2, axis=-1)
        return value * gate * (1 + erf(gate / math.sqrt(2))) / 2

    y, (by_x,) = value_and_gradients(operators.gelu_gate(), x, weight=weight)
    np.testing.assert_allclose(y, plain(x.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(by_x, by_differences(plain, (x,), weight)[0], atol=1e-4)


def plain_norm(x, weight, bias, groups):
    """Normalisation of (N, C, ...) in groups of channels, in float64; its gradients come from differences."""
    n, c = x.shape[:2]
    rows = x.astype(np.float64).reshape(n, groups, -1)
    y = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + EPS)
    spread = (1, c) + (1,) * (x.ndim - 2)
    return y.reshape(x.shape) * weight.reshape(spread) + bias.reshape(spread)


def by_differences(function, inputs, weight, step=1e-5):
    """Gradients of sum(function(*inputs) * weight), by central differences in float64."""
    inputs = [x.astype(np.float64) for x in inputs]
    found = []
    for x in inputs:
        gradient = np.empty_like(x)
        for place in np.ndindex(x.shape):
            kept, ends = x[place], []
            for shift in (step, -step):
                x[place] = kept + shift
                ends.append((function(*inputs) * weight).sum())
            x[place] = kept
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient)
    return found


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 3, 5, 1)], ids=str)
def test_group_norm(device, shape):
    """Far from zero, where a variance by E[x^2] - E[x]^2 would have lost its digits."""
    groups = 3
    x, bias, weight = 2 * normal(*shape) + 300, normal(shape[1], seed=1), normal(*shape, seed=2)
    scale = 1 + 0.3 * normal(shape[1], seed=3)
    y, found = value_and_gradients(
        WithArguments(operators.group_norm(groups, EPS), ms.float32), x, scale, bias, weight=weight
    )
    np.testing.assert_allclose(y, plain_norm(x, scale, bias, groups), atol=2e-4)
    expected = by_differences(lambda *xs: plain_norm(*xs, groups), (x, scale, bias), weight)
    for ours, plain in zip(found, expected):
        np.testing.assert_allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("size", [512, 51], ids=["a million", "10,404"])
def test_group_norm_of_a_large_image_is_as_exact_as_of_a_small_one(size):
    """A sum of a million squares, one after the other in fp32, would be off by 2e-5."""
    x, ones, zeros = normal(1, 4, size, size) + 0.5, np.ones(4, np.float32), np.zeros(4, np.float32)
    norm = WithArguments(operators.group_norm(1, 1e-6), ms.float32)
    y = norm(Tensor(x), Tensor(ones), Tensor(zeros)).asnumpy()
    expected = (x - x.mean(dtype=np.float64)) / np.sqrt(x.var(dtype=np.float64) + 1e-6)
    assert np.abs(y - expected).max() < 3e-6


@pytest.mark.parametrize("shape", [(5, 8), (1, 3)], ids=str)
def test_layer_norm(device, shape):
    x, bias, weight = 2 * normal(*shape) + 300, normal(shape[1], seed=1), normal(*shape, seed=2)
    scale = 1 + 0.3 * normal(shape[1], seed=3)

    def plain(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * scale + bias

    y, found = value_and_gradients(WithArguments(operators.layer_norm(EPS), ms.float32), x, scale, bias, weight=weight)
    np.testing.assert_allclose(y, plain(x.astype(np.float64), scale, bias), atol=2e-4)
    for ours, expected in zip(found, by_differences(plain, (x, scale, bias), weight)):
        np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 7, 2), (3, 4, 1, 1)], ids=str)
def test_swap_middle_axes(device, shape):
    x = normal(*shape)
    weight = normal(shape[0], shape[2], shape[1], shape[3], seed=1)
    y, (by_x,) = value_and_gradients(operators.swap_middle_axes(), x, weight=weight)
    np.testing.assert_array_equal(y, x.swapaxes(1, 2))
    np.testing.assert_array_equal(by_x, weight.swapaxes(1, 2))


def test_layers_that_want_the_same_form_share_a_cell(device):
    assert operators.layer_norm(1e-5) is operators.layer_norm(1e-5)
    assert operators.layer_norm(1e-5) is not operators.layer_norm(1e-6)
    assert operators.gelu() is operators.gelu()


def test_a_shared_cell_holds_no_parameters():
    np.random.seed(3)
    model = build_model(load_model_config(ROOT / "tests" / "tiny.yaml"))
    owners = {}
    for _, cell in model.cells_and_names():
        for child in cell.cells():
            owners.setdefault(id(child), (child, set()))[1].add(id(cell))
    shared = [cell for cell, parents in owners.values() if len(parents) > 1]
    assert len(shared) > 5
    assert not [cell for cell in shared if list(cell.get_parameters())]


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_a_cell_used_twice_has_the_derivatives_of_both_uses(mode, device):
    """A layer_norm of what it has normalised, with the same weights."""
    ms.set_context(mode=mode)
    norm, x = WithArguments(operators.layer_norm(1e-5), ms.float32), normal(3, 8)
    scale, shift, weight = normal(8, seed=1), normal(8, seed=2), normal(3, 8, seed=3)

    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def construct(self, x, scale, shift):
            return self.norm(self.norm(x, scale, shift), scale, shift)

    def plain(x, scale, shift):
        for _ in range(2):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift
        return x

    _, found = value_and_gradients(Twice(), x, scale, shift, weight=weight)
    for ours, expected in zip(found, by_differences(plain, (x, scale, shift), weight)):
        np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("kernel, form, shapes, result", [
    ("Dense", lambda: operators.linear(True), [(2, 4), (3, 4), (3,)], (2, 3)),
    ("Conv2DExt", lambda: operators.conv2d(4, 1, 1, 0, True), [(1, 2, 3, 3), (4, 2, 1, 1), (4,)], (1, 4, 3, 3)),
    ("group_norm", lambda: operators.group_norm(2, EPS), [(1, 4, 2, 2), (4,), (4,)], (1, 4, 2, 2)),
    ("layer_norm", lambda: operators.layer_norm(EPS), [(2, 4), (4,), (4,)], (2, 4)),
])  # fmt: skip
def test_a_kernel_of_ascend_gets_all_tensors_in_the_type_of_the_result(monkeypatch, kernel, form, shapes, result):
    """Trained parameters and some inputs are fp32 where the networks compute in fp16."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    types = []

    def record(*arguments):
        types.extend(argument.dtype for argument in arguments if isinstance(argument, Tensor))
        return Tensor(np.zeros(result, np.float16))

    with build_as_on_ascend(monkeypatch):
        if kernel == "group_norm":
            monkeypatch.setattr(ascend.ops, kernel, record)
        else:
            monkeypatch.setattr(ascend, kernel, record if kernel == "layer_norm" else lambda: record)
        form()(*(Tensor(normal(*shape)) for shape in shapes), ms.float16)
    assert types == [ms.float16] * 3


def build_tiny_model():
    np.random.seed(3)
    return build_model(load_model_config(ROOT / "tests" / "tiny.yaml"))


@needs_compiler
def test_a_network_has_the_forms_of_its_device_and_the_same_output(monkeypatch):
    inputs = Tensor(normal(1, 4, 8, 8)), Tensor(np.array([500], np.int32)), Tensor(normal(1, 77, 32, seed=1))
    of_cpu = build_tiny_model()
    expected = of_cpu.model.diffusion_model(*inputs).asnumpy()
    with build_as_on_ascend(monkeypatch):
        of_ascend = build_tiny_model()
        found = of_ascend.model.diffusion_model(*inputs).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    def modules(model):
        return {type(cell).__module__ for _, cell in model.cells_and_names()}

    assert cpu.__name__ in modules(of_cpu) and ascend.__name__ not in modules(of_cpu)
    assert ascend.__name__ in modules(of_ascend) and cpu.__name__ not in modules(of_ascend)


@pytest.mark.parametrize("target, expected", [("CPU", False), ("Ascend", True)])
def test_the_device_is_mindspores_target(monkeypatch, target, expected):
    monkeypatch.setattr(operators.ms, "get_context", {"device_target": target}.get)
    assert operators.on_ascend() is expected
