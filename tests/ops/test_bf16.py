"""Products with weights in bf16: what they round, their gradients, and that nothing else differs from fp32."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from ldm import ops as operators
from ldm.ops import cpu
from ldm.ops.cpu.library import multiplies_bf16
from ldm.weights.arrays import to_bfloat16, widen
from tests.ops.helpers import needs_compiler, normal

pytestmark = [pytest.mark.usefixtures("graph_mode"), needs_compiler]

KERNEL = pytest.param(
    True, id="kernel", marks=pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no AVX512-BF16")
)
FORMS = pytest.mark.parametrize("has_kernel", [KERNEL, pytest.param(False, id="unpacked")])


def rounded(x: np.ndarray) -> np.ndarray:
    """Round to bf16 and return fp32."""
    return widen(to_bfloat16(x)).reshape(x.shape)


class Layer(nn.Cell):
    """A product with a frozen weight in bf16."""

    def __init__(self, product: nn.Cell, weight: np.ndarray):
        super().__init__()
        self.product = product
        self.weight = Parameter(Tensor(weight), name="weight", requires_grad=False)
        self.weight.set_dtype(ms.bfloat16)

    def construct(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


def value_and_gradient(product: nn.Cell, x: np.ndarray, weight: np.ndarray, dy: np.ndarray):
    layer = Layer(product, weight)
    gradient = ms.ops.GradOperation(sens_param=True)(layer)
    return layer(Tensor(x)).asnumpy(), gradient(Tensor(x), Tensor(dy)).asnumpy()


def assert_near(actual: np.ndarray, expected: np.ndarray, bound: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


def test_rounding_is_mindspores():
    x = np.concatenate([normal(999), np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3e38])])
    np.testing.assert_array_equal(rounded(x), Tensor(x).astype(ms.bfloat16).astype(ms.float32).asnumpy())


@FORMS
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 2, 2),
        (5, 34, 50),
        (97, 258, 66),
        (13, 520, 514),
        (1030, 64, 130),
        (2100, 34, 50),
        (1030, 520, 514),
        (3, 7, 4),
        (3, 4, 7),
    ],
)
def test_linear(has_kernel, rows, inputs, outputs):
    x, weight, dy = normal(rows, inputs), normal(outputs, inputs, seed=1), normal(rows, outputs, seed=2)
    product = cpu.Bf16MatMul() if has_kernel else cpu.UnpackedMatMul()
    y, dx = value_and_gradient(product, x, weight, dy)
    in_pairs = has_kernel and inputs % 2 == outputs % 2 == 0
    of = rounded if in_pairs else np.asarray
    held = rounded(weight).astype(np.float64)
    assert_near(y, of(x).astype(np.float64) @ held.T, 2e-6)
    assert_near(dx, of(dy).astype(np.float64) @ held, 2e-6)


def convolve(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Convolve (N, C, H, W) with (O, C, k, k), stride 1, padded to the same size."""
    side = weight.shape[-1]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *[(side // 2,) * 2] * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.float64), optimize=True)


def turned(weight: np.ndarray) -> np.ndarray:
    """Return the weight of the convolution that is the gradient for the input."""
    return weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]


@FORMS
@pytest.mark.parametrize(
    ("shape", "outputs", "side"),
    [
        ((1, 4, 8, 8), 6, 3),
        ((2, 30, 8, 8), 58, 3),
        ((3, 6, 4, 7), 10, 3),
        ((1, 2, 1, 3), 2, 3),
        ((2, 34, 9, 31), 6, 1),
        ((1, 260, 3, 3), 4, 1),
        ((1, 3, 5, 5), 4, 3),
        ((1, 4, 5, 5), 3, 1),
    ],
)
def test_convolution(has_kernel, shape, outputs, side):
    x, weight = normal(*shape), normal(outputs, shape[1], side, side, seed=1)
    dy = normal(shape[0], outputs, *shape[2:], seed=2)
    if has_kernel:
        product = cpu.Bf16Conv2d(outputs, side)
        product.is_3x3 = False  # the direct kernel, whatever the size
    else:
        product = cpu.UnpackedConv2d(outputs, side, 1, side // 2)
    y, dx = value_and_gradient(product, x, weight, dy)
    of = rounded if has_kernel and shape[1] % 2 == outputs % 2 == 0 else np.asarray
    held = rounded(weight)
    assert_near(y, convolve(of(x), held), 3e-6)
    assert_near(dx, convolve(of(dy), turned(held)), 3e-6)


@pytest.mark.parametrize("has_kernel", [KERNEL])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 18, 16, 17), 50), ((9, 2, 5, 5), 4), ((2, 6, 40, 33), 98)])
def test_convolution_by_winograd(has_kernel, shape, outputs):
    """Small integers are exact, so that nothing but rounding can differ for other numbers."""
    assert shape[0] * shape[2] * shape[3] > cpu.FEW_PIXELS
    product = cpu.Bf16Conv2d(outputs, 3)
    rng = np.random.default_rng(0)
    x, dy = (rng.integers(-8, 9, (shape[0], c, *shape[2:])).astype(np.float32) for c in (shape[1], outputs))
    weight = 4 * rng.integers(-8, 9, (outputs, shape[1], 3, 3)).astype(np.float32)
    y, dx = value_and_gradient(product, x, weight, dy)
    np.testing.assert_array_equal(y, convolve(x, weight))
    np.testing.assert_array_equal(dx, convolve(dy, turned(weight)))
    x, weight, dy = normal(*x.shape), normal(*weight.shape, seed=1), normal(*dy.shape, seed=2)
    y, dx = value_and_gradient(product, x, weight, dy)
    for actual, exact in ((y, convolve(x, weight)), (dx, convolve(dy, turned(weight)))):
        assert np.sqrt(np.mean((actual - exact) ** 2) / np.mean(exact**2)) < 6e-3


def test_without_kernels_weights_are_unpacked_by_mindspore(monkeypatch):
    monkeypatch.setattr(cpu, "kernel_library", lambda: None)
    x, weight, dy = normal(5, 34), normal(50, 34, seed=1), normal(5, 50, seed=2)
    y, dx = value_and_gradient(cpu.UnpackedMatMul(), x, weight, dy)
    assert_near(y, x.astype(np.float64) @ rounded(weight).T, 2e-6)
    assert_near(dx, dy.astype(np.float64) @ rounded(weight), 2e-6)
    x, weight, dy = normal(1, 16, 16, 16), normal(18, 16, 3, 3, seed=1), normal(1, 18, 16, 16, seed=2)
    y, dx = value_and_gradient(cpu.UnpackedConv2d(18, 3, 1, 1), x, weight, dy)
    assert_near(y, convolve(x, rounded(weight)), 3e-6)
    assert_near(dx, convolve(dy, turned(rounded(weight))), 3e-6)


class Fp32Layer(nn.Cell):
    """A convolution with a frozen weight in fp32."""

    def __init__(self, convolution: nn.Cell, weight: np.ndarray):
        super().__init__()
        self.convolution = convolution
        self.weight = Parameter(Tensor(weight), name="weight", requires_grad=False)

    def construct(self, x: Tensor) -> Tensor:
        return self.convolution(x, self.weight)


@pytest.mark.parametrize(
    ("shape", "outputs"), [((3, 19, 20, 21), 17), ((1, 16, 16, 16), 33), ((1, 18, 15, 17), 20), ((1, 8, 40, 9), 20)]
)
def test_an_unpacked_3x3_convolution_is_that_of_fp32_with_the_rounded_weight(shape, outputs):
    """To the last bit, by Winograd's algorithm or, for few pixels or channels, without."""
    x, weight = normal(*shape), normal(outputs, shape[1], 3, 3, seed=1)
    dy = Tensor(normal(shape[0], outputs, *shape[2:], seed=2))
    y, dx = value_and_gradient(cpu.UnpackedConv2d(outputs, 3, 1, 1), x, weight, dy.asnumpy())
    fp32 = Fp32Layer(operators.conv2d(outputs, 3, 1, 1, False).convolution, rounded(weight))
    assert_near(y, convolve(x, rounded(weight)), 1e-5)
    assert_near(dx, convolve(dy.asnumpy(), turned(rounded(weight))), 1e-5)
    np.testing.assert_array_equal(y, fp32(Tensor(x)).asnumpy())
    np.testing.assert_array_equal(dx, ms.ops.GradOperation(sens_param=True)(fp32)(Tensor(x), dy).asnumpy())


def test_convolution_that_halves_the_size():
    """The kernels keep the size: others cast the weight and do not round x."""
    x, weight, dy = normal(1, 4, 8, 8), normal(6, 4, 3, 3, seed=1), normal(1, 6, 4, 4, seed=2)
    y, dx = value_and_gradient(operators.conv2d(6, 3, 2, 1, False, bf16_weight=True).convolution, x, weight, dy)
    assert_near(y, convolve(x, rounded(weight))[:, :, ::2, ::2], 2e-6)
    spread = np.zeros((1, 6, 8, 8), np.float32)
    spread[:, :, ::2, ::2] = dy
    assert_near(dx, convolve(spread, turned(rounded(weight))), 2e-6)


class Attention(nn.Cell):
    def __init__(self, attention: nn.Cell, n: int):
        super().__init__()
        self.attention, self.n = attention, n

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, self.n)


@pytest.mark.parametrize("has_kernel", [KERNEL])
@pytest.mark.parametrize(
    ("n", "heads", "tokens", "keys", "dim"),
    [(1, 1, 1, 1, 1), (2, 3, 50, 33, 5), (1, 2, 100, 77, 40), (1, 1, 49, 600, 80), (2, 1, 48, 64, 160),
     (1, 2, 900, 8, 8)],
)  # fmt: skip
def test_attention(has_kernel, n, heads, tokens, keys, dim):
    q, k, v = (
        normal(n * tokens, heads * dim),
        normal(n * keys, heads * dim, seed=1),
        normal(n * keys, heads * dim, seed=2),
    )
    dout = normal(*q.shape, seed=3)
    found = []
    for bf16 in (False, True):
        attention = Attention(cpu.MultiHeadAttention(heads, False, bf16), n)
        gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(attention)
        inputs = [Tensor(x) for x in (q, k, v)]
        found.append([attention(*inputs).asnumpy(), *(x.asnumpy() for x in gradients(*inputs, Tensor(dout)))])
    for exact, actual, name in zip(*found, ("out", "dq", "dk", "dv")):
        scale = np.sqrt(np.mean(exact**2)) if keys > 1 else 1.0  # dq and dk of a single key are 0
        assert np.sqrt(np.mean((actual - exact) ** 2)) < 8e-3 * scale, name
        assert keys == 1 or (actual != exact).any(), name


@pytest.mark.parametrize("has_kernel", [KERNEL])
def test_attention_of_values_that_bf16_holds_is_fp32s(has_kernel):
    """One key, and equal keys: the probabilities are 1 and 1/4, so nothing is rounded."""
    v = rounded(normal(4, 16))
    attention = Attention(cpu.MultiHeadAttention(2, False, True), 1)
    q = Tensor(normal(7, 16, seed=1))
    one = attention(q, Tensor(normal(1, 16)), Tensor(v[:1])).asnumpy()
    np.testing.assert_array_equal(one, np.repeat(v[:1], 7, 0))
    equal = attention(q, Tensor(np.repeat(normal(1, 16), 4, 0)), Tensor(v)).asnumpy()
    np.testing.assert_allclose(equal, np.repeat(v.mean(0, keepdims=True), 7, 0), atol=1e-6)


@pytest.mark.parametrize("bf16", [KERNEL, pytest.param(False, id="fp32")])
def test_attention_hides_no_nan(bf16):
    """A NaN in the first head of each input in turn reaches what it is a factor of, and nothing of the second head."""
    attention = Attention(cpu.MultiHeadAttention(2, False, bf16), 1)
    gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(attention)
    token, channel, head = 49, 3, slice(8)
    reached = {  # the rows and channels that become NaN
        "q": {"out": (token, head), "dq": (token, head), "dk": (slice(None), head), "dv": (slice(None), head)},
        "k": dict.fromkeys(("out", "dq", "dk", "dv"), (slice(None), head)),
        "v": {"out": (slice(None), channel), "dq": (slice(None), head), "dk": (slice(None), head)},
        "dout": {"dq": (token, head), "dk": (slice(None), head), "dv": (slice(None), channel)},
    }
    for name, places in reached.items():
        given = {"q": normal(51, 16), "k": normal(51, 16, seed=1), "v": normal(51, 16, seed=2), "dout": normal(51, 16)}
        given[name][token, channel] = np.nan
        q, k, v, dout = (Tensor(x) for x in given.values())
        results = dict(zip(("out", "dq", "dk", "dv"), (attention(q, k, v), *gradients(q, k, v, dout))))
        for result, found in results.items():
            expected = np.zeros((51, 16), bool)
            if result in places:
                expected[places[result]] = True
            np.testing.assert_array_equal(np.isnan(found.asnumpy()), expected, f"{result} for a NaN in {name}")


@FORMS
def test_products_hide_no_nan(has_kernel):
    x, weight, dy = normal(3, 16), normal(4, 16, seed=1), normal(3, 4, seed=2)
    x[1, 3] = dy[2, 0] = weight[1, 5] = np.nan
    y, dx = value_and_gradient(cpu.Bf16MatMul() if has_kernel else cpu.UnpackedMatMul(), x, weight, dy)
    expected = np.zeros(y.shape, bool)
    expected[1], expected[:, 1] = True, True
    np.testing.assert_array_equal(np.isnan(y), expected)
    expected = np.zeros(x.shape, bool)
    expected[2], expected[:, 5] = True, True
    np.testing.assert_array_equal(np.isnan(dx), expected)


@FORMS
@pytest.mark.parametrize("size", [8, 20], ids=["direct", "winograd"])
def test_convolutions_hide_no_nan(has_kernel, size):
    """Winograd's algorithm takes 2x2 pixels at a time: those may become NaN with one of them."""
    x, weight, dy = normal(1, 16, size, size), normal(18, 16, 3, 3, seed=1), normal(1, 18, size, size, seed=2)
    x[0, 3, 4, 6] = dy[0, 5, 5, 3] = np.nan
    product = cpu.Bf16Conv2d(18, 3) if has_kernel else cpu.UnpackedConv2d(18, 3, 1, 1)
    y, dx = value_and_gradient(product, x, weight, dy)
    for found, row, column in ((y, 4, 6), (dx, 5, 3)):
        near, wide = np.zeros((2, *found.shape), bool)
        near[:, :, row - 1 : row + 2, column - 1 : column + 2] = True
        wide[:, :, row - 2 : row + 3, column - 2 : column + 3] = True
        assert np.isnan(found[near]).all() and np.isfinite(found[~wide]).all()


def test_causal_attention_stays_fp32():
    shared = operators.attention(2, 8, causal_length=5)
    assert operators.attention(2, 8, causal_length=5, bf16=True) is shared
    assert (operators.attention(2, 8, bf16=True) is operators.attention(2, 8)) != multiplies_bf16()
