"""Attention: the plain formula, its own backward pass, the causal mask, and what Ascend's fused operator is given."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ldm import ops as operators
from ldm.models.layers import set_compute_dtype
from ldm.ops import ascend, portable
from ldm.ops.ascend import FlashAttention
from ldm.ops.portable import ScaledDotProductAttention

SHAPES = [
    pytest.param((2, 3, 9, 8), (2, 3, 9, 8), id="self"),
    pytest.param((2, 3, 9, 8), (2, 3, 5, 8), id="cross"),
    pytest.param((1, 1, 1, 4), (1, 1, 7, 4), id="one query"),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_attention(q, k, v, causal=False):
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p, p @ v


def plain_gradients(q, k, v, weight, causal=False):
    """Of sum(attention * weight) by q, k and v, in float64."""
    p, _ = plain_attention(q, k, v, causal)
    dp = weight @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ weight


class Weighted(nn.Cell):
    def __init__(self, cell, weight):
        super().__init__()
        self.cell, self.weight, self.sum = cell, Tensor(weight), ops.ReduceSum()

    def construct(self, q, k, v):
        return self.sum((self.cell(q, k, v) * self.weight).astype(ms.float32))


@pytest.mark.parametrize(
    "rows, elements_of_row, limit, expected",
    [
        (9, 30, 1, 1),
        (9, 30, 120, 3),
        (9, 30, 240, 5),
        (9, 30, 270, 9),
        (9, 30, 10**9, 9),
        (4096, 8 * 4096, 2**24, 512),
        (1024, 8 * 1024, 2**24, 1024),
        (9216, 2 * 5 * 9216, 2**24, 181),
        (1, 77, 1, 1),
    ],
)
def test_block_rows(rows, elements_of_row, limit, expected):
    found = portable.block_rows(rows, elements_of_row, limit)
    assert found == expected
    assert found == 1 or found * elements_of_row <= limit


@pytest.mark.usefixtures("graph_mode")
class TestScaledDotProductAttention:
    @pytest.mark.parametrize("queries, keys", SHAPES)
    def test_equals_the_plain_formula(self, queries, keys):
        q, k, v = normal(*queries), normal(*keys, seed=1), normal(*keys, seed=2)
        found = ScaledDotProductAttention(queries[-1])(Tensor(q), Tensor(k), Tensor(v))
        np.testing.assert_allclose(found.asnumpy(), plain_attention(q, k, v)[1], atol=1e-5)

    @pytest.mark.parametrize("queries, keys", SHAPES)
    def test_its_own_derivative_is_the_plain_formulas(self, queries, keys):
        q, k, v, weight = 2 * normal(*queries), normal(*keys, seed=1), normal(*keys, seed=2), normal(*queries, seed=3)
        cell = Weighted(ScaledDotProductAttention(queries[-1]), weight)
        found = ms.grad(cell, grad_position=(0, 1, 2))(Tensor(q), Tensor(k), Tensor(v))
        for ours, plain in zip(found, plain_gradients(q, k, v, weight)):
            np.testing.assert_allclose(ours.asnumpy(), plain, atol=1e-5)

    def test_causal_attention_and_its_derivative(self):
        shape = (2, 3, 6, 8)
        q, k, v, weight = (normal(*shape, seed=seed) for seed in range(4))
        cell = ScaledDotProductAttention(8, causal_length=6)
        found = cell(Tensor(q), Tensor(k), Tensor(v)).asnumpy()
        np.testing.assert_allclose(found, plain_attention(q, k, v, causal=True)[1], atol=1e-5)
        by_each = ms.grad(Weighted(cell, weight), grad_position=(0, 1, 2))(Tensor(q), Tensor(k), Tensor(v))
        for ours, plain in zip(by_each, plain_gradients(q, k, v, weight, causal=True)):
            np.testing.assert_allclose(ours.asnumpy(), plain, atol=1e-5)

    @pytest.mark.parametrize("elements", [1, 2 * 3 * 5 * 4, 2 * 3 * 5 * 8], ids=["a row each", "3 blocks", "2 blocks"])
    def test_blocks_of_query_rows_change_nothing(self, elements):
        """9 query rows: blocks of 1, of 3, and of 5 and 4."""
        shape, keys = (2, 3, 9, 8), (2, 3, 5, 8)
        q, k, v, weight = normal(*shape), normal(*keys, seed=1), normal(*keys, seed=2), normal(*shape, seed=3)
        cell = ScaledDotProductAttention(8)
        cell.block_elements = elements
        found = ms.value_and_grad(Weighted(cell, weight), grad_position=(0, 1, 2))(Tensor(q), Tensor(k), Tensor(v))[1]
        for ours, plain in zip(found, plain_gradients(q, k, v, weight)):
            np.testing.assert_allclose(ours.asnumpy(), plain, atol=1e-5)
        np.testing.assert_allclose(
            cell(Tensor(q), Tensor(k), Tensor(v)).asnumpy(), plain_attention(q, k, v)[1], atol=1e-5
        )

    def test_softmax_is_in_fp32_where_the_products_are_in_fp16(self):
        cell = ScaledDotProductAttention(8)
        set_compute_dtype(cell, ms.float16)
        q, k = (Tensor(normal(1, 2, 5, 8, seed=seed).astype(np.float16)) for seed in (0, 1))
        assert cell.probabilities(q, k).dtype == ms.float32

    def test_derivative_in_fp16_is_near_the_plain_one(self):
        q, k, v, weight = (normal(1, 2, 5, 8, seed=seed).astype(np.float16) for seed in range(4))
        cell = Weighted(ScaledDotProductAttention(8), weight)
        found = ms.grad(cell, grad_position=(0, 1, 2))(Tensor(q), Tensor(k), Tensor(v))
        for ours, plain in zip(found, plain_gradients(*(x.astype(np.float64) for x in (q, k, v, weight)))):
            assert ours.dtype == ms.float16
            np.testing.assert_allclose(ours.asnumpy(), plain, atol=1e-2)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("device", ["CPU", "Ascend"])
@pytest.mark.parametrize("n, heads, tokens, keys, causal, rank", [
    pytest.param(2, 3, 9, 5, False, 2, id="two images to text"),
    pytest.param(2, 3, 9, 9, True, 2, id="causal"),
    pytest.param(2, 1, 1, 7, False, 2, id="one query"),
    pytest.param(2, 3, 9, 9, True, 3, id="text in three axes"),
    pytest.param(1, 2, 500, 300, False, 2, id="two blocks of queries"),
    pytest.param(1, 2, 500, 500, True, 2, id="causal, two blocks"),
    pytest.param(3, 4, 300, 300, False, 2, id="heads in threads"),
])  # fmt: skip
def test_multi_head_attention_of_rows_and_its_derivative(device, n, heads, tokens, keys, causal, rank, monkeypatch):
    """Each image and head by itself."""
    monkeypatch.setattr(operators, "on_ascend", lambda: device == "Ascend")
    monkeypatch.setattr(ascend, "BLOCK_ELEMENTS", 2**16)  # so that some are computed in blocks
    q, k, v, weight = (normal(n, heads, length, 8, seed=i) for i, length in enumerate((tokens, keys, keys, tokens)))

    def rows(x):
        x = x.swapaxes(1, 2).reshape(n, -1, heads * 8)
        return x if rank == 3 else x.reshape(-1, heads * 8)

    class OfRows(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention = operators.attention(heads, 8, keys if causal else 0)

        def construct(self, q, k, v):
            return self.attention(q, k, v, n)

    cell, given = OfRows(), [Tensor(rows(x)) for x in (q, k, v)]
    np.testing.assert_allclose(cell(*given).asnumpy(), rows(plain_attention(q, k, v, causal)[1]), atol=1e-5)
    found = ms.grad(Weighted(cell, rows(weight)), grad_position=(0, 1, 2))(*given)
    for ours, plain in zip(found, plain_gradients(q, k, v, weight, causal)):
        np.testing.assert_allclose(ours.asnumpy(), rows(plain), atol=1e-5)


@pytest.mark.usefixtures("graph_mode")
def test_attention_of_numbers_that_are_not_numbers_is_none():
    """An overflow must reach the loss, not vanish in a softmax."""
    q, k, v = (normal(6, 8, seed=seed) for seed in range(3))
    k[4, 0] = np.nan

    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention = operators.attention(2, 4)

        def construct(self, q, k, v):
            return self.attention(q, k, v, 1)

    found = Attention()(Tensor(q), Tensor(k), Tensor(v)).asnumpy()
    assert np.isnan(found[:, :4]).all() and np.isfinite(found[:, 4:]).all()


@pytest.mark.parametrize("device, elements", [("CPU", 2**24), ("Ascend", 2**28)])
def test_the_blocks_of_plain_attention_are_as_large_as_the_device_takes(device, elements, monkeypatch):
    monkeypatch.setattr(operators, "on_ascend", lambda: device == "Ascend")
    monkeypatch.setattr(operators, "kernels_in_use", lambda: None)
    assert operators.attention(8, 40).attention.block_elements == elements


@pytest.mark.parametrize("head_dim, size", [
    (40, 64), (64, 64), (80, 80), (96, 96), (104, 128), (120, 128), (128, 128), (160, 256), (257, 272), (4, 64),
])  # fmt: skip
def test_heads_have_sizes_that_the_fused_kernel_has(head_dim, size):
    """SD1.x has heads of 40, 80 and 160 channels, SD2.x of 64; small models of anything."""
    assert ascend.flash_head_size(head_dim) == size


def differentiable_flash_attention(query, key, value, head_num, scalar_value=1.0, input_layout="BSH"):
    """The documented formula of `ops.flash_attention_score` in operators that MindSpore derives, in fp32."""
    shape = query.shape
    q, k, v = (
        x.astype(ms.float32).reshape(x.shape[0], x.shape[1], head_num, -1).transpose(0, 2, 1, 3)
        for x in (query, key, value)
    )
    p = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * scalar_value, -1)
    return ops.matmul(p, v).transpose(0, 2, 1, 3).reshape(shape).astype(ms.float16)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("head_dim", [40, 64, 160])
def test_the_gradient_passes_through_the_padding_of_the_heads_and_the_cutting(head_dim, monkeypatch):
    """The padding and the cutting are MindSpore's ConstantPadND and its derivative, as on Ascend."""
    monkeypatch.setattr(ascend.ops, "flash_attention_score", differentiable_flash_attention)
    lengths = (6, 5, 5, 6)
    q, k, v, weight = (normal(2, 3, n, head_dim, seed=i).astype(np.float16) for i, n in enumerate(lengths))

    def rows(x):
        return x.swapaxes(1, 2).reshape(-1, 3 * head_dim)

    class OfRows(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention = FlashAttention(3, head_dim)

        def construct(self, q, k, v):
            return self.attention(q, k, v, 2)

    cell = Weighted(OfRows(), rows(weight))
    found = ms.grad(cell, grad_position=(0, 1, 2))(*(Tensor(rows(x)) for x in (q, k, v)))
    for ours, plain in zip(found, plain_gradients(*(x.astype(np.float64) for x in (q, k, v, weight)))):
        assert ours.dtype == ms.float16
        np.testing.assert_allclose(ours.asnumpy(), rows(plain), atol=1e-2)


class TestFlashAttention:
    """The operator exists on Ascend alone, so here it is replaced by its documented meaning and limits."""

    @pytest.fixture
    def operator(self, monkeypatch):
        def flash_attention_score(query, key, value, head_num, scalar_value=1.0, input_layout="BSH", **rest):
            assert not rest
            assert query.ndim == {"BSH": 3, "BSND": 4}[input_layout]
            assert head_num <= 256
            assert query.dtype == key.dtype == value.dtype == ms.float16
            n = query.shape[0]
            q, k, v = (
                x.asnumpy().astype(np.float32).reshape(n, x.shape[1], head_num, -1).swapaxes(1, 2)
                for x in (query, key, value)
            )
            # "a multiple of 16, with the max value of 512", says its documentation in MindSpore 2.8.
            assert q.shape[-1] % 16 == 0 and q.shape[-1] <= 512
            q = q * (scalar_value * np.sqrt(q.shape[-1]))  # plain_attention divides by the root of the padded size
            return Tensor(plain_attention(q, k, v)[1].swapaxes(1, 2).reshape(query.shape).astype(np.float16))

        def pad(x, sides):
            before, after = sides
            assert before == 0
            array = x.asnumpy()
            zeros = np.zeros((*array.shape[:-1], max(after, 0)), array.dtype)
            return Tensor(np.concatenate([array[..., :after] if after < 0 else array, zeros], axis=-1))

        monkeypatch.setattr(ascend.ops, "flash_attention_score", flash_attention_score)
        monkeypatch.setattr(ascend, "pad", pad)  # ConstantPadND has no CPU kernel in this mode
        ms.set_context(mode=ms.PYNATIVE_MODE)

    @pytest.mark.parametrize("head_dim", [40, 64, 80, 160, 4])
    def test_every_head_size_fits_the_operator(self, operator, head_dim):
        q, k, v = (normal(2, 3, length, head_dim, seed=length).astype(np.float16) for length in (6, 5, 5))

        def rows(x):
            return Tensor(x.swapaxes(1, 2).reshape(-1, 3 * head_dim))

        found = FlashAttention(3, head_dim)(rows(q), rows(k), rows(v), 2)
        assert found.shape == (12, 3 * head_dim)
        expected = plain_attention(q, k, v)[1].swapaxes(1, 2).reshape(found.shape)
        np.testing.assert_allclose(found.asnumpy(), expected, atol=5e-3)
